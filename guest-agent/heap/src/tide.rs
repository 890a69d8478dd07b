//! Whether the heap is shrinking, and what is done about memory that threads keep.
//!
//! jemalloc keeps what a thread frees for its next allocations, up to 200 pieces of a size. A piece keeps its granule in use:
//! that is nothing in a heap that stays as big as it is, and most of one that has been emptied in no order (Redis after
//! FLUSHALL). So while the heap ebbs, a thread that frees gives back what it has kept, and keeps no more.
//!
//! The heap ebbs when it has fallen to half of what it was. It does not any more when it grows, or when a thread allocates as
//! it frees.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tikv_jemalloc_sys as jemalloc;

/// Counters of used pages; those of jemalloc's arenas that have the same number here share one.
const SHARDS: usize = 64;
/// Pages by which a counter changes until somebody looks at all of them: 4 MiB.
const STEP: usize = 1024;
/// Pages that are worth the trouble: 64 MiB.
const WORTH: usize = 16 << 10;
/// Allocations that a thread may make, beyond as many as it frees, before the ebb is over for it.
const CREDIT: u32 = 1024;

/// A counter on its own pair of cache lines.
#[repr(align(128))]
struct Shard(AtomicUsize);

static USED: [Shard; SHARDS] = [const { Shard(AtomicUsize::new(0)) }; SHARDS];
/// How many of the counters have ever moved by a step.
static MOVED: AtomicUsize = AtomicUsize::new(0);
/// Most pages since the last ebb.
static HIGH: AtomicUsize = AtomicUsize::new(0);
/// Fewest pages during this ebb.
static LOW: AtomicUsize = AtomicUsize::new(0);
static EBBS: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// During an ebb: frees less allocations, between 0 and twice [`CREDIT`]. `None`: this thread keeps what it frees.
    static BALANCE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Whether the heap is shrinking.
#[inline]
pub fn ebbs() -> bool {
    EBBS.load(Ordering::Relaxed)
}

/// jemalloc's arena number `arena` uses so many pages more.
pub fn rise(arena: u32, pages: usize) {
    let shard = arena as usize % SHARDS;
    let before = USED[shard].0.fetch_add(pages, Ordering::Relaxed);
    if before / STEP != before.wrapping_add(pages) / STEP {
        MOVED.fetch_max(shard + 1, Ordering::Relaxed);
        look();
    }
}

/// jemalloc's arena number `arena` uses so many pages less.
pub fn fall(arena: u32, pages: usize) {
    let shard = arena as usize % SHARDS;
    let before = USED[shard].0.fetch_sub(pages, Ordering::Relaxed);
    if before / STEP != before.wrapping_sub(pages) / STEP {
        look();
    }
}

fn used() -> usize {
    let moved = &USED[..MOVED.load(Ordering::Relaxed)];
    let counts = moved.iter().map(|shard| shard.0.load(Ordering::Relaxed));
    counts.fold(0, usize::wrapping_add)
}

/// Looks how the tide is. Several threads may at a time: then the ebb begins or ends a step later.
fn look() {
    let used = used();
    if ebbs() {
        let low = LOW.fetch_min(used, Ordering::Relaxed).min(used);
        if used > low + (low / 16).max(2 * STEP) {
            turn(used);
        }
        return;
    }
    let high = HIGH.fetch_max(used, Ordering::Relaxed).max(used);
    if used < high / 2 && high - used > WORTH {
        LOW.store(used, Ordering::Relaxed);
        EBBS.store(true, Ordering::Relaxed);
    }
}

/// The ebb is over.
fn turn(used: usize) {
    HIGH.store(used, Ordering::Relaxed);
    EBBS.store(false, Ordering::Relaxed);
}

/// Something is allocated during an ebb.
#[cold]
pub fn allocated() {
    let Some(balance) = BALANCE.get() else {
        return;
    };
    // Twice, so that a thread that does as much of both comes to an end.
    match balance.checked_sub(2) {
        Some(rest) => BALANCE.set(Some(rest)),
        None => {
            BALANCE.set(None);
            turn(used());
        }
    }
}

/// Frees `memory` during an ebb.
///
/// # Safety
/// As free(3).
#[cold]
pub unsafe fn free(memory: *mut c_void) {
    if memory.is_null() {
        return;
    }
    let balance = BALANCE.get().unwrap_or_else(|| {
        give_back();
        CREDIT
    });
    BALANCE.set(Some((balance + 1).min(2 * CREDIT)));
    // SAFETY: the caller's; not null.
    unsafe { jemalloc::dallocx(memory, jemalloc::MALLOCX_TCACHE_NONE) }
}

/// What this thread has kept goes back.
fn give_back() {
    let name = c"thread.tcache.flush".as_ptr();
    // SAFETY: a control without a value. It fails where a thread keeps nothing anyway.
    let _ =
        unsafe { jemalloc::mallctl(name, null_mut(), null_mut(), null::<c_void>().cast_mut(), 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, as there is one tide.
    #[test]
    fn it_ebbs_from_half_until_it_rises_or_a_thread_allocates_as_it_frees() {
        let big = 100 * STEP;
        rise(7, big);
        fall(7, 49 * STEP);
        assert!(!ebbs(), "more than half is left");
        rise(3, 2 * STEP);
        fall(3, 2 * STEP);
        fall(7, 3 * STEP);
        assert!(ebbs());
        fall(7, 40 * STEP);
        rise(7, STEP);
        assert!(ebbs(), "a little");
        rise(7, 2 * STEP);
        assert!(!ebbs(), "it rises");
        rise(7, big);
        fall(7, big);
        assert!(ebbs());
        let allocate_and_free = || {
            allocated();
            // SAFETY: allocated here.
            unsafe { free(jemalloc::malloc(100)) };
        };
        // SAFETY: allocated here.
        unsafe { free(jemalloc::malloc(100)) };
        (0..CREDIT / 2).for_each(|_| allocate_and_free());
        assert!(ebbs());
        (0..CREDIT).for_each(|_| allocate_and_free());
        assert!(!ebbs(), "a thread goes on as before");
    }
}
