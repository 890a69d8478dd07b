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

/// A message that is an interrupt (MSI): what the guest has a device write, and where (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// An interrupt whose message the guest chooses.
pub trait MessageInterrupt: Interrupt {
    /// From now on the interrupt is this message; without one it reaches nobody.
    ///
    /// # Errors
    /// The error of the system call, for instance for a message that KVM cannot deliver. The interrupt then reaches nobody.
    fn route(&self, message: Option<Message>) -> io::Result<()>;

    /// Tells which message [`MessageInterrupt::route`] will be called with soon: then what is told of several interrupts can be done
    /// at once. To ignore it changes nothing.
    fn prepare(&self, _message: Message) {}
}
