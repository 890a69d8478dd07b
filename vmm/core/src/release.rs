//! How pages go back to the host, and who makes the system calls for that.

use crate::range::{GpaRange, PAGE_SIZE};

/// How pages go back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// The pages are gone when the call returns, and the next touch reads zeroes: `MADV_DONTNEED`, or
    /// `MADV_REMOVE` for shared memory, where the former would keep the pages. Lazy and unmapped ranges become
    /// discarded.
    Discard,
    /// The host takes the pages when it is short of memory; a write before that keeps a page: `MADV_FREE`, for
    /// private anonymous memory only. The guest's translations of them are gone when the call returns. To
    /// *invalidate* lazy ranges is to release them this way: they become unmapped.
    MarkFree,
}

/// What a release did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// For each range, how many of its bytes were released for sure.
    pub bytes: Vec<u64>,
    /// System calls made.
    pub calls: u64,
    /// Parts of ranges that the kernel refused.
    pub failures: u64,
    /// The first error number among these.
    pub error: Option<i32>,
}

/// Memory whose pages can be released: makes the system calls.
pub trait ReleasePages: Send + Sync {
    /// Returns true if [`Release::MarkFree`] is supported.
    fn can_mark_free(&self) -> bool;

    /// Smaller pieces than this many bytes are not released: 2 MiB for hugetlb pages.
    fn unit(&self) -> u64 {
        PAGE_SIZE
    }

    /// How many bytes of `range` the host holds, in memory or in swap; `None` where that cannot be told.
    fn held(&self, _range: GpaRange) -> Option<u64> {
        None
    }

    /// How many bytes the host holds of `ranges`, which lie in one block in ascending order, as far as that can be told.
    fn held_of(&self, ranges: &[GpaRange]) -> u64 {
        ranges.iter().filter_map(|range| self.held(*range)).sum()
    }

    /// The parts of `range`, ascending and apart, that are known to lie in huge pages: it takes less time to release them as a
    /// whole than in pieces.
    fn in_huge_pages(&self, _range: GpaRange) -> Vec<GpaRange> {
        Vec::new()
    }

    /// The maximum number of ranges that one call should be given.
    fn max_batch(&self) -> usize;

    /// Releases `ranges`. A range that the kernel refuses is left as it is, or in part.
    fn release(&self, ranges: &[GpaRange], how: Release) -> Released;
}
