//! Free pages that the guest reports, and may write to as soon as it has been answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_core::lazy::LazyMemory;
use ebb_core::range::GpaRange;

use crate::memory::GuestRam;

/// When the host gets reported pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Before the guest is answered.
    AtOnce,
    /// When it is short of memory, unless the guest has written to them by then.
    WhenNeeded,
}

/// Counters since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedStats {
    /// `madvise` calls: one for each range, merged across the messages that were there.
    pub calls_total: u64,
    /// Calls that failed: those pages stay as they are, which is legal.
    pub failures_total: u64,
    /// Bytes returned to the host at once.
    pub discarded_bytes_total: u64,
    /// Bytes that the host was allowed to take; how many it took, and how many the guest wrote to first, only the
    /// kernel knows.
    pub marked_bytes_total: u64,
}

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    failures: AtomicU64,
    discarded: AtomicU64,
    marked: AtomicU64,
}

/// Takes reported memory. There is no reuse message for it, so it is never tracked: what is not done with it before
/// [`ReportedMemory::take`] returns can be done by the kernel only, which sees the guest's writes.
pub struct ReportedMemory {
    lazy: Arc<LazyMemory>,
    ram: Arc<GuestRam>,
    release: Release,
    counters: Counters,
}

impl ReportedMemory {
    /// Takes memory of `ram`; what of it is lazily free in `lazy` ceases to be.
    #[must_use]
    pub fn new(lazy: Arc<LazyMemory>, ram: Arc<GuestRam>, release: Release) -> Self {
        let release = if ram.can_free_lazily() {
            release
        } else {
            Release::AtOnce
        };
        Self {
            lazy,
            ram,
            release,
            counters: Counters::default(),
        }
    }

    /// When the host gets the pages: [`Release::AtOnce`] for backing that cannot be marked, whatever was asked for.
    #[must_use]
    pub const fn release(&self) -> Release {
        self.release
    }

    /// Takes `ranges`, for which the guest has no use. They may be written to when this returns.
    pub fn take(&self, ranges: &[GpaRange]) {
        // A guest that reports what it has freed lazily may write to it without a reuse from here on.
        self.lazy.reuse(ranges);
        for &range in ranges {
            self.take_range(range);
        }
    }

    fn take_range(&self, range: GpaRange) {
        add(&self.counters.calls, 1);
        let (result, done) = match self.release {
            Release::WhenNeeded => (self.ram.mark_free(range), &self.counters.marked),
            Release::AtOnce => (self.ram.discard(range), &self.counters.discarded),
        };
        match result {
            Ok(bytes) => add(done, bytes),
            Err(error) => {
                add(&self.counters.failures, 1);
                tracing::debug!(%error, "a reported range stays as it is");
            }
        }
    }

    /// The counters; each is right, together they may be of slightly different moments.
    #[must_use]
    pub fn snapshot(&self) -> ReportedStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ReportedStats {
            calls_total: read(&self.counters.calls),
            failures_total: read(&self.counters.failures),
            discarded_bytes_total: read(&self.counters.discarded),
            marked_bytes_total: read(&self.counters.marked),
        }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use ebb_core::generation::VmGeneration;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Backing;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * MIB, end * MIB).unwrap()
    }

    fn reported(release: Release) -> ReportedMemory {
        let ram = GuestRam::allocate(Backing::default(), &[range(0, 16)]).unwrap();
        let lazy = LazyMemory::new(100, Arc::new(VmGeneration::default()));
        ReportedMemory::new(Arc::new(lazy), Arc::new(ram), release)
    }

    fn put(reported: &ReportedMemory, mib: u64, byte: u8) {
        let memory = reported.ram.memory();
        memory.write_obj(byte, GuestAddress(mib * MIB)).unwrap();
    }

    fn get(reported: &ReportedMemory, mib: u64) -> u8 {
        let memory = reported.ram.memory();
        memory.read_obj(GuestAddress(mib * MIB)).unwrap()
    }

    #[test]
    fn at_once_is_gone_when_the_guest_is_answered() {
        let reported = reported(Release::AtOnce);
        (0..16).for_each(|mib| put(&reported, mib, 7));
        reported.take(&[range(2, 4), range(8, 9)]);
        let zero: Vec<_> = (0..16).filter(|&mib| get(&reported, mib) == 0).collect();
        assert_eq!(zero, [2, 3, 8]);
        let expected = ReportedStats {
            calls_total: 2,
            discarded_bytes_total: 3 * MIB,
            ..ReportedStats::default()
        };
        assert_eq!(reported.snapshot(), expected);
    }

    #[test]
    fn what_is_written_after_the_answer_is_kept() {
        for release in [Release::AtOnce, Release::WhenNeeded] {
            let reported = reported(release);
            put(&reported, 2, 7);
            reported.take(&[range(2, 4)]);
            put(&reported, 2, 8);
            put(&reported, 3, 9);
            assert_eq!(
                (get(&reported, 2), get(&reported, 3)),
                (8, 9),
                "{release:?}"
            );
            assert_eq!(reported.release(), release);
        }
    }

    #[test]
    fn a_report_of_lazily_free_memory_takes_it_out_of_the_tracker() {
        for release in [Release::AtOnce, Release::WhenNeeded] {
            let reported = reported(release);
            reported.lazy.free(&[range(2, 6)]);
            reported.take(&[range(3, 4), range(5, 8)]);
            let stats = reported.lazy.snapshot();
            assert_eq!((stats.lazy_bytes, stats.ranges), (2 * MIB, 2));
            // The balloon's deflate of the same pages is nothing new then.
            reported.lazy.reuse(&[range(2, 6)]);
            assert_eq!(reported.lazy.snapshot().lazy_bytes, 0);
        }
    }

    #[test]
    fn what_the_host_refuses_stays_and_changes_nothing_else() {
        for release in [Release::AtOnce, Release::WhenNeeded] {
            let reported = reported(release);
            (0..16).for_each(|mib| put(&reported, mib, 7));
            reported.ram.lock(range(3, 4));
            // Locked memory is refused with EINVAL, what is no RAM by ourselves.
            reported.take(&[range(3, 4), range(15, 17), range(5, 6)]);
            assert_eq!(reported.snapshot().failures_total, 2);
            let done = reported.snapshot();
            assert_eq!(done.discarded_bytes_total + done.marked_bytes_total, MIB);
            assert_eq!(reported.release(), release);
            assert_eq!((get(&reported, 3), get(&reported, 15)), (7, 7));
        }
    }
}
