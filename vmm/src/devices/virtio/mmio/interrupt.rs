//! Notifications of a device to its driver.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::wire::{INTERRUPT_CONFIG, INTERRUPT_USED};
use crate::devices::virtio::VirtioInterrupt;
use crate::irq::Interrupt;

/// Interrupt status, configuration generation and DEVICE_NEEDS_RESET of one device. Written by its worker, read and
/// acknowledged by the transport.
pub(super) struct MmioInterrupt {
    line: Arc<dyn Interrupt>,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl MmioInterrupt {
    pub fn new(line: Arc<dyn Interrupt>) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Clears everything. Called after the device has been reset, when its workers are gone.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    /// The bit is set first: the driver must find it when it handles the interrupt.
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.trigger()
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn used_buffers(&self) -> io::Result<()> {
        self.raise(INTERRUPT_USED)
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG)
    }

    fn needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG)
    }
}
