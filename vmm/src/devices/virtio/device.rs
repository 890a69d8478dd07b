//! The interface between a virtio device and its transport.

use std::io;
use std::sync::Arc;

use serde_json::Value;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Worker;

/// By this a device notifies its driver (virtio 1.3, 4.2.2: interrupt status).
pub trait VirtioInterrupt: Send + Sync {
    /// Notifies that buffers in queue number `queue` were used.
    ///
    /// # Errors
    /// The error of the system call.
    fn used_buffers(&self, queue: usize) -> io::Result<()>;

    /// Notifies that the device's configuration changed.
    ///
    /// # Errors
    /// The error of the system call.
    fn configuration_changed(&self) -> io::Result<()>;

    /// Sets DEVICE_NEEDS_RESET and notifies the driver: the device cannot continue (virtio 1.3, 2.1.2).
    ///
    /// # Errors
    /// The error of the system call.
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
    /// Notifies the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A device could not start. The transport then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The driver did not set up a queue that the device needs.
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

    /// Reads from the device's configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device's configuration space. Writes to read-only fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: start working.
    ///
    /// # Errors
    /// [`ActivationError`]; the device then has not changed.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError>;

    /// What works for the device now. While the machine is paused all of it rests, see `Worker::pause`.
    fn workers(&self) -> &[Worker];

    /// What a snapshot keeps of it beyond what its transport does, and beyond its configuration. `None`: it cannot be a part
    /// of one.
    fn save(&self) -> Option<Value> {
        None
    }

    /// Takes up what [`VirtioDevice::save`] has returned, before the device is activated.
    ///
    /// # Errors
    /// Why the state is none of this device.
    fn restore(&mut self, _state: &Value) -> Result<(), String> {
        Ok(())
    }

    /// Stops the device and forgets the driver. When this returns, the device uses no queue and no guest memory any
    /// more, and all pages that the driver had given to it belong to the driver again. Also called for a device that
    /// is not active.
    fn reset(&mut self);
}
