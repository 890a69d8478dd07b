//! virtio-blk (virtio 1.3, 5.2) on raw files and block devices.
//!
//! Each queue has a thread (`worker`), which parses requests (`request`) and has several of them carried out at a time
//! (`flight`), by io_uring or by threads ([`crate::sys::transfer`]).

mod disk;
mod error;
mod flight;
mod handle;
mod request;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{DeviceThread, ServedQueue, Worker};
use super::{Activation, ActivationError, VirtioDevice, VirtioInterrupt};
use crate::config::{DiskConfig, DiskEngine};
use crate::sys::seccomp::Role;
use crate::sys::transfer::{Kind, Transfers};
use handle::Shared;
use wire::{DEVICE_TYPE, Geometry};
use worker::BlockWorker;

pub use disk::{Disk, DiskIdentity};
pub use error::DiskError;
pub use handle::DiskHandle;
pub use worker::{DiskCounters, DiskStats};

/// Entries of a queue, and the most requests of it that are under way.
const QUEUE_SIZE: u16 = 256;

/// Maximum number of data buffers in a request: header and status take two descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// What serves one queue.
struct Server {
    thread: DeviceThread,
    transfers: Arc<Mutex<Transfers>>,
}

/// A block device.
pub struct Block {
    handle: DiskHandle,
    /// Before the threads, which they wait for.
    workers: Vec<Worker>,
    servers: Vec<Server>,
    queue_sizes: Vec<u16>,
}

impl Block {
    /// A device for `disk`, number `index` on the command line: threads and logs call it `blk` with that number.
    ///
    /// # Errors
    /// Its threads could not be started, or io_uring is asked for and cannot be had.
    pub fn new(index: usize, disk: Disk, config: &DiskConfig) -> Result<Self, DiskError> {
        let name = format!("blk{index}");
        let mut servers = Vec::new();
        for queue in 0..config.queues {
            let thread = match queue {
                0 => format!("ebb-{name}"),
                more => format!("ebb-{name}.{more}"),
            };
            let failed = |source| DiskError::Threads {
                path: config.path.clone(),
                source,
            };
            let transfers = transfers(&thread, config)?;
            servers.push(Server {
                thread: DeviceThread::spawn(&thread, Role::Block).map_err(failed)?,
                transfers: Arc::new(Mutex::new(transfers)),
            });
        }
        let kind = servers.first().map_or(Kind::Threads, Server::kind);
        let shared = Arc::new(Shared::new(name, disk, config));
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; servers.len()],
            handle: DiskHandle { shared, kind },
            workers: Vec::new(),
            servers,
        })
    }

    /// The disk's counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<DiskCounters> {
        &self.shared().counters
    }

    /// The operator's handle of it.
    #[must_use]
    pub fn handle(&self) -> DiskHandle {
        self.handle.clone()
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    fn driver(&self) -> MutexGuard<'_, Option<Arc<dyn VirtioInterrupt>>> {
        let driver = self.shared().driver.lock();
        driver.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    fn kind(&self) -> Kind {
        let transfers = self.transfers.lock();
        transfers.unwrap_or_else(PoisonError::into_inner).kind()
    }
}

/// What carries out the requests of a queue whose thread is `thread`.
fn transfers(thread: &str, config: &DiskConfig) -> Result<Transfers, DiskError> {
    let threads = || {
        let threads = Transfers::threads(QUEUE_SIZE, thread, Role::Block);
        threads.map_err(|source| DiskError::Threads {
            path: config.path.clone(),
            source,
        })
    };
    if config.engine == DiskEngine::Threads {
        return threads();
    }
    match Transfers::ring(QUEUE_SIZE) {
        Ok(ring) => Ok(ring),
        Err(error) if config.engine == DiskEngine::Auto => {
            tracing::info!("{thread}: io_uring cannot be used here ({error}); threads are");
            threads()
        }
        Err(source) => Err(DiskError::NoRing {
            path: config.path.clone(),
            source,
        }),
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        let sometimes = [
            (VIRTIO_BLK_F_RO, self.shared().disk().is_readonly()),
            (VIRTIO_BLK_F_MQ, self.servers.len() > 1),
            (VIRTIO_BLK_F_DISCARD, self.shared().discards),
            (VIRTIO_BLK_F_WRITE_ZEROES, self.shared().discards),
        ];
        let sometimes = sometimes.iter().filter(|(_, is)| *is).map(|(bit, _)| bit);
        let bits = always.iter().chain(sometimes);
        bits.fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let disk = self.shared().disk();
        let config = Geometry {
            sectors: disk.sectors(),
            seg_max: SEG_MAX,
            block: self.shared().block,
            queues: self.servers.len() as u16,
            discards: self.shared().discards,
        };
        let config = config.config();
        let tail = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let mut queues = activation.queues;
        if queues.first().is_none_or(Option::is_none) {
            return Err(ActivationError::MissingQueue(0));
        }
        queues.resize_with(self.servers.len(), || None);
        let shared = Arc::clone(self.shared());
        for ((index, handle), server) in queues.into_iter().enumerate().zip(&self.servers) {
            let Some(handle) = handle else {
                continue;
            };
            let work = BlockWorker::new(
                Arc::clone(&shared),
                Arc::clone(&activation.memory),
                Arc::clone(&activation.interrupt),
                ServedQueue::new(index, handle),
                Arc::clone(&server.transfers),
            );
            match server.thread.start(work) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.reset();
                    return Err(ActivationError::Worker(error));
                }
            }
        }
        *self.driver() = Some(activation.interrupt);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        &self.workers
    }

    fn save(&self) -> Option<Value> {
        Some(Value::Null)
    }

    fn reset(&mut self) {
        *self.driver() = None;
        // Each waits for its thread, and for the requests that are under way.
        self.workers.clear();
    }
}
