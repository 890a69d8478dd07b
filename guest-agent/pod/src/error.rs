//! The one error of shim and agent: a sentence.

use std::fmt::Display;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// An error that says this.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// Result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was being done.
pub trait Context<T> {
    /// Puts `what` in front of the error.
    fn context(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Error(format!("{what}: {error}")))
    }
}

impl<T> Context<T> for Option<T> {
    fn context(self, what: impl Display) -> Result<T> {
        self.ok_or_else(|| Error(format!("{what}")))
    }
}
