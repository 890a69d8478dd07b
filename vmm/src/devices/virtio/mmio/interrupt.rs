//! Notifications of a device to its driver.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::wire::{INTERRUPT_CONFIG, INTERRUPT_USED};
use crate::devices::virtio::VirtioInterrupt;
use crate::irq::Interrupt;

/// How notifications reach the driver of a device: the transport's part of [`VirtioInterrupt`].
pub trait Signal: Send + Sync {
    /// Buffers in queue number `queue` were used.
    ///
    /// # Errors
    /// The error of the system call.
    fn used_buffers(&self, queue: usize) -> io::Result<()>;

    /// The device's configuration changed, or it needs a reset.
    ///
    /// # Errors
    /// The error of the system call.
    fn configuration_changed(&self) -> io::Result<()>;

    /// The driver has reset the device.
    fn reset(&self) {}
}

/// One line for everything.
pub(super) struct Line(pub Arc<dyn Interrupt>);

impl Signal for Line {
    fn used_buffers(&self, _queue: usize) -> io::Result<()> {
        self.0.trigger()
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Interrupt status, configuration generation and DEVICE_NEEDS_RESET of one device. Written by its worker, read and
/// acknowledged by the transport.
pub(super) struct MmioInterrupt {
    signal: Arc<dyn Signal>,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl MmioInterrupt {
    pub fn new(signal: Arc<dyn Signal>) -> Self {
        Self {
            signal,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Reads the status and clears it.
    pub fn take(&self) -> u32 {
        self.status.swap(0, Ordering::SeqCst)
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
        self.signal.reset();
    }

    /// What a snapshot keeps: status, generation, and whether a reset is needed.
    pub fn save(&self) -> (u32, u32, bool) {
        (self.status(), self.generation(), self.is_reset_needed())
    }

    /// Takes up what a snapshot has kept.
    pub fn restore(&self, (status, generation, needs_reset): (u32, u32, bool)) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// Tells the driver again, of each of its `queues` and of its configuration if that has changed: what was on its way when
    /// the machine was saved may be lost.
    pub fn repeat(&self, queues: usize) -> io::Result<()> {
        if self.status() & INTERRUPT_CONFIG != 0 {
            self.signal.configuration_changed()?;
        }
        (0..queues).try_for_each(|queue| self.used_buffers(queue))
    }

    /// Done before the driver is told: it must find the bit when it handles the interrupt.
    fn set(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
    }
}

impl VirtioInterrupt for MmioInterrupt {
    fn used_buffers(&self, queue: usize) -> io::Result<()> {
        self.set(INTERRUPT_USED);
        self.signal.used_buffers(queue)
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.set(INTERRUPT_CONFIG);
        self.signal.configuration_changed()
    }

    fn needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.set(INTERRUPT_CONFIG);
        self.signal.configuration_changed()
    }
}
