//! A terminal of our own, for what the monitor does only in one.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::console::Console;
use crate::error::{Context, Result};

/// The far end of a terminal, and a hold on the near one.
pub struct Terminal {
    far: File,
    near: OwnedFd,
    /// What is written to the terminal.
    pub screen: Console,
}

/// How a terminal treats what goes through it: input, output, control and local modes.
pub type Modes = [u32; 4];

impl Terminal {
    /// A new terminal.
    ///
    /// # Errors
    /// When the host has none to give.
    pub fn open() -> Result<Self> {
        let far = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("open a terminal")?;
        grantpt(&far).context("grant a terminal")?;
        unlockpt(&far).context("unlock a terminal")?;
        let name = ptsname(&far, Vec::new()).context("name a terminal")?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let near = open(name, flags, Mode::empty()).context("open a terminal's near end")?;
        let far = File::from(far);
        let screen = Console::read(far.try_clone().context("duplicate a terminal")?);
        Ok(Self { far, near, screen })
    }

    /// The near end, for a process.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn near(&self) -> Result<Stdio> {
        Ok(self
            .near
            .try_clone()
            .context("duplicate a terminal")?
            .into())
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn type_in(&mut self, keys: &str) -> Result<()> {
        self.far
            .write_all(keys.as_bytes())
            .context(format_args!("type {keys:?}"))
    }

    /// Its modes now.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn modes(&self) -> Result<Modes> {
        let now = tcgetattr(&self.near).context("read a terminal's modes")?;
        let (input, output) = (now.input_modes.bits(), now.output_modes.bits());
        Ok([
            input,
            output,
            now.control_modes.bits(),
            now.local_modes.bits(),
        ])
    }

    /// Whether it hands keys on one by one, unseen and uninterpreted.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn is_raw(&self) -> Result<bool> {
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        Ok(self.modes()?[3] & cooked.bits() == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_terminal_is_cooked_and_echoes() {
        let mut terminal = Terminal::open().unwrap();
        assert!(!terminal.is_raw().unwrap());
        terminal.type_in("hello\n").unwrap();
        terminal
            .screen
            .wait_for("hello", crate::wait::LONG)
            .unwrap();
    }
}
