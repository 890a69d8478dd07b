//! virtio-rng (virtio 1.3, 5.4): random bytes of the host's kernel for that of the guest.

#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{DeviceThread, GuestFaults, ServedQueue, SharedLimiter, Worker};
use super::{Activation, ActivationError, VirtioDevice};
use crate::config::RngLimits;
use crate::sys::seccomp::Role;
use worker::{Context, RngWorker};

pub use worker::{RngCounters, RngStats};

/// Device type (virtio 1.3, 5.4.1).
const DEVICE_TYPE: u32 = 4;

/// Entries of the queue. Linux has one request under way.
const QUEUE_SIZE: u16 = 16;

/// A source of random bytes.
pub struct Entropy {
    counters: Arc<RngCounters>,
    faults: Arc<GuestFaults>,
    limiter: SharedLimiter,
    worker: Option<Worker>,
    thread: DeviceThread,
}

impl Entropy {
    /// A source of so many random bytes.
    ///
    /// # Errors
    /// Its thread could not be started.
    pub fn new(limits: RngLimits) -> io::Result<Self> {
        Ok(Self {
            limiter: SharedLimiter::new(limits.bw, limits.ops),
            thread: DeviceThread::spawn("ebb-rng", Role::Rng)?,
            counters: Arc::default(),
            faults: Arc::new(GuestFaults::new("rng")),
            worker: None,
        })
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<RngCounters> {
        &self.counters
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// There is no configuration.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut queues = activation.queues.into_iter();
        let handle = queues.next().flatten();
        let handle = handle.ok_or(ActivationError::MissingQueue(0))?;
        let context = Context {
            memory: activation.memory,
            counters: Arc::clone(&self.counters),
            faults: Arc::clone(&self.faults),
            limiter: self.limiter.clone(),
            interrupt: activation.interrupt,
        };
        let worker = RngWorker::new(context, ServedQueue::new(0, handle), QUEUE_SIZE);
        let worker = self.thread.start(worker);
        self.worker = Some(worker.map_err(ActivationError::Worker)?);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }

    fn save(&self) -> Option<Value> {
        Some(Value::Null)
    }

    fn reset(&mut self) {
        // Waits for the thread.
        self.worker = None;
    }
}
