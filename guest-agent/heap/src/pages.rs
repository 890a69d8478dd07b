//! Whole pages of a program: what it asks for at the alignment of a page, and what it says about pages of the heap.
//!
//! Such memory gets guards (mprotect), or is zeroed by madvise. A device-dax mapping, of huge pages only, can do neither.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use ebb_guest_agent::memory::PAGE_SIZE;
use tikv_jemalloc_sys as jemalloc;

use crate::heap::Heap;

/// The jemalloc arena that has none of our hooks, and so normal memory; or 0 if the heap is not in an Ebb arena.
static NORMAL: AtomicU32 = AtomicU32::new(0);

/// Names a jemalloc arena without hooks, which serves no thread by itself.
pub fn install(jemalloc_arena: u32) {
    NORMAL.store(jemalloc_arena, Ordering::Relaxed);
}

/// Allocates normal memory for a request that is aligned to pages, null if there is none. `None` for other requests.
pub fn allocate(align: usize, size: usize) -> Option<*mut c_void> {
    let normal = NORMAL.load(Ordering::Relaxed);
    let flags = jemalloc::MALLOCX_ALIGN(align)
        | jemalloc::MALLOCX_ARENA(normal as usize)
        | jemalloc::MALLOCX_TCACHE_NONE;
    (normal != 0 && align >= PAGE_SIZE && align.is_power_of_two())
        // SAFETY: a size that is not 0, and an alignment that is a power of two.
        .then(|| unsafe { jemalloc::mallocx(size.max(1), flags) })
}

/// madvise(2) of whole pages of the heap that the program owns. `None` if they are not of the heap, or for other advice.
///
/// # Safety
/// As madvise(2).
pub unsafe fn advise(start: *mut c_void, len: usize, advice: c_int) -> Option<c_int> {
    let heap = Heap::get()?.range();
    let (first, len) = (start as usize, len.checked_next_multiple_of(PAGE_SIZE)?);
    let inside = heap.contains(&first) && len <= heap.end - first;
    if !inside || !first.is_multiple_of(PAGE_SIZE) {
        return None;
    }
    match advice {
        // SAFETY: the caller's promise: nobody wants what is there.
        libc::MADV_DONTNEED => unsafe { start.cast::<u8>().write_bytes(0, len) },
        // The content may stay.
        libc::MADV_FREE => {}
        _ => return None,
    }
    Some(0)
}
