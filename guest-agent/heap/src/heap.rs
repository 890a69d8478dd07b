//! The heap: an arena and its committed pages.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ebb_guest_agent::arena::Arena;
use ebb_guest_agent::memory::PAGE_SIZE;

use crate::committed::CommittedPages;
use crate::stderr;

/// Claims that fail without a search after one has found the arena full: a search reads all owner words.
const CLAIMS_WITHOUT_SEARCH: usize = 64;

static HEAP: OnceLock<Heap> = OnceLock::new();

/// Takes one from a counter, unless it is 0. Returns true if there was one.
fn take_one(counter: &AtomicUsize) -> bool {
    let less = |count: usize| count.checked_sub(1);
    let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
    counter.fetch_update(success, failure, less).is_ok()
}

/// An arena and its committed pages.
pub struct Heap {
    arena: Arena,
    committed: CommittedPages,
    /// Claims that still fail without a search.
    skip: AtomicUsize,
    warned: AtomicBool,
}

impl Heap {
    /// Makes `arena` the heap of this process, forever. Returns false if it has one.
    pub fn install(arena: Arena) -> io::Result<bool> {
        let per_granule = arena.granule_size() / PAGE_SIZE;
        let heap = Self {
            committed: CommittedPages::new(arena.indices().end, per_granule)?,
            arena,
            skip: AtomicUsize::new(0),
            warned: AtomicBool::new(false),
        };
        Ok(HEAP.set(heap).is_ok())
    }

    /// The heap. `None` if this process has no arena.
    #[inline]
    pub fn get() -> Option<&'static Self> {
        HEAP.get()
    }

    /// Returns true for addresses of the heap.
    pub fn contains(address: usize) -> bool {
        HEAP.get()
            .is_some_and(|heap| heap.range().contains(&address))
    }

    /// Addresses of the heap.
    pub fn range(&self) -> Range<usize> {
        let base = self.arena.base() as usize;
        base..base + self.arena.indices().end * self.granule_size()
    }

    const fn granule_size(&self) -> usize {
        self.arena.granule_size()
    }

    /// Claims address space for `size` bytes, uncommitted. If the arena is full, returns `None`, and prints a message once.
    pub fn claim(&self, size: usize) -> Option<usize> {
        if take_one(&self.skip) {
            return None;
        }
        let first = self.arena.claim_run(size.div_ceil(self.granule_size()));
        if first.is_none() {
            self.skip.store(CLAIMS_WITHOUT_SEARCH, Ordering::Relaxed);
            if !self.warned.swap(true, Ordering::Relaxed) {
                stderr::print(format_args!(
                    "the arena is full: this program goes on with normal memory"
                ));
            }
        }
        first.map(|first| self.arena.base() as usize + first * self.granule_size())
    }

    /// The granules of these addresses, each with the numbers of the pages within.
    fn by_granule(&self, bytes: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (base, granule) = (self.arena.base() as usize, self.granule_size());
        let (start, end) = (bytes.start - base, bytes.end - base);
        (start / granule..end.div_ceil(granule)).map(move |index| {
            let (from, to) = (index * granule, (index + 1) * granule);
            let (from, to) = (start.max(from) - from, end.min(to) - from);
            (index, from / PAGE_SIZE..to / PAGE_SIZE)
        })
    }

    /// Commits whole pages. Returns true if they are known to be zero.
    pub fn commit(&self, bytes: Range<usize>) -> bool {
        let mut zero = true;
        for (granule, pages) in self.by_granule(bytes) {
            let mut granule_zero = false;
            self.committed.commit(granule, pages, || {
                granule_zero = self.arena.reuse_granule(granule);
            });
            zero &= granule_zero;
        }
        zero
    }

    /// Decommits whole pages.
    pub fn decommit(&self, bytes: Range<usize>) {
        for (granule, pages) in self.by_granule(bytes) {
            self.committed.decommit(granule, pages, || {
                // SAFETY: the heap has claimed it, and none of its pages is committed.
                unsafe { self.arena.free_granule(granule) };
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_from_zero() {
        let counter = AtomicUsize::new(1);
        assert_eq!([take_one(&counter), take_one(&counter)], [true, false]);
        assert_eq!(counter.into_inner(), 0);
    }
}
