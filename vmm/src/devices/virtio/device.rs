//! What every virtio device is to its transport.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// How a device tells its driver that something happened (virtio 1.3, 4.2.2: interrupt status).
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers were used in a queue.
    ///
    /// # Errors
    /// The error of the system call behind it.
    fn used_buffers(&self) -> io::Result<()>;

    /// The device's configuration changed.
    ///
    /// # Errors
    /// The error of the system call behind it.
    fn configuration_changed(&self) -> io::Result<()>;

    /// The device cannot go on: DEVICE_NEEDS_RESET is set and the driver is told (virtio 1.3, 2.1.2).
    ///
    /// # Errors
    /// The error of the system call behind it.
    fn needs_reset(&self) -> io::Result<()>;
}

/// A queue that the driver has set up: valid and ready at activation.
pub struct QueueHandle {
    /// The queue.
    pub queue: Queue,
    /// Becomes readable when the driver notifies the queue.
    pub notified: EventFd,
}

/// What a device gets when its driver sets DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The features that both sides agreed on.
    pub features: u64,
    /// All queues of the device, in the order of [`VirtioDevice::queue_sizes`]; `None` for one that the driver left out.
    pub queues: Vec<Option<QueueHandle>>,
    /// The way to the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A device could not start. The transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The driver did not set up a queue that the device cannot do without.
    #[error("the driver left out queue {0}, which the device needs")]
    MissingQueue(usize),
    /// The worker thread could not be started.
    #[error("the worker thread could not be started: {0}")]
    Worker(#[source] io::Error),
}

/// A virtio device behind a transport. The device does its work on a thread of its own between
/// `activate` and `reset`.
pub trait VirtioDevice: Send {
    /// Device type number (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// Features that the device offers, `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;

    /// Maximum size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Reads from the device's configuration space. What lies beyond its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device's configuration space. What cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: start working.
    ///
    /// # Errors
    /// [`ActivationError`]; the device is then as it was before.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError>;

    /// Stops working and forgets the driver. When this returns, nothing of the activation is in use any
    /// more, and whatever the driver had handed over is its own again. Also called for a device that is
    /// not active.
    fn reset(&mut self);
}
