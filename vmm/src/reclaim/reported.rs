//! Releases the free pages that the guest reports, to which it may write as soon as the report is acknowledged.

use std::sync::Arc;

use ebb_core::lazy::LazyMemory;
use ebb_core::range::GpaRange;
use ebb_core::release::{Release, ReleasePages};

use crate::memory::GuestRam;

ebb_core::metrics! {
    /// What was done with memory that the guest has reported free, since the machine started.
    pub struct ReportedStats from struct Counters {
        /// Releases: one for each range, after the ranges of all messages in the queue were merged.
        calls_total: Counter,
        /// Releases that failed. Those pages stay as they are, which is legal.
        failures_total: Counter,
        /// Memory discarded before the report was acknowledged.
        discarded_bytes_total: Counter of Bytes,
        /// Memory marked free: the host may take it, unless the guest writes to it first. Only the kernel knows how much
        /// it took.
        marked_bytes_total: Counter of Bytes,
    }
}

/// Releases reported memory. No message tells when the guest uses it again, so it is never tracked: after
/// [`ReportedMemory::take`] has returned, only the kernel, which sees the guest's writes, may still take pages.
pub struct ReportedMemory {
    lazy: Arc<LazyMemory>,
    ram: Arc<GuestRam>,
    how: Release,
    counters: Counters,
}

impl ReportedMemory {
    /// Releases pages of `ram`, whose tracker is `lazy`.
    #[must_use]
    pub fn new(lazy: Arc<LazyMemory>, ram: Arc<GuestRam>, how: Release) -> Self {
        let how = if ram.can_mark_free() {
            how
        } else {
            Release::Discard
        };
        Self {
            lazy,
            ram,
            how,
            counters: Counters::default(),
        }
    }

    /// How pages are released: always [`Release::Discard`] for memory that cannot be marked free.
    #[must_use]
    pub const fn how(&self) -> Release {
        self.how
    }

    /// Releases `ranges`, which the guest does not use. The guest may write to them when this returns.
    pub fn take(&self, ranges: &[GpaRange]) {
        // The guest may have freed them lazily before. From now on it may write to them without a reuse.
        self.lazy.reuse(ranges);
        for &range in ranges {
            self.take_range(range);
        }
    }

    fn take_range(&self, range: GpaRange) {
        self.counters.calls_total.increment();
        let released = match self.how {
            Release::MarkFree => &self.counters.marked_bytes_total,
            Release::Discard => &self.counters.discarded_bytes_total,
        };
        match self.ram.release_range(range, self.how) {
            Ok(bytes) => released.add(bytes),
            Err(error) => {
                self.counters.failures_total.increment();
                tracing::debug!(%error, "a reported range is not released");
            }
        }
    }

    /// The counters. Each is exact; they are not read at the same moment.
    #[must_use]
    pub fn snapshot(&self) -> ReportedStats {
        self.counters.snapshot()
    }
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

    fn reported(how: Release) -> ReportedMemory {
        let ram = GuestRam::allocate(Backing::default(), &[range(0, 16)]).unwrap();
        let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
        ReportedMemory::new(Arc::new(lazy), Arc::new(ram), how)
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
    fn discarded_pages_are_gone_when_the_report_is_acknowledged() {
        let reported = reported(Release::Discard);
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
    fn what_is_written_after_the_acknowledgement_is_kept() {
        for how in [Release::Discard, Release::MarkFree] {
            let reported = reported(how);
            put(&reported, 2, 7);
            reported.take(&[range(2, 4)]);
            put(&reported, 2, 8);
            put(&reported, 3, 9);
            assert_eq!((get(&reported, 2), get(&reported, 3)), (8, 9), "{how:?}");
            assert_eq!(reported.how(), how);
        }
    }

    #[test]
    fn a_report_of_lazily_free_memory_takes_it_out_of_the_tracker() {
        for how in [Release::Discard, Release::MarkFree] {
            let reported = reported(how);
            reported.lazy.free(&[range(2, 6)]);
            reported.take(&[range(3, 4), range(5, 8)]);
            let stats = reported.lazy.snapshot();
            assert_eq!((stats.lazy_bytes, stats.ranges), (2 * MIB, 2));
            // A deflate of the same pages changes nothing then.
            reported.lazy.reuse(&[range(2, 6)]);
            assert_eq!(reported.lazy.snapshot().lazy_bytes, 0);
        }
    }

    #[test]
    fn what_the_host_refuses_stays_and_changes_nothing_else() {
        for how in [Release::Discard, Release::MarkFree] {
            let reported = reported(how);
            (0..16).for_each(|mib| put(&reported, mib, 7));
            reported.ram.lock(range(3, 4));
            // The kernel refuses locked memory (EINVAL), `GuestRam` what is not RAM.
            reported.take(&[range(3, 4), range(15, 17), range(5, 6)]);
            assert_eq!(reported.snapshot().failures_total, 2);
            let done = reported.snapshot();
            assert_eq!(done.discarded_bytes_total + done.marked_bytes_total, MIB);
            assert_eq!(reported.how(), how);
            assert_eq!((get(&reported, 3), get(&reported, 15)), (7, 7));
        }
    }
}
