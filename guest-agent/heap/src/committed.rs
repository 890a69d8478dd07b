//! Which pages of the arena are committed: a bit for each page, a count and a lock for each granule.
//!
//! jemalloc commits and decommits pages, but only whole granules can be freed. A granule is reused before its first page is
//! committed, and freed when its last page is decommitted. The lock keeps the two in order.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ebb_guest_agent::memory::{PAGE_SIZE, map_anonymous};
use rustix::mm::{MapFlags, ProtFlags};

/// Set in a granule's word while a thread holds its lock. The other bits count committed pages.
const LOCKED: u32 = 1 << 31;
/// How often a thread spins on a lock before it yields.
const SPINS: u32 = 100;

/// Allocates `len` zeroed values outside of the heap, forever.
///
/// # Safety
/// Zeroes are a valid `T`.
unsafe fn zeroed<T>(len: usize) -> io::Result<&'static [T]> {
    let bytes = (len * size_of::<T>()).max(1);
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let start = map_anonymous(bytes, PAGE_SIZE, prot, flags)?;
    // SAFETY: the mapping is long enough, page-aligned, zero, and never unmapped.
    Ok(unsafe { std::slice::from_raw_parts(start.cast(), len) })
}

/// The committed pages of an arena. Pages are numbered within their granule.
pub struct CommittedPages {
    granules: &'static [AtomicU32],
    bits: &'static [AtomicU64],
    /// Pages of a granule, a multiple of 64.
    per_granule: usize,
}

impl CommittedPages {
    /// No pages are committed.
    pub fn new(granules: usize, per_granule: usize) -> io::Result<Self> {
        assert!(per_granule.is_multiple_of(64));
        // SAFETY: 0 is a valid atomic integer.
        let (granules, bits) = unsafe { (zeroed(granules)?, zeroed(granules * per_granule / 64)?) };
        Ok(Self {
            granules,
            bits,
            per_granule,
        })
    }

    /// Locks a granule. Returns its count of committed pages.
    fn lock(&self, granule: usize) -> u32 {
        let word = &self.granules[granule];
        let mut spins = 0_u32;
        loop {
            let count = word.load(Ordering::Relaxed);
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            if count & LOCKED == 0
                && word
                    .compare_exchange_weak(count, count | LOCKED, success, failure)
                    .is_ok()
            {
                return count;
            }
            spins += 1;
            if spins.is_multiple_of(SPINS) {
                rustix::thread::sched_yield();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn unlock(&self, granule: usize, count: u32) {
        self.granules[granule].store(count, Ordering::Release);
    }

    /// The words that hold the bits of these pages, each with a mask of the bits.
    fn words(
        &self,
        granule: usize,
        pages: Range<usize>,
    ) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let base = granule * self.per_granule;
        let (first, last) = (pages.start / 64, pages.end.div_ceil(64));
        (first..last).map(move |word| {
            let from = pages.start.saturating_sub(word * 64);
            let to = (pages.end - word * 64).min(64);
            let mask = (u64::MAX >> (64 - (to - from))) << from;
            (&self.bits[base / 64 + word], mask)
        })
    }

    /// Commits pages. Calls `reuse` first if the granule had none, so that nobody touches it earlier.
    pub fn commit(&self, granule: usize, pages: Range<usize>, reuse: impl FnOnce()) {
        let mut count = self.lock(granule);
        if count == 0 {
            reuse();
        }
        for (word, mask) in self.words(granule, pages) {
            let old = word.load(Ordering::Relaxed);
            count += (mask & !old).count_ones();
            word.store(old | mask, Ordering::Relaxed);
        }
        self.unlock(granule, count);
    }

    /// Decommits pages. Calls `free` at the end if these were the granule's last.
    pub fn decommit(&self, granule: usize, pages: Range<usize>, free: impl FnOnce()) {
        let before = self.lock(granule);
        let mut count = before;
        for (word, mask) in self.words(granule, pages) {
            let old = word.load(Ordering::Relaxed);
            count -= (mask & old).count_ones();
            word.store(old & !mask, Ordering::Relaxed);
        }
        if count == 0 && before > 0 {
            free();
        }
        self.unlock(granule, count);
    }

    /// Number of committed pages. Exact while no thread changes them.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        let words = self.granules.iter();
        words
            .map(|word| (word.load(Ordering::Relaxed) & !LOCKED) as usize)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PER_GRANULE: usize = 512;

    #[test]
    fn a_granule_is_reused_with_its_first_page_and_freed_with_its_last() {
        let pages = CommittedPages::new(3, PER_GRANULE).unwrap();
        let mut calls = Vec::new();
        pages.commit(1, 3..70, || calls.push("reuse"));
        pages.commit(1, 100..512, || calls.push("reuse again"));
        pages.decommit(1, 3..64, || calls.push("free early"));
        pages.decommit(1, 64..70, || calls.push("free early"));
        assert_eq!((pages.count(), calls.len()), (412, 1));
        pages.decommit(1, 0..512, || calls.push("free"));
        pages.decommit(1, 0..512, || calls.push("free again"));
        pages.commit(1, 0..1, || calls.push("reuse"));
        assert_eq!(calls, ["reuse", "free", "reuse"]);
    }
}
