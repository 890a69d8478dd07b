//! virtio-vsock (virtio 1.3, 5.10): streams between programs of the guest and unix sockets of the host, with Firecracker's
//! conventions.
//!
//! A program of the host connects to the device's socket and sends `CONNECT port\n`. Once a program of the guest has accepted
//! that, it gets `OK n\n`, and the stream begins. A program of the guest that connects to a port of CID 2 gets to the server at
//! the path of the device's socket with `_` and the port behind it.
//!
//! Nothing of what goes to the guest is kept here, and of what comes from it no more than it was given credit for.

mod connection;
mod connections;
mod flow;
mod greeting;
mod socket;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{DeviceThread, GuestFaults, ServedQueue, Worker};
use super::{Activation, ActivationError, QueueHandle, VirtioDevice};
use crate::config::VsockConfig;
use crate::devices::state::from_value;
use crate::sys::process::raise_descriptor_limit;
use crate::sys::seccomp::Role;
use wire::DEVICE_TYPE;
use worker::{Context, Peer, VsockWorker};

pub use socket::{VsockError, VsockSocket};
pub use worker::{VsockCounters, VsockStats};

/// Entries of the two queues for packets.
const QUEUE_SIZE: u16 = 256;

/// Entries of the queue for events.
const EVENT_QUEUE_SIZE: u16 = 16;

/// The most connections at a time, where the process may have as many descriptors.
const MOST_CONNECTIONS: u64 = 1024;

/// Descriptors that are left for the rest of the monitor.
const OTHER_DESCRIPTORS: u64 = 512;

/// A vsock.
pub struct Vsock {
    peer: Arc<Peer>,
    listener: Arc<UnixListener>,
    worker: Option<Worker>,
    thread: DeviceThread,
    /// The driver has connections of a machine that was saved, and is to hear that they are gone.
    is_restored: bool,
}

impl Vsock {
    /// A vsock whose clients of the host come to `socket`.
    ///
    /// # Errors
    /// Its thread could not be started.
    pub fn new(config: &VsockConfig, socket: &VsockSocket) -> io::Result<Self> {
        let limit = raise_descriptor_limit(MOST_CONNECTIONS + OTHER_DESCRIPTORS);
        let most = limit.saturating_sub(OTHER_DESCRIPTORS);
        Self::with_most(
            config.cid,
            &config.path,
            socket,
            most.clamp(16, MOST_CONNECTIONS),
        )
    }

    fn with_most(cid: u32, path: &Path, socket: &VsockSocket, most: u64) -> io::Result<Self> {
        Ok(Self {
            thread: DeviceThread::spawn("ebb-vsock", Role::Vsock)?,
            peer: Arc::new(Peer {
                cid: cid.into(),
                // The monitor's folder may change.
                path: std::path::absolute(path)?,
                most_connections: most as usize,
                next_port: AtomicU32::new(0),
                counters: Arc::default(),
                faults: GuestFaults::new("vsock"),
            }),
            listener: socket.listener(),
            worker: None,
            is_restored: false,
        })
    }

    /// The device's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<VsockCounters> {
        &self.peer.counters
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// To the guest, from the guest, and events.
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.peer.cid.to_le_bytes();
        let tail = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut queues = activation.queues.into_iter().flatten();
        let mut next = |index| {
            let handle: QueueHandle = queues.next().ok_or(ActivationError::MissingQueue(index))?;
            Ok(ServedQueue::new(index, handle))
        };
        let queues = [next(0)?, next(1)?, next(2)?];
        let context = Context {
            memory: activation.memory,
            interrupt: activation.interrupt,
            peer: Arc::clone(&self.peer),
            is_restored: std::mem::take(&mut self.is_restored),
        };
        let worker = VsockWorker::new(context, queues, Arc::clone(&self.listener));
        let worker = self.thread.start(worker);
        self.worker = Some(worker.map_err(ActivationError::Worker)?);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        self.worker.as_slice()
    }

    /// The host's next port: a new connection must not be taken for one that the driver has not given up yet. Connections
    /// are not kept.
    fn save(&self) -> Option<Value> {
        Some(self.peer.next_port.load(Ordering::Relaxed).into())
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let next_port = from_value(state)?;
        self.peer.next_port.store(next_port, Ordering::Relaxed);
        self.is_restored = true;
        Ok(())
    }

    /// Closes all connections.
    fn reset(&mut self) {
        self.is_restored = false;
        // Waits for the thread.
        self.worker = None;
    }
}
