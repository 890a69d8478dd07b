//! jemalloc with its heap in an Ebb arena.
//!
//! Freeing and reusing a granule is one compare-and-swap: no system call, no TLB shootdown, and no page fault unless the host
//! has taken the memory. Without an arena, or when it is full, the heap is normal memory.
//!
//! Rust programs use [`EbbMalloc`] as their `#[global_allocator]`. `libebb_malloc.so` exports the functions of this crate to
//! other programs.
//!
//! Environment variables:
//! - `EBB_NO_FORK`: id of the process that never forks, see [`fork`]. Any other process has normal memory.
//! - `EBB_ARENA`: the device. Default: the first of `/dev/dax*` that can be opened.
//! - `EBB_QUIET=1`: print no message when there is no arena.

mod committed;
pub mod fork;
mod heap;
mod hooks;
mod pages;
mod shrink;
mod start;
mod stderr;
mod zero;

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{c_int, c_void};

use tikv_jemalloc_sys as jemalloc;

use heap::Heap;
pub use pages::advise;

/// Returns true if this process has its heap in an arena.
#[must_use]
pub fn uses_arena() -> bool {
    Heap::get().is_some()
}

/// Alignment in bytes of every allocation of at least this size.
const MIN_ALIGN: usize = 16;

/// To be called before every allocation.
#[inline]
fn before_allocation() {
    start::before_first_allocation();
    if shrink::is_shrinking() {
        shrink::before_allocation();
    }
}

/// Zeroes what `allocate` returns, where jemalloc would take old content for zero.
///
/// # Safety
/// `allocate` returns `size` bytes of new memory, or null.
unsafe fn zeroed(size: usize, allocate: impl FnOnce() -> *mut c_void) -> *mut c_void {
    zero::clear_known_zero();
    let memory = allocate();
    if !memory.is_null() {
        // SAFETY: just allocated by this thread.
        unsafe { zero::fill(memory.cast(), size) };
    }
    memory
}

/// `malloc(size)`.
///
/// # Safety
/// As malloc(3).
#[inline]
pub unsafe fn malloc(size: usize) -> *mut c_void {
    before_allocation();
    // SAFETY: the caller's promise.
    unsafe { jemalloc::malloc(size) }
}

/// `calloc(count, size)`.
///
/// # Safety
/// As calloc(3).
pub unsafe fn calloc(count: usize, size: usize) -> *mut c_void {
    before_allocation();
    let total = count.checked_mul(size);
    let large = total.filter(|total| *total > zero::MAX_SLAB_REQUEST && uses_arena());
    // SAFETY: the caller's promise.
    unsafe {
        match large {
            None => jemalloc::calloc(count, size),
            Some(total) => zeroed(total, || jemalloc::malloc(total)),
        }
    }
}

/// `realloc(memory, size)`.
///
/// # Safety
/// As realloc(3).
#[inline]
pub unsafe fn realloc(memory: *mut c_void, size: usize) -> *mut c_void {
    before_allocation();
    // SAFETY: the caller's promise.
    unsafe { jemalloc::realloc(memory, size) }
}

/// `posix_memalign(memory, align, size)`.
///
/// # Safety
/// As posix_memalign(3).
pub unsafe fn posix_memalign(memory: *mut *mut c_void, align: usize, size: usize) -> c_int {
    before_allocation();
    // SAFETY: the caller's promise.
    unsafe {
        match pages::allocate(align, size) {
            None => jemalloc::posix_memalign(memory, align, size),
            Some(pages) if pages.is_null() => libc::ENOMEM,
            Some(pages) => {
                *memory = pages;
                0
            }
        }
    }
}

/// `aligned_alloc(align, size)`.
///
/// # Safety
/// As aligned_alloc(3).
pub unsafe fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    before_allocation();
    // SAFETY: the caller's promise; the thread's own errno.
    unsafe {
        match pages::allocate(align, size) {
            None => jemalloc::aligned_alloc(align, size),
            Some(pages) => {
                if pages.is_null() {
                    *libc::__errno_location() = libc::ENOMEM;
                }
                pages
            }
        }
    }
}

/// `free(memory)`.
///
/// # Safety
/// As free(3).
#[inline]
pub unsafe fn free(memory: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe {
        if shrink::is_shrinking() {
            shrink::free_uncached(memory);
        } else {
            jemalloc::free(memory);
        }
    }
}

/// `malloc_usable_size(memory)`.
///
/// # Safety
/// As malloc_usable_size(3).
pub unsafe fn usable_size(memory: *const c_void) -> usize {
    // SAFETY: the caller's promise.
    unsafe { jemalloc::malloc_usable_size(memory) }
}

/// The allocator of Rust programs.
#[derive(Clone, Copy, Debug, Default)]
pub struct EbbMalloc;

/// jemalloc's flag for an alignment, or 0 if allocations of that size have it anyway.
const fn flags(layout: Layout) -> c_int {
    if layout.align() <= MIN_ALIGN && layout.align() <= layout.size() {
        0
    } else {
        jemalloc::MALLOCX_ALIGN(layout.align())
    }
}

// SAFETY: jemalloc's functions, called with the requested size and alignment.
unsafe impl GlobalAlloc for EbbMalloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        before_allocation();
        // SAFETY: the size of a layout is not 0 here.
        unsafe { jemalloc::mallocx(layout.size(), flags(layout)).cast() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            if layout.align() <= MIN_ALIGN {
                calloc(1, layout.size()).cast()
            } else {
                zeroed(layout.size(), || self.alloc(layout).cast()).cast()
            }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the memory is from `alloc` with this layout.
        unsafe {
            if shrink::is_shrinking() {
                shrink::free_uncached(memory.cast());
            } else {
                jemalloc::sdallocx(memory.cast(), layout.size(), flags(layout));
            }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the size does not overflow when rounded up to the alignment, and the memory is from `alloc`.
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            jemalloc::rallocx(memory.cast(), size, flags(new)).cast()
        }
    }
}
