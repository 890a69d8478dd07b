//! Frees the guest's memory.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use super::Plan;
use crate::memory::{GpaRange, GuestRam, MemoryError};

/// What a teardown did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes returned to the host.
    pub bytes: u64,
    /// Threads that took part; 0: the caller alone.
    pub workers: usize,
    /// Batches that the kernel would not free; they go with the mapping.
    pub failures: u64,
    /// Time until memory was free and `beside` had returned.
    pub duration: Duration,
}

/// Frees all batches of `plan` and runs `beside` at the same time on the calling thread: the release of
/// what else the machine holds. Closing KVM's descriptors takes long by itself, and is cheaper beside the
/// workers than before or after them.
///
/// Nobody may need the memory any more: the vCPUs are stopped. Each batch is freed once. Workers that
/// cannot be started are done without; the caller frees what is left when `beside` has returned. The
/// mapping itself goes when `ram` is dropped.
pub fn execute(plan: &Plan, ram: &GuestRam, beside: impl FnOnce()) -> Report {
    let start = Instant::now();
    let freeing = Freeing::new(plan.batches(), |range| ram.discard(range));
    let spawn_limit = plan.workers();
    let workers = run(&freeing, spawn_limit, beside);
    Report {
        bytes: freeing.bytes.into_inner(),
        workers,
        failures: freeing.failures.into_inner(),
        duration: start.elapsed(),
    }
}

/// Starts up to `workers` threads, runs `beside`, helps, and returns how many threads there were.
fn run<F>(freeing: &Freeing<'_, F>, workers: usize, beside: impl FnOnce()) -> usize
where
    F: Fn(GpaRange) -> Result<u64, MemoryError> + Sync,
{
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for index in 0..workers {
            let worker = Builder::new().name(format!("ebb-free{index}"));
            match worker.spawn_scoped(scope, || freeing.work()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    tracing::warn!(%error, started = index, wanted = workers, "fewer workers");
                    break;
                }
            }
        }
        beside();
        if threads.is_empty() {
            freeing.work();
        }
        let started = threads.len();
        let panicked = threads
            .into_iter()
            .filter_map(|thread| thread.join().err())
            .count();
        if panicked > 0 {
            // The batch that it was at goes with the mapping; the others are taken here.
            tracing::error!(panicked, "workers that free memory have panicked");
            freeing
                .failures
                .fetch_add(panicked as u64, Ordering::Relaxed);
            freeing.work();
        }
        started
    })
}

/// Batches that are being freed. A batch belongs to whoever has drawn its index.
struct Freeing<'a, F> {
    batches: &'a [GpaRange],
    next: AtomicUsize,
    bytes: AtomicU64,
    failures: AtomicU64,
    free: F,
}

impl<'a, F: Fn(GpaRange) -> Result<u64, MemoryError>> Freeing<'a, F> {
    fn new(batches: &'a [GpaRange], free: F) -> Self {
        Self {
            batches,
            next: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            free,
        }
    }

    /// Frees batches until none is left.
    fn work(&self) {
        while let Some(&batch) = self.batches.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            match (self.free)(batch) {
                Ok(bytes) => {
                    self.bytes.fetch_add(bytes, Ordering::Relaxed);
                }
                Err(error) => {
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%error, "a batch is freed by unmapping only");
                }
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
    use crate::teardown::{Tuning, plan};

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * MIB, end * MIB).unwrap()
    }

    fn touched(layout: &[GpaRange]) -> GuestRam {
        let backing = Backing {
            prefault: true,
            ..Backing::default()
        };
        GuestRam::allocate(backing, layout).unwrap()
    }

    fn tuning(workers: usize, batch: u64) -> Tuning {
        Tuning {
            workers,
            batch: batch * MIB,
        }
    }

    fn regions(ram: &GuestRam) -> impl Iterator<Item = GpaRange> {
        ram.regions().iter().map(|region| region.gpa)
    }

    #[test]
    fn workers_free_everything_beside_the_caller() {
        let ram = touched(&[range(0, 48), range(64, 112)]);
        assert_eq!(ram.resident(), 96 * MIB);
        let plan = plan(regions(&ram), tuning(2, 16));
        let mut name = None;
        let report = execute(&plan, &ram, || name = thread::current().id().into());
        assert_eq!(name, Some(thread::current().id()));
        assert_eq!(
            (report.bytes, report.workers, report.failures),
            (96 * MIB, 2, 0)
        );
        assert_eq!(ram.resident(), 0);
    }

    #[test]
    fn a_small_machine_is_freed_by_the_caller() {
        let ram = touched(&[range(0, 16)]);
        let plan = plan(regions(&ram), Tuning::default());
        let report = execute(&plan, &ram, || {});
        assert_eq!((report.bytes, report.workers), (16 * MIB, 0));
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
        assert_eq!(run(&freeing, 4, || {}), 4);
        assert_eq!(freeing.failures.load(Ordering::Relaxed), 50);
        assert_eq!(freeing.bytes.load(Ordering::Relaxed), 450 * MIB);
        assert_eq!(freed.lock().unwrap().len(), 500);
    }

    #[test]
    fn a_worker_that_panics_leaves_the_rest_to_the_caller() {
        let batches: Vec<_> = (0..50).map(|batch| range(batch, batch + 1)).collect();
        let freeing = Freeing::new(&batches, |range| {
            let worker = thread::current()
                .name()
                .is_some_and(|name| name == "ebb-free0");
            assert!(!worker, "on purpose");
            Ok(range.len())
        });
        assert_eq!(run(&freeing, 1, || {}), 1);
        assert_eq!(freeing.failures.load(Ordering::Relaxed), 1);
        assert_eq!(freeing.bytes.load(Ordering::Relaxed), 49 * MIB);
    }
}
