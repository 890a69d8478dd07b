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
/// Set in the child of a fork, where a copy in normal memory has replaced the heap.
static DETACHED: AtomicBool = AtomicBool::new(false);

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

    /// The heap. `None` if this process has no arena, or is a child whose heap is a copy.
    #[inline]
    pub fn get() -> Option<&'static Self> {
        HEAP.get().filter(|_| !DETACHED.load(Ordering::Relaxed))
    }

    /// Says that a copy has replaced the heap.
    pub fn detach() {
        DETACHED.store(true, Ordering::Relaxed);
    }

    /// Returns true for addresses of the heap or of its copy.
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

    /// The committed pages.
    pub const fn committed(&self) -> &CommittedPages {
        &self.committed
    }

    /// Claims address space for `size` bytes, uncommitted. If the arena is full, returns `None`, and prints a message once.
    pub fn claim(&self, size: usize) -> Option<usize> {
        if self.skip.load(Ordering::Relaxed) > 0 {
            self.skip.fetch_sub(1, Ordering::Relaxed);
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
