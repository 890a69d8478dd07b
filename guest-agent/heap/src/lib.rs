//! jemalloc on an Ebb arena.
//!
//! A program's heap lives in an arena, device-dax memory that the monitor may take back wherever it is free. Freeing and
//! reusing are one compare-and-swap a granule: no call, no TLB shootdown, no fault on what was not taken. Without an arena,
//! or when it is full, the heap is ordinary memory.
//!
//! A Rust program names [`EbbMalloc`] as its `#[global_allocator]`; other programs are run with `libebb_malloc.so`, which is
//! made of the same parts.
//!
//! Environment: `EBB_ARENA` is the device, or else the first of `/dev/dax*` that is an arena. `EBB_FORK=off` uses no arena;
//! `copy`, the default, copies the heap for children, see [`fork`]. `EBB_QUIET=1` leaves out the line about a missing arena.

pub mod fork;
mod heap;
mod hooks;
mod pages;
mod park;
mod say;
mod start;
mod tide;
mod zero;

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{c_int, c_void};

use tikv_jemalloc_sys as jemalloc;

use heap::Heap;
pub use start::start;

/// Whether this process has its heap in an arena: it found one, and is no child of a fork.
#[must_use]
pub fn uses_arena() -> bool {
    Heap::get().is_some()
}

/// Alignment, in bytes, that every allocation has which is at least as big.
const ALIGN: usize = 16;

/// What goes before every allocation.
#[inline]
fn before_allocating() {
    start::first_call();
    if tide::ebbs() {
        tide::allocated();
    }
}

/// `malloc(size)`.
///
/// # Safety
/// As malloc(3).
#[inline]
pub unsafe fn malloc(size: usize) -> *mut c_void {
    before_allocating();
    // SAFETY: the caller's.
    unsafe { jemalloc::malloc(size) }
}

/// `calloc(count, size)`.
///
/// # Safety
/// As calloc(3).
pub unsafe fn calloc(count: usize, size: usize) -> *mut c_void {
    before_allocating();
    let total = count.checked_mul(size).filter(|total| *total > zero::SMALL);
    match total.filter(|_| Heap::get().is_some()) {
        // SAFETY: the caller's; a small request, or memory that is zero where jemalloc believes it.
        None => unsafe { jemalloc::calloc(count, size) },
        Some(total) => {
            zero::forget();
            // SAFETY: the caller's.
            let memory = unsafe { jemalloc::malloc(total) };
            if !memory.is_null() {
                // SAFETY: just allocated by this thread.
                unsafe { zero::clear(memory.cast(), total) };
            }
            memory
        }
    }
}

/// `realloc(memory, size)`.
///
/// # Safety
/// As realloc(3).
#[inline]
pub unsafe fn realloc(memory: *mut c_void, size: usize) -> *mut c_void {
    before_allocating();
    // SAFETY: the caller's.
    unsafe { jemalloc::realloc(memory, size) }
}

/// `posix_memalign(memory, align, size)`.
///
/// # Safety
/// As posix_memalign(3).
pub unsafe fn posix_memalign(memory: *mut *mut c_void, align: usize, size: usize) -> c_int {
    before_allocating();
    // SAFETY: the caller's.
    unsafe { jemalloc::posix_memalign(memory, align, size) }
}

/// `aligned_alloc(align, size)`.
///
/// # Safety
/// As aligned_alloc(3).
pub unsafe fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    before_allocating();
    // SAFETY: the caller's.
    unsafe { jemalloc::aligned_alloc(align, size) }
}

/// `free(memory)`.
///
/// # Safety
/// As free(3).
#[inline]
pub unsafe fn free(memory: *mut c_void) {
    if tide::ebbs() {
        // SAFETY: the caller's.
        return unsafe { tide::free(memory) };
    }
    // SAFETY: the caller's.
    unsafe { jemalloc::free(memory) }
}

/// `malloc_usable_size(memory)`.
///
/// # Safety
/// As malloc_usable_size(3).
pub unsafe fn usable_size(memory: *const c_void) -> usize {
    // SAFETY: the caller's.
    unsafe { jemalloc::malloc_usable_size(memory) }
}

/// The allocator of Rust programs.
#[derive(Clone, Copy, Debug, Default)]
pub struct EbbMalloc;

/// jemalloc's flag for an alignment; 0 where every allocation of that size has it.
const fn flags(layout: Layout) -> c_int {
    if layout.align() <= ALIGN && layout.align() <= layout.size() {
        0
    } else {
        jemalloc::MALLOCX_ALIGN(layout.align())
    }
}

// SAFETY: jemalloc's functions, with the sizes and alignments that they were asked for.
unsafe impl GlobalAlloc for EbbMalloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        before_allocating();
        // SAFETY: a layout's size is not 0 here.
        unsafe { jemalloc::mallocx(layout.size(), flags(layout)).cast() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= ALIGN {
            // SAFETY: as above.
            return unsafe { calloc(1, layout.size()).cast() };
        }
        zero::forget();
        // SAFETY: as above.
        let memory = unsafe { self.alloc(layout) };
        if !memory.is_null() {
            // SAFETY: just allocated by this thread.
            unsafe { zero::clear(memory, layout.size()) };
        }
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if tide::ebbs() {
            // SAFETY: it is from `alloc`.
            return unsafe { tide::free(memory.cast()) };
        }
        // SAFETY: it is from `alloc`, with this layout.
        unsafe { jemalloc::sdallocx(memory.cast(), layout.size(), flags(layout)) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the size does not overflow when rounded up to the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: it is from `alloc`, with this layout.
        unsafe { jemalloc::rallocx(memory.cast(), size, flags(new)).cast() }
    }
}
