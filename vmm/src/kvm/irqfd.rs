//! Interrupts through KVM's irqfd.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::irq::Interrupt;

/// An interrupt that KVM raises when this eventfd is signalled.
pub struct IrqFd(EventFd);

impl IrqFd {
    /// Wraps `event`, which is registered with KVM.
    pub(super) const fn new(event: EventFd) -> Self {
        Self(event)
    }
}

impl Interrupt for IrqFd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
