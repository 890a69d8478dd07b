//! The operator's terminal, and its raw mode.

use std::io;

use rustix::process::getpgrp;
use rustix::termios::{self, OptionalActions, Termios};

/// The terminal at standard input, with the modes that it had when this was made.
#[derive(Clone, Debug)]
pub struct Terminal(Termios);

impl Terminal {
    /// `None` if there is no terminal, or if it is another job's: then this one is in the background.
    #[must_use]
    pub fn at_stdin() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        let modes = termios::tcgetattr(stdin).ok()?;
        // An error: it is not the terminal that controls this process, and has no jobs.
        let is_ours = termios::tcgetpgrp(stdin).map_or(true, |job| job == getpgrp());
        is_ours.then_some(Self(modes))
    }

    /// Returns true if there is no terminal any more.
    #[must_use]
    pub fn is_gone() -> bool {
        termios::tcgetattr(rustix::stdio::stdin()).is_err()
    }

    fn raw(&self) -> Termios {
        let mut raw = self.0.clone();
        raw.make_raw();
        raw
    }

    /// Takes the terminal out of raw mode, if it still is in that: a shell may have set modes of its own by now.
    pub fn leave_raw_mode(&self) {
        let now = termios::tcgetattr(rustix::stdio::stdin());
        if now.is_ok_and(|now| modes(&now) == modes(&self.raw())) {
            self.set(&self.0);
        }
    }

    fn set(&self, modes: &Termios) {
        // The terminal may be gone: then there is nothing to set.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, modes);
    }
}

/// The modes as numbers.
fn modes(of: &Termios) -> [u32; 4] {
    let (input, output) = (of.input_modes.bits(), of.output_modes.bits());
    [
        input,
        output,
        of.control_modes.bits(),
        of.local_modes.bits(),
    ]
}

/// The terminal at standard input is in raw mode while this exists.
#[derive(Debug)]
pub struct RawMode(Terminal);

impl RawMode {
    /// Puts standard input into raw mode; `None` if there is no terminal, or another job has it.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn enter() -> io::Result<Option<Self>> {
        let Some(terminal) = Terminal::at_stdin() else {
            return Ok(None);
        };
        let raw = terminal.raw();
        termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(terminal)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.0.set(&self.0.0);
    }
}
