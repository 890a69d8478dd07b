//! The interrupt line that a device raises.

use std::io;

/// An interrupt line that a device can raise. The line is edge-triggered: every call is one interrupt.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt.
    ///
    /// # Errors
    /// The error of the system call.
    fn trigger(&self) -> io::Result<()>;
}
