//! virtio-balloon (virtio 1.3, 5.5) whose pages are freed lazily.
//!
//! With `VIRTIO_BALLOON_F_MUST_TELL_HOST` a driver does not use a page again before its deflate message is returned.
//! So an inflate is only recorded, and the host takes the pages when it needs them. The order matters: pages are
//! given to the [`RangeSink`] before the inflate message is returned, and taken from it before the deflate message is.
//!
//! The reuse of free pages that the driver reports by itself is not announced. They are given to the sink before the report
//! is returned, and the sink must have finished with them by then.

mod handle;
mod reporting;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::io;
use std::sync::Arc;

use serde_json::Value;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{DeviceThread, ServedQueue, Worker};
use super::{Activation, ActivationError, QueueHandle, VirtioDevice};
use crate::config::BalloonConfig;
use crate::devices::state::{from_value, to_value};
use crate::guest_memory::RangeSink;
use crate::sys::seccomp::Role;
use handle::Shared;
use reporting::ReportWorker;
use wire::{
    DEVICE_TYPE, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, F_PAGE_POISON, F_REPORTING, F_STATS_VQ,
};
use worker::{BalloonWorker, Context};

pub use handle::{BalloonError, BalloonHandle, BalloonStatus, ReportStats};
pub use wire::Statistics;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;

/// Number of the reporting queue in virtio 1.3, 5.5.2, whatever other queues there are.
const REPORTING_QUEUE: usize = 4;

/// The balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
    sink: Arc<dyn RangeSink>,
    queue_sizes: &'static [u16],
    workers: Vec<Worker>,
    /// For pages and statistics.
    pages: DeviceThread,
    /// For reports, if the driver may make any: a report may take long, and no deflate must wait for it.
    reports: Option<DeviceThread>,
}

impl Balloon {
    /// A balloon that passes ranges of pages to `sink`.
    ///
    /// # Errors
    /// [`BalloonError`] for a size that is not a whole number of pages or too large, or when the event or a thread cannot be made.
    pub fn new(config: &BalloonConfig, sink: Arc<dyn RangeSink>) -> Result<Self, BalloonError> {
        let mut features =
            1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | F_MUST_TELL_HOST;
        if config.deflate_on_oom {
            features |= F_DEFLATE_ON_OOM;
        }
        let mut queue_sizes: &[u16] = &[QUEUE_SIZE; 2];
        if config.statistics_interval_s > 0 {
            features |= F_STATS_VQ;
            queue_sizes = &[QUEUE_SIZE; 3];
        }
        if config.free_page_reporting.is_some() {
            features |= F_REPORTING | F_PAGE_POISON;
            queue_sizes = &[QUEUE_SIZE; REPORTING_QUEUE + 1];
        }
        let failed = |error: io::Error| BalloonError::Thread(error.to_string());
        let wake = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        let spawn = |name| DeviceThread::spawn(name, Role::Balloon).map_err(failed);
        let reporting = config.free_page_reporting;
        let reports = reporting.map(|_| spawn("ebb-report")).transpose()?;
        let shared = Shared::new(features, config.statistics_interval_s, wake);
        let balloon = Self {
            shared: Arc::new(shared),
            sink,
            queue_sizes,
            workers: Vec::new(),
            pages: spawn("ebb-balloon")?,
            reports,
        };
        balloon.handle().set_target(config.size)?;
        Ok(balloon)
    }

    /// The operator's handle of the device. It can outlive the device.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    fn start(&self, activation: Activation) -> Result<Vec<Worker>, ActivationError> {
        let features = activation.features;
        let mut queues = activation.queues;
        let inflate = take(&mut queues, 0)?;
        let deflate = take(&mut queues, 1)?;
        let statistics = match features & F_STATS_VQ {
            0 => None,
            _ => Some(take(&mut queues, 2)?),
        };
        let reporting = match features & F_REPORTING {
            0 => None,
            _ => Some(take_reporting(&mut queues, features)?),
        };
        let context = Context {
            memory: activation.memory,
            shared: Arc::clone(&self.shared),
            sink: Arc::clone(&self.sink),
            interrupt: activation.interrupt,
        };
        let must_tell_host = features & F_MUST_TELL_HOST != 0;
        let pages = BalloonWorker::new(
            context.clone(),
            must_tell_host,
            [inflate, deflate],
            statistics,
        );
        let pages = self.pages.start(pages);
        let mut workers = vec![pages.map_err(ActivationError::Worker)?];
        if let (Some(queue), Some(thread)) = (reporting, &self.reports) {
            let reports = thread.start(ReportWorker::new(context, features, queue));
            workers.push(reports.map_err(ActivationError::Worker)?);
        }
        Ok(workers)
    }
}

fn take(queues: &mut [Option<QueueHandle>], index: usize) -> Result<ServedQueue, ActivationError> {
    queues
        .get_mut(index)
        .and_then(Option::take)
        .map(|handle| ServedQueue::new(index, handle))
        .ok_or(ActivationError::MissingQueue(index))
}

/// The reporting queue. Linux (and with it every device that works) numbers the queues that are negotiated without
/// gaps; virtio 1.3 gives each a fixed number. As long as hints (queue 3) are not offered, the two cannot be
/// confused: only one of them is set up.
fn take_reporting(
    queues: &mut [Option<QueueHandle>],
    features: u64,
) -> Result<ServedQueue, ActivationError> {
    let next = if features & F_STATS_VQ == 0 { 2 } else { 3 };
    take(queues, next)
        .or_else(|_| take(queues, REPORTING_QUEUE))
        .map_err(|_| ActivationError::MissingQueue(next))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config().read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.shared
            .set_config(self.shared.config().written(offset, data));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let (features, interrupt) = (activation.features, Arc::clone(&activation.interrupt));
        self.workers = self.start(activation)?;
        self.shared.bind(features, interrupt);
        Ok(())
    }

    fn workers(&self) -> &[Worker] {
        &self.workers
    }

    fn save(&self) -> Option<Value> {
        to_value(&self.shared.save()).ok()
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        self.shared.restore(&from_value(state)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.unbind();
        // Joins the threads, so that nothing is given to the sink after its reset.
        self.workers.clear();
        self.sink.reset();
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        // The threads first: they use the guest's memory.
        self.workers.clear();
    }
}
