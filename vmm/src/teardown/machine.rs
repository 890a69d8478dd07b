//! How one machine's memory is freed at its end, and by whom.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use ebb_core::range::BLOCK_SIZE;

use super::plan::{MAX_WORKERS, default_workers};
use super::{Job, PageSize, Plan, Reaper, Region, StatusPage, execute, plan};
use crate::kvm::RunPages;
use crate::memory::GuestRam;
use crate::sys::{self, nodes};

/// How a machine's memory is freed at its end. While the machine runs, the reaper has a [`Job`] that is always up to
/// date, so that memory is freed fast even if the monitor is killed.
pub struct Teardown {
    /// Holds the number of workers, which may still change while memory is being freed.
    status: &'static StatusPage,
    /// Frees the memory after the monitor's end; without it the monitor does so before its end.
    reaper: Option<&'static Reaper>,
    ram: Arc<GuestRam>,
    page_size: PageSize,
    run_pages: Arc<RunPages>,
    /// Bytes that a worker takes at a time; `None`: the default for the page size.
    batch: Mutex<Option<u64>>,
}

/// A setting that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TuneError {
    /// That many workers cannot be.
    #[error("workers is {0}, but there can be 1 to {MAX_WORKERS}")]
    Workers(usize),
    /// A batch of no bytes.
    #[error("the batch is 0, but it must be 2 MiB or more")]
    Batch,
}

/// How memory will be freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TeardownTuning {
    /// Threads that free memory at the same time.
    pub workers: usize,
    /// Bytes that one takes at a time.
    pub batch: u64,
}

impl Teardown {
    /// From now on `ram` is freed fast even if the monitor is killed. `run_pages` is where the threads of the vCPUs
    /// register what they have mapped.
    pub fn new(
        status: &'static StatusPage,
        reaper: Option<&'static Reaper>,
        ram: Arc<GuestRam>,
        page_size: PageSize,
        run_pages: Arc<RunPages>,
    ) -> Self {
        let cores = available_parallelism().map_or(1, std::num::NonZero::get);
        status.set_workers(default_workers(cores, nodes::all().len()));
        let teardown = Self {
            status,
            reaper,
            ram,
            page_size,
            run_pages,
            batch: Mutex::new(None),
        };
        teardown.set_job(&teardown.plan(None));
        teardown
    }

    /// Where the threads of the vCPUs register their pages.
    pub const fn run_pages(&self) -> &Arc<RunPages> {
        &self.run_pages
    }

    /// The page that is shared with the reaper and the guardian.
    pub const fn status(&self) -> &'static StatusPage {
        self.status
    }

    /// Returns true if memory is freed after the monitor's end, also if that is violent.
    pub const fn has_reaper(&self) -> bool {
        self.reaper.is_some()
    }

    /// The settings in force.
    pub fn tuning(&self) -> TeardownTuning {
        // Locked, so that both are of one request.
        let batch = self.batch();
        TeardownTuning {
            workers: self.status.workers(),
            batch: batch.unwrap_or(self.page_size.default_batch()),
        }
    }

    /// Changes the settings that are given. The workers obey at once, even while memory is being freed.
    ///
    /// # Errors
    /// [`TuneError`]; nothing has changed then.
    pub fn tune(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), TuneError> {
        if let Some(workers) = workers.filter(|it| !(1..=MAX_WORKERS).contains(it)) {
            return Err(TuneError::Workers(workers));
        }
        if batch == Some(0) {
            return Err(TuneError::Batch);
        }
        // Locked until the reaper has the job, so that the later of two requests wins as a whole.
        let mut current = self.batch();
        if let Some(workers) = workers {
            self.status.set_workers(workers);
        }
        if batch.is_some() {
            *current = batch;
            self.set_job(&self.plan(batch));
        }
        Ok(())
    }

    /// Frees the memory, or leaves that to the reaper, and then returns at once. `others` is what the machine still holds and
    /// what takes long to close: KVM releases its own page tables serially, and the kernel waits before it removes a trigger of
    /// memory pressure. The guardian, which shares these descriptors, closes them when the monitor is dead. Without helpers they
    /// are closed while memory is being freed.
    ///
    /// No thread may need the memory or KVM any more. Returns true if the memory is free now.
    pub fn free<T>(&self, others: T) -> bool {
        self.ram.stop_serving();
        let plan = self.plan(*self.batch());
        let workers = self.status.workers().min(plan.max_workers());
        if workers > 1 && self.reaper.is_some_and(Reaper::is_alive) {
            mem::forget(others);
            return false;
        }
        let mut others = Some(others);
        if let Some(reaper) = self.reaper {
            reaper.clear_job();
            mem::forget(others.take());
        }
        let before = sys::resident_bytes();
        let mut report = execute(&plan, workers, &self.ram, || drop(others));
        let freed = before.zip(sys::resident_bytes());
        report.bytes = freed.map_or(report.bytes, |(a, b)| a.saturating_sub(b));
        report.log();
        true
    }

    fn batch(&self) -> MutexGuard<'_, Option<u64>> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_job(&self, plan: &Plan) {
        if let Some(reaper) = self.reaper {
            let (ram, run_pages) = (Arc::clone(&self.ram), Arc::clone(&self.run_pages));
            reaper.set_job(Job::new(plan, ram, run_pages));
        }
    }

    fn plan(&self, batch: Option<u64>) -> Plan {
        plan(self.regions(), batch)
    }

    fn regions(&self) -> impl Iterator<Item = Region> {
        self.ram.regions().iter().map(|region| Region {
            range: region.gpa,
            page_size: self.page_size,
            unit: region.file.unwrap_or(BLOCK_SIZE),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use ebb_core::range::GpaRange;

    use super::*;
    use crate::memory::Backing;
    use crate::teardown::reaper::tests::after;

    const MIB: u64 = 1 << 20;

    /// 32 MiB, all of it touched.
    fn touched() -> Arc<GuestRam> {
        let range = GpaRange::new(0, 32 * MIB).unwrap();
        let ram = GuestRam::allocate(Backing::default(), &[range]).unwrap();
        ram.populate(range).unwrap();
        Arc::new(ram)
    }

    fn teardown(
        status: &'static StatusPage,
        reaper: Option<&'static Reaper>,
        ram: &Arc<GuestRam>,
    ) -> Teardown {
        let pages = Arc::new(RunPages::new(0, 4096));
        Teardown::new(status, reaper, Arc::clone(ram), PageSize::Small, pages)
    }

    fn status() -> &'static StatusPage {
        Box::leak(Box::default())
    }

    /// Sets a cell when it is dropped.
    struct Closed<'a>(&'a Cell<bool>);

    impl Drop for Closed<'_> {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }

    #[test]
    fn settings_are_changed_one_by_one_or_not_at_all() {
        let teardown = teardown(status(), None, &touched());
        assert!(!teardown.has_reaper());
        let cores = available_parallelism().unwrap().get();
        let mut expected = TeardownTuning {
            workers: default_workers(cores, nodes::all().len()),
            batch: 256 * MIB,
        };
        assert_eq!(teardown.tuning(), expected);
        for (workers, error) in [(0, TuneError::Workers(0)), (65, TuneError::Workers(65))] {
            assert_eq!(teardown.tune(Some(workers), Some(MIB)), Err(error));
        }
        assert_eq!(teardown.tune(Some(3), Some(0)), Err(TuneError::Batch));
        assert_eq!(teardown.tuning(), expected);
        for workers in [1, 64, 3] {
            teardown.tune(Some(workers), None).unwrap();
            expected.workers = workers;
            assert_eq!(teardown.tuning(), expected);
        }
        teardown.tune(None, Some(4 * MIB)).unwrap();
        expected.batch = 4 * MIB;
        assert_eq!(teardown.tuning(), expected);
        teardown.tune(None, None).unwrap();
        assert_eq!(teardown.tuning(), expected);
        assert_eq!(teardown.plan(*teardown.batch()).batches().len(), 8);
    }

    #[test]
    fn its_page_is_the_one_that_the_helpers_share() {
        let status = status();
        let teardown = teardown(status, None, &touched());
        assert!(std::ptr::eq(teardown.status(), status));
    }

    #[test]
    fn without_a_reaper_the_monitor_frees_the_memory() {
        let (ram, closed) = (touched(), Cell::new(false));
        teardown(status(), None, &ram).free(Closed(&closed));
        assert_eq!((ram.resident(), closed.get()), (0, true));
    }

    #[test]
    fn little_memory_is_not_left_to_the_reaper() {
        let status = after(|reaper, status| {
            let (ram, closed) = (touched(), Cell::new(false));
            let teardown = teardown(status, Some(reaper), &ram);
            assert_eq!(status.progress().1, 32 * MIB, "in case of a kill");
            teardown.free(Closed(&closed));
            // To close them would only delay the end.
            assert_eq!((ram.resident(), closed.get()), (0, false));
            status.set_finished();
        });
        assert!(status.is_finished() && !status.has_begun());
    }

    #[test]
    fn the_reaper_has_the_job_and_the_descriptors() {
        let status = after(|reaper, status| {
            let (ram, closed) = (touched(), Cell::new(false));
            let teardown = teardown(status, Some(reaper), &ram);
            assert!(teardown.has_reaper());
            teardown.tune(Some(3), Some(4 * MIB)).unwrap();
            teardown.free(Closed(&closed));
            assert_eq!((ram.resident(), closed.get()), (32 * MIB, false));
            status.set_finished();
        });
        let report = status.report().unwrap();
        assert!(
            status.is_finished() && report.bytes >= 28 * MIB,
            "{report:?}"
        );
        assert_eq!((report.workers, report.failures), (3, 0));
        assert_eq!(status.progress(), (32 * MIB, 32 * MIB));
    }

    /// The memory is freed in the batches of the last request even if the monitor is killed.
    #[test]
    fn the_job_of_a_killed_monitor_is_up_to_date() {
        let status = after(|reaper, status| {
            let teardown = teardown(status, Some(reaper), &touched());
            teardown.tune(Some(64), Some(2 * MIB)).unwrap();
            teardown.tune(Some(5), None).unwrap();
            mem::forget(teardown);
        });
        assert_eq!(status.report().unwrap().workers, 5);
    }

    #[test]
    fn of_two_requests_one_wins_as_a_whole() {
        const REQUESTS: [(usize, u64); 2] = [(2, 2 * MIB), (3, 4 * MIB)];
        let teardown = teardown(status(), None, &touched());
        for _ in 0..200 {
            std::thread::scope(|scope| {
                for (workers, batch) in REQUESTS {
                    let teardown = &teardown;
                    scope.spawn(move || teardown.tune(Some(workers), Some(batch)).unwrap());
                }
            });
            let TeardownTuning { workers, batch } = teardown.tuning();
            assert!(REQUESTS.contains(&(workers, batch)), "{workers} {batch}");
        }
    }
}
