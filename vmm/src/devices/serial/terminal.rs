//! Raw mode of the operator's terminal.

use std::io;

use rustix::termios::{self, OptionalActions, Termios};

/// The terminal at standard input is in raw mode while this exists.
pub struct RawMode(Termios);

impl RawMode {
    /// Puts standard input into raw mode; `None` if it is no terminal.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone: then there is nothing to restore.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}
