//! Which pages of the arena hold something: a bit for each, a lock and a count for each granule.
//!
//! jemalloc commits and decommits pages; the host takes granules. A granule is freed when the last of its pages is
//! decommitted, and taken back before the first is committed; the lock keeps these two in their order.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Set in a granule's word while a thread changes its pages; the other bits count pages.
const LOCKED: u32 = 1 << 31;
/// Turns before a thread lets another run.
const SPINS: u32 = 100;

/// Zeroes at first, as much as there is address space; never unmapped.
struct Table<T: 'static>(&'static [T]);

impl<T: 'static> Table<T> {
    /// # Safety
    /// Zeroes are a valid `T`.
    unsafe fn new(len: usize) -> io::Result<Self> {
        let bytes = (len * size_of::<T>()).max(1);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, prot, flags)? };
        // SAFETY: the mapping is that long, aligned to pages, zero, and never unmapped.
        Ok(Self(unsafe {
            std::slice::from_raw_parts(start.cast(), len)
        }))
    }
}

/// The pages of an arena, by granule and by their number within it.
pub struct Pages {
    granules: Table<AtomicU32>,
    bits: Table<AtomicU64>,
    /// Pages of a granule, a multiple of 64.
    per_granule: usize,
}

impl Pages {
    /// None of so many granules' pages holds anything.
    pub fn new(granules: usize, per_granule: usize) -> io::Result<Self> {
        assert!(per_granule.is_multiple_of(64));
        // SAFETY: atomic integers may be zero.
        let (table, bits) = unsafe {
            (
                Table::new(granules)?,
                Table::new(granules * per_granule / 64)?,
            )
        };
        Ok(Self {
            granules: table,
            bits,
            per_granule,
        })
    }

    fn lock(&self, granule: usize) -> u32 {
        let word = &self.granules.0[granule];
        let mut turns = 0_u32;
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
            turns += 1;
            if turns.is_multiple_of(SPINS) {
                rustix::thread::sched_yield();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn unlock(&self, granule: usize, count: u32) {
        self.granules.0[granule].store(count, Ordering::Release);
    }

    /// The words of these pages of a granule, each with the bits that are meant.
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
            (&self.bits.0[base / 64 + word], mask)
        })
    }

    /// These pages of a granule will hold something. `take` is called when there was none, before anybody may touch them.
    pub fn commit(&self, granule: usize, pages: Range<usize>, take: impl FnOnce()) {
        let mut count = self.lock(granule);
        if count == 0 {
            take();
        }
        for (word, mask) in self.words(granule, pages) {
            let old = word.load(Ordering::Relaxed);
            count += (mask & !old).count_ones();
            word.store(old | mask, Ordering::Relaxed);
        }
        self.unlock(granule, count);
    }

    /// These pages of a granule hold nothing any more. `free` is called when none is left.
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

    /// How many pages hold something. Exact when nobody changes them.
    pub fn used(&self) -> usize {
        let counts = self.granules.0.iter();
        counts
            .map(|word| (word.load(Ordering::Relaxed) & !LOCKED) as usize)
            .sum()
    }

    /// Calls `each` with runs of pages that hold something, numbered through the arena.
    pub fn each_run(&self, mut each: impl FnMut(Range<usize>)) {
        let mut run = 0..0;
        for (granule, count) in self.granules.0.iter().enumerate() {
            if count.load(Ordering::Relaxed) & !LOCKED == 0 {
                continue;
            }
            let base = granule * self.per_granule;
            for word in 0..self.per_granule / 64 {
                let mut bits = self.bits.0[base / 64 + word].load(Ordering::Relaxed);
                let mut at = base + word * 64;
                while bits != 0 {
                    let skipped = bits.trailing_zeros() as usize;
                    bits >>= skipped;
                    at += skipped;
                    let length = bits.trailing_ones() as usize;
                    if run.end != at {
                        if !run.is_empty() {
                            each(run.clone());
                        }
                        run = at..at;
                    }
                    run.end = at + length;
                    at += length;
                    bits = bits.checked_shr(length as u32).unwrap_or(0);
                }
            }
        }
        if !run.is_empty() {
            each(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PER_GRANULE: usize = 512;

    fn runs(pages: &Pages) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        pages.each_run(|run| runs.push(run));
        runs
    }

    #[test]
    fn a_granule_is_taken_with_its_first_page_and_freed_with_its_last() {
        let pages = Pages::new(3, PER_GRANULE).unwrap();
        let mut calls = Vec::new();
        pages.commit(1, 3..70, || calls.push("take"));
        pages.commit(1, 100..512, || calls.push("take again"));
        pages.decommit(1, 3..64, || calls.push("free early"));
        pages.decommit(1, 64..70, || calls.push("free early"));
        assert_eq!((pages.used(), calls.len()), (412, 1));
        pages.decommit(1, 0..512, || calls.push("free"));
        pages.decommit(1, 0..512, || calls.push("free again"));
        pages.commit(1, 0..1, || calls.push("take"));
        assert_eq!(calls, ["take", "free", "take"]);
    }

    #[test]
    fn runs_go_across_words_and_granules() {
        let pages = Pages::new(4, PER_GRANULE).unwrap();
        assert!(runs(&pages).is_empty());
        pages.commit(0, 500..512, || {});
        pages.commit(1, 0..64, || {});
        pages.commit(1, 66..67, || {});
        pages.commit(3, 0..512, || {});
        assert_eq!(runs(&pages), [500..576, 578..579, 1536..2048]);
        pages.decommit(3, 63..65, || {});
        assert_eq!(runs(&pages), [500..576, 578..579, 1536..1599, 1601..2048]);
    }
}
