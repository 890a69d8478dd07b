//! virtio-blk (virtio 1.3, 5.2) on raw files and block devices.

mod disk;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{DeviceThread, GuestFaults, Limiter, ServedQueue, Worker};
use super::{Activation, ActivationError, VirtioDevice};
use crate::sys::seccomp::Role;
use wire::{DEVICE_TYPE, ID_BYTES};
use worker::{BlockWorker, Context};

pub use disk::{Disk, DiskError, DiskIdentity};
pub use worker::{DiskCounters, DiskStats};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;

/// Maximum number of data buffers in a request: header and status take two descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// A block device.
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    counters: Arc<DiskCounters>,
    faults: Arc<GuestFaults>,
    worker: Option<Worker>,
    thread: DeviceThread,
    limiter: Arc<Mutex<Limiter>>,
}

impl Block {
    /// A device for `disk`, number `index` on the command line: threads and logs call it `blk` with that number. `limiter` has
    /// its limits.
    ///
    /// # Errors
    /// Its thread could not be started.
    pub fn new(index: usize, disk: Disk, limiter: Limiter) -> io::Result<Self> {
        let name = format!("blk{index}");
        let mut id = [0; ID_BYTES];
        let text = match disk.identity() {
            DiskIdentity::File(device, inode) => format!("{device:x}-{inode}"),
            DiskIdentity::Block(number) => format!("block-{number:x}"),
        };
        for (to, from) in id.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Ok(Self {
            thread: DeviceThread::spawn(&format!("ebb-{name}"), Role::Block)?,
            faults: Arc::new(GuestFaults::new(name)),
            disk: Arc::new(disk),
            id,
            counters: Arc::default(),
            worker: None,
            limiter: Arc::new(Mutex::new(limiter)),
        })
    }

    /// The disk's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<DiskCounters> {
        &self.counters
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        let features = bits.iter().fold(0, |features, bit| features | 1 << bit);
        features | u64::from(self.disk.is_readonly()) << VIRTIO_BLK_F_RO
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = wire::config(self.disk.sectors(), SEG_MAX);
        let tail = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut queues = activation.queues.into_iter();
        let handle = queues
            .next()
            .flatten()
            .ok_or(ActivationError::MissingQueue(0))?;
        let context = Context {
            memory: activation.memory,
            disk: Arc::clone(&self.disk),
            id: self.id,
            counters: Arc::clone(&self.counters),
            faults: Arc::clone(&self.faults),
            interrupt: activation.interrupt,
        };
        let worker = BlockWorker::new(
            context,
            ServedQueue::new(0, handle),
            QUEUE_SIZE,
            Arc::clone(&self.limiter),
        );
        let worker = self.thread.start(worker);
        self.worker = Some(worker.map_err(ActivationError::Worker)?);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }

    fn reset(&mut self) {
        // Waits for the thread.
        self.worker = None;
    }
}
