//! Frees the guest's memory with threads of this process.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebb_core::range::GpaRange;

use super::Plan;
use super::queue::{BatchQueue, bind_to_one_of};
use super::reaper::Batch;
use crate::memory::{GuestRam, MemoryError};
use crate::sys::nodes::{self, Node, nodes_at};
use crate::workers::share;

/// What a teardown did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes returned to the host.
    pub bytes: u64,
    /// Threads that took part.
    pub workers: usize,
    /// Batches that the kernel refused to free. Their memory is freed with the address space.
    pub failures: u64,
    /// Time until memory was free and everything else was released.
    pub duration: Duration,
}

impl Report {
    /// Logs it.
    pub fn log(&self) {
        let seconds = self.duration.as_secs_f64().max(1e-9);
        #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
        let rate = self.bytes as f64 / f64::from(1 << 30) / seconds;
        tracing::info!(
            "teardown: freed {} bytes in {:.3} ms with {} workers, {rate:.2} GiB/s",
            self.bytes,
            seconds * 1e3,
            self.workers,
        );
        if self.failures > 0 {
            let failures = self.failures;
            tracing::warn!(
                "teardown: the kernel refused {failures} batches; they were freed with the address space"
            );
        }
    }
}

/// Frees all batches of `plan` with up to `workers` threads, the calling one among them, which runs `meanwhile` first:
/// the release of what else the machine holds. Closing KVM's descriptors takes long by itself, and takes less
/// time while the others free memory than before or after that.
///
/// Nobody may need the memory any more: the vCPUs are stopped. `ram` stays mapped.
pub fn execute(plan: &Plan, workers: usize, ram: &GuestRam, meanwhile: impl FnOnce()) -> Report {
    let start = Instant::now();
    let workers = workers.min(plan.max_workers());
    let free = |range| ram.free_range(range);
    let mut freeing = Freeing::new(plan.batches(), free);
    freeing.find_nodes(nodes::all(), ram);
    let mut report = freeing.run(workers, meanwhile);
    report.duration = start.elapsed();
    report
}

/// Batches that are being freed by `free`.
struct Freeing<'a, F> {
    batches: &'a [GpaRange],
    queue: BatchQueue,
    /// Those that workers are bound to.
    nodes: &'a [Node],
    /// Workers that have come for work.
    workers: AtomicUsize,
    bytes: AtomicU64,
    failures: AtomicU64,
    free: F,
}

impl<'a, F: Fn(GpaRange) -> Result<u64, MemoryError> + Sync> Freeing<'a, F> {
    fn new(batches: &'a [GpaRange], free: F) -> Self {
        Self {
            batches,
            queue: BatchQueue::new(batches.len(), 1),
            nodes: &[],
            workers: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            free,
        }
    }

    /// Each worker will begin with the batches on its own one of `nodes`.
    fn find_nodes(&mut self, nodes: &'a [Node], ram: &GuestRam) {
        self.nodes = nodes;
        self.queue = BatchQueue::new(self.batches.len(), nodes.len());
        let batch = |index: usize| Batch::new(ram, *self.batches.get(index)?);
        let place = |index| batch(index).as_ref().map_or((0, 0), Batch::place);
        self.queue.locate(place, |pages| nodes_at(nodes, pages));
    }

    fn run(&self, workers: usize, meanwhile: impl FnOnce()) -> Report {
        let caller = thread::current().id();
        let work = || {
            let seat = self.workers.fetch_add(1, Ordering::Relaxed);
            if thread::current().id() != caller {
                bind_to_one_of(self.nodes, seat);
            }
            let free = |batch: &GpaRange| self.free(*batch);
            self.queue.work(self.batches, seat, || true, free)
        };
        let shared = share(workers, "free", meanwhile, work);
        // The batch of a worker that panicked is freed with the mapping.
        let failures = self.failures.load(Ordering::Relaxed) + shared.panicked as u64;
        Report {
            bytes: self.bytes.load(Ordering::Relaxed),
            workers: shared.workers,
            failures,
            duration: Duration::ZERO,
        }
    }

    fn free(&self, batch: GpaRange) {
        match (self.free)(batch) {
            Ok(bytes) => {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(error) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    %error,
                    "the kernel refused a batch; it is freed with the address space"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;
    use crate::memory::Backing;
    use crate::teardown::{PageSize, Region, plan};

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * MIB, end * MIB).unwrap()
    }

    fn touched(layout: &[GpaRange], backing: Backing) -> GuestRam {
        let ram = GuestRam::allocate(backing, layout).unwrap();
        assert!(ram.populate_unless(|_| false).unwrap());
        ram
    }

    /// Batches of 16 MiB, or of a file.
    fn planned(ram: &GuestRam) -> Plan {
        let regions = ram.regions().iter().map(|region| Region {
            range: region.gpa,
            page_size: PageSize::Small,
            unit: region.file.unwrap_or(2 * MIB),
        });
        plan(regions, Some(16 * MIB))
    }

    #[test]
    fn workers_free_everything_while_the_caller_does_something_else() {
        for (thp, shared, end) in [
            (false, false, 112),
            (true, false, 112),
            // Two files, and more than one.
            (false, true, 288),
        ] {
            let backing = Backing {
                thp,
                shared,
                ..Backing::default()
            };
            let ram = touched(&[range(0, 48), range(64, end)], backing);
            let bytes = (end - 16) * MIB;
            assert_eq!(ram.resident(), bytes);
            let mut name = None;
            let plan = planned(&ram);
            let report = execute(&plan, 2, &ram, || name = thread::current().id().into());
            assert_eq!(name, Some(thread::current().id()));
            let found = (report.bytes, report.workers, report.failures);
            assert_eq!(found, (bytes, 2, 0));
            assert_eq!(ram.resident(), 0, "{backing:?}");
        }
    }

    #[test]
    fn a_small_machine_is_freed_by_the_caller() {
        let ram = touched(&[range(0, 16)], Backing::default());
        let report = execute(&planned(&ram), 8, &ram, || {});
        assert_eq!((report.bytes, report.workers), (16 * MIB, 1));
        assert_eq!(ram.resident(), 0);
    }

    #[test]
    fn each_batch_is_freed_once_and_failures_are_counted() {
        let batches: Vec<_> = (0..500).map(|batch| range(batch, batch + 1)).collect();
        let freed = Mutex::new(BTreeSet::new());
        let freeing = Freeing::new(&batches, |range| {
            assert!(freed.lock().unwrap().insert(range), "{range:?} twice");
            let error = MemoryError::NotRam { start: 0, end: 0 };
            (range.start() % (10 * MIB) != 0)
                .then_some(range.len())
                .ok_or(error)
        });
        let report = freeing.run(4, || {});
        assert_eq!((report.workers, report.failures), (4, 50));
        assert_eq!(report.bytes, 450 * MIB);
        assert_eq!(freed.lock().unwrap().len(), 500);
    }

    #[test]
    fn a_worker_that_panics_leaves_the_rest_to_the_caller() {
        let batches: Vec<_> = (0..50).map(|batch| range(batch, batch + 1)).collect();
        let freeing = Freeing::new(&batches, |range| {
            let worker = thread::current().name() == Some("ebb-free1");
            assert!(!worker, "on purpose");
            Ok(range.len())
        });
        // The worker has its batch before the caller begins.
        let taken = || while freeing.queue.left() == 50 {};
        let report = freeing.run(2, taken);
        assert_eq!((report.failures, report.bytes), (1, 49 * MIB));
    }
}
