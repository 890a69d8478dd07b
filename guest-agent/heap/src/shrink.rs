//! The shrink detector: while the heap shrinks, threads return the freed memory that they cache.
//!
//! jemalloc keeps up to 200 freed objects of each size in a cache of the thread. Each of them keeps its granule in use. That
//! does not matter in a heap of constant size, but it does in one that was emptied in random order, such as Redis after
//! FLUSHALL. So while the heap shrinks, a thread that frees flushes its cache once and then frees without it.
//!
//! Shrinking begins when the heap has fallen to half of its size. It ends when the heap grows, or when a thread allocates
//! about as often as it frees.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tikv_jemalloc_sys as jemalloc;

/// Counters of committed pages. jemalloc arenas share one if their numbers are equal modulo this.
const COUNTERS: usize = 64;
/// Pages by which a counter changes before the sum of all is checked: 4 MiB.
const CHECK_STEP: usize = 1024;
/// A heap that has fallen by less than these pages, 64 MiB, does not count as shrinking.
const MIN_SHRINK: usize = 16 << 10;
/// First balance of a thread, see [`BALANCE`].
const START_BALANCE: u32 = 1024;

/// A counter on its own pair of cache lines, because processors prefetch pairs.
#[repr(align(128))]
struct Counter(AtomicUsize);

static COMMITTED: [Counter; COUNTERS] = [const { Counter(AtomicUsize::new(0)) }; COUNTERS];
/// Counters from this index on have never reached a step, and are left out of the sum.
static COUNTERS_USED: AtomicUsize = AtomicUsize::new(0);
/// Highest sum since the last shrinking.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);
/// Lowest sum during this shrinking.
static LOWEST: AtomicUsize = AtomicUsize::new(0);
static SHRINKING: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// While the heap shrinks: [`START_BALANCE`], plus 1 for each free and minus 2 for each allocation, at most twice
    /// [`START_BALANCE`]. Below 0, shrinking ends. `None` if the thread uses its cache.
    static BALANCE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Returns true while the heap shrinks.
#[inline]
pub fn is_shrinking() -> bool {
    SHRINKING.load(Ordering::Relaxed)
}

/// To be called when a jemalloc arena has committed pages.
pub fn committed(jemalloc_arena: u32, pages: usize) {
    let index = jemalloc_arena as usize % COUNTERS;
    let before = COMMITTED[index].0.fetch_add(pages, Ordering::Relaxed);
    if before / CHECK_STEP != before.wrapping_add(pages) / CHECK_STEP {
        COUNTERS_USED.fetch_max(index + 1, Ordering::Relaxed);
        check();
    }
}

/// To be called when a jemalloc arena has decommitted pages.
pub fn decommitted(jemalloc_arena: u32, pages: usize) {
    let index = jemalloc_arena as usize % COUNTERS;
    let before = COMMITTED[index].0.fetch_sub(pages, Ordering::Relaxed);
    if before / CHECK_STEP != before.wrapping_sub(pages) / CHECK_STEP {
        check();
    }
}

fn committed_pages() -> usize {
    let counters = &COMMITTED[..COUNTERS_USED.load(Ordering::Relaxed)];
    let counts = counters
        .iter()
        .map(|counter| counter.0.load(Ordering::Relaxed));
    counts.fold(0, usize::wrapping_add)
}

/// Checks if shrinking begins or ends. When several threads check at once, that may be noticed one step later.
fn check() {
    let pages = committed_pages();
    if is_shrinking() {
        let lowest = LOWEST.fetch_min(pages, Ordering::Relaxed).min(pages);
        if pages > lowest + (lowest / 16).max(2 * CHECK_STEP) {
            end_shrinking(pages);
        }
        return;
    }
    let highest = HIGHEST.fetch_max(pages, Ordering::Relaxed).max(pages);
    if pages < highest / 2 && highest - pages > MIN_SHRINK {
        LOWEST.store(pages, Ordering::Relaxed);
        SHRINKING.store(true, Ordering::Relaxed);
    }
}

fn end_shrinking(pages: usize) {
    HIGHEST.store(pages, Ordering::Relaxed);
    SHRINKING.store(false, Ordering::Relaxed);
}

/// To be called before each allocation while the heap shrinks.
#[cold]
pub fn before_allocation() {
    let Some(balance) = BALANCE.get() else {
        return;
    };
    match balance.checked_sub(2) {
        Some(rest) => BALANCE.set(Some(rest)),
        None => {
            BALANCE.set(None);
            end_shrinking(committed_pages());
        }
    }
}

/// Frees `memory` without the thread's cache, while the heap shrinks.
///
/// # Safety
/// As free(3).
#[cold]
pub unsafe fn free_uncached(memory: *mut c_void) {
    if memory.is_null() {
        return;
    }
    let balance = BALANCE.get().unwrap_or_else(|| {
        flush_thread_cache();
        START_BALANCE
    });
    BALANCE.set(Some((balance + 1).min(2 * START_BALANCE)));
    // SAFETY: the caller's promise, and not null.
    unsafe { jemalloc::dallocx(memory, jemalloc::MALLOCX_TCACHE_NONE) }
}

fn flush_thread_cache() {
    let name = c"thread.tcache.flush".as_ptr();
    // SAFETY: a control without a value. It fails for threads without a cache.
    let _ =
        unsafe { jemalloc::mallctl(name, null_mut(), null_mut(), null::<c_void>().cast_mut(), 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because the state is global.
    #[test]
    fn shrinking_begins_at_half_and_ends_by_growth_or_a_thread_that_allocates_as_it_frees() {
        let size = 100 * CHECK_STEP;
        committed(7, size);
        decommitted(7, 49 * CHECK_STEP);
        assert!(!is_shrinking(), "more than half is left");
        committed(3, 2 * CHECK_STEP);
        decommitted(3, 2 * CHECK_STEP);
        decommitted(7, 3 * CHECK_STEP);
        assert!(is_shrinking());
        decommitted(7, 40 * CHECK_STEP);
        committed(7, CHECK_STEP);
        assert!(is_shrinking(), "it grows too little");
        committed(7, 2 * CHECK_STEP);
        assert!(!is_shrinking(), "it grows");
        committed(7, size);
        decommitted(7, size);
        assert!(is_shrinking());
        let allocate_and_free = || {
            before_allocation();
            // SAFETY: allocated here.
            unsafe { free_uncached(jemalloc::malloc(100)) };
        };
        // SAFETY: allocated here.
        unsafe { free_uncached(jemalloc::malloc(100)) };
        (0..START_BALANCE / 2).for_each(|_| allocate_and_free());
        assert!(is_shrinking());
        (0..START_BALANCE).for_each(|_| allocate_and_free());
        assert!(!is_shrinking(), "a thread allocates as it frees");
    }
}
