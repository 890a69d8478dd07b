//! The part of an arena that is this process's heap.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ebb_guest_agent::arena::Arena;

use crate::pages::{PAGE, Pages};
use crate::say::say;

/// After an allocation that found the arena full, so many do not look again.
const PATIENCE: usize = 64;

static HEAP: OnceLock<Heap> = OnceLock::new();
/// In a child of a fork the heap's addresses are ordinary memory of its own.
static DETACHED: AtomicBool = AtomicBool::new(false);

/// An arena, and which of its pages hold something.
pub struct Heap {
    arena: Arena,
    pages: Pages,
    /// Allocations to go before the arena is looked through again.
    wait: AtomicUsize,
    warned: AtomicBool,
}

impl Heap {
    /// Makes `arena` the heap, for as long as the process lives. `false`: there is one already.
    pub fn install(arena: Arena) -> io::Result<bool> {
        let per_granule = arena.granule_size() / PAGE;
        let heap = Self {
            pages: Pages::new(arena.indices().end, per_granule)?,
            arena,
            wait: AtomicUsize::new(0),
            warned: AtomicBool::new(false),
        };
        Ok(HEAP.set(heap).is_ok())
    }

    /// The heap, unless there is none, or it was left to the parent.
    #[inline]
    pub fn get() -> Option<&'static Self> {
        HEAP.get().filter(|_| !DETACHED.load(Ordering::Relaxed))
    }

    /// From now on the heap's addresses are ordinary memory.
    pub fn detach() {
        DETACHED.store(true, Ordering::Relaxed);
    }

    /// Whether an address is, or was before a fork, the heap's.
    pub fn owns(address: usize) -> bool {
        HEAP.get()
            .is_some_and(|heap| heap.range().contains(&address))
    }

    /// Its addresses.
    pub fn range(&self) -> Range<usize> {
        let base = self.arena.base() as usize;
        base..base + self.arena.indices().end * self.granule()
    }

    /// Bytes of a granule.
    pub const fn granule(&self) -> usize {
        self.arena.granule_size()
    }

    /// Its pages.
    pub const fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Address space for `size` bytes, uncommitted. `None`, and once a line that says so: the arena is full.
    pub fn claim(&self, size: usize) -> Option<usize> {
        if self.wait.load(Ordering::Relaxed) > 0 {
            self.wait.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let first = self.arena.claim_run(size.div_ceil(self.granule()));
        if first.is_none() {
            self.wait.store(PATIENCE, Ordering::Relaxed);
            if !self.warned.swap(true, Ordering::Relaxed) {
                say(format_args!(
                    "the arena is full: this program goes on with normal memory"
                ));
            }
        }
        first.map(|first| self.arena.base() as usize + first * self.granule())
    }

    /// The granules that `bytes` lie in, each with its part of the pages.
    fn parts(&self, bytes: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (base, granule) = (self.arena.base() as usize, self.granule());
        let (start, end) = (bytes.start - base, bytes.end - base);
        (start / granule..end.div_ceil(granule)).map(move |index| {
            let (from, to) = (index * granule, (index + 1) * granule);
            let (from, to) = (start.max(from) - from, end.min(to) - from);
            (index, from / PAGE..to / PAGE)
        })
    }

    /// These bytes, whole pages, will be used. Whether they are known to be zero.
    pub fn commit(&self, bytes: Range<usize>) -> bool {
        let mut zero = true;
        for (granule, pages) in self.parts(bytes) {
            let mut fresh = false;
            self.pages.commit(granule, pages, || {
                fresh = self.arena.reuse_granule(granule);
            });
            zero &= fresh;
        }
        zero
    }

    /// These bytes, whole pages, are not used any more.
    pub fn decommit(&self, bytes: Range<usize>) {
        for (granule, pages) in self.parts(bytes) {
            self.pages.decommit(granule, pages, || {
                // SAFETY: the heap claimed it, and none of its pages is committed.
                unsafe { self.arena.free_granule(granule) };
            });
        }
    }
}
