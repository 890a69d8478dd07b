//! jemalloc's extent hooks: they place its extents in the Ebb arena and free decommitted granules.
//!
//! "Arena" has two meanings here. A *jemalloc arena* is one of jemalloc's pools of extents. An *Ebb arena* is the guest
//! memory that is this process's [`Heap`].
//!
//! jemalloc takes newly committed pages for zero, but ours may hold old content. [`crate::zero`] deals with that.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use ebb_guest_agent::memory::{HUGE_PAGE_SIZE, PAGE_SIZE, map_anonymous};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use tikv_jemalloc_sys::{extent_hooks_t, mallctl};

use crate::heap::Heap;
use crate::{pages, shrink, zero};

/// jemalloc's options. It reads them at its first call.
///
/// `oversize_threshold:0`: no separate jemalloc arena for large allocations, because it would lack our hooks.
/// `cache_oblivious:false`: no extra page in front of large allocations, because it would take another granule.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static CONFIGURATION: Option<&'static c_char> =
    // SAFETY: the first byte of a static string that ends with a zero.
    Some(unsafe { &*c"oversize_threshold:0,cache_oblivious:false".as_ptr() });

/// Smaller pieces of normal memory are not returned to the kernel, because the system call costs more than it saves.
const MIN_MADVISE: usize = 64 << 10;

static mut HOOKS: extent_hooks_t = extent_hooks_t {
    alloc: Some(alloc),
    // Claimed granules stay ours: the host gets their memory anyway, and address space is plentiful.
    dalloc: None,
    destroy: None,
    commit: Some(commit),
    decommit: Some(decommit),
    // Without these, jemalloc decommits free pages, and so tells us before it uses them again.
    purge_lazy: None,
    purge_forced: None,
    split: Some(split),
    merge: Some(merge),
};

/// Installs the hooks in all jemalloc arenas and makes them decommit free pages at once.
pub fn install(granule: usize) -> io::Result<()> {
    let arenas: c_uint = read(c"opt.narenas")?;
    for arena in 0..arenas {
        let hooks = &raw mut HOOKS;
        set(arena, "extent_hooks", hooks)?;
        set(arena, "retain_grow_limit", granule.max(HUGE_PAGE_SIZE))?;
        set(arena, "dirty_decay_ms", 0_isize)?;
        set(arena, "muzzy_decay_ms", 0_isize)?;
    }
    if arenas > 1 {
        keep_threads_off_arena_0()?;
    }
    pages::install(read(c"arenas.create")?);
    Ok(())
}

/// Number of threads that we pretend jemalloc's arena 0 has. jemalloc puts a new thread on the arena with the fewest.
const PRETENDED_THREADS: usize = 4096;

// Internals of jemalloc 5.3, because it has no option to keep threads off an arena.
unsafe extern "C" {
    #[link_name = "_rjem_je_arenas"]
    static jemalloc_arenas: [AtomicPtr<c_void>; 1];
    #[link_name = "_rjem_je_arena_nthreads_inc"]
    fn increment_thread_count(arena: *mut c_void, internal: bool);
}

/// Arena 0 serves jemalloc itself. It is slower, because `commit` zeroes its pages, and holds normal memory from before.
fn keep_threads_off_arena_0() -> io::Result<()> {
    write(c"thread.arena", 1 as c_uint)?;
    // SAFETY: jemalloc is initialized and has its arena 0. The count is atomic and only compared with other counts.
    unsafe {
        let arena = jemalloc_arenas[0].load(Ordering::Acquire);
        (0..PRETENDED_THREADS).for_each(|_| increment_thread_count(arena, false));
    }
    Ok(())
}

fn result(code: c_int) -> io::Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(code))
    }
}

/// Reads a control of jemalloc: mallctl in jemalloc(3).
fn read<T: Default>(name: &CStr) -> io::Result<T> {
    let (mut value, mut size) = (T::default(), size_of::<T>());
    let to = (&raw mut value).cast();
    // SAFETY: `size` is the value's size, and jemalloc checks it.
    result(unsafe { mallctl(name.as_ptr(), to, &raw mut size, null_mut(), 0) })?;
    Ok(value)
}

/// Writes a control of jemalloc.
fn write<T>(name: &CStr, mut value: T) -> io::Result<()> {
    let from = (&raw mut value).cast();
    // SAFETY: the last argument is the value's size, and jemalloc checks it.
    result(unsafe { mallctl(name.as_ptr(), null_mut(), null_mut(), from, size_of::<T>()) })
}

/// Writes the control `arena.<arena>.<option>`.
fn set<T>(arena: c_uint, option: &str, value: T) -> io::Result<()> {
    let mut name = String::new();
    // Writing to a string does not fail.
    let _ = write!(name, "arena.{arena}.{option}\0");
    let name = CStr::from_bytes_with_nul(name.as_bytes()).map_err(io::Error::other)?;
    write(name, value)
}

/// Returns an extent, or null.
///
/// jemalloc asks for uncommitted memory when an arena grows, and gets a part of the heap. It asks for committed memory for
/// its own data, and again when growing fails. Then it gets normal memory, as it does when the heap is full.
unsafe extern "C" fn alloc(
    _: *mut extent_hooks_t,
    wanted: *mut c_void,
    size: usize,
    align: usize,
    zero: *mut bool,
    commit: *mut bool,
    _: c_uint,
) -> *mut c_void {
    if !wanted.is_null() {
        return null_mut();
    }
    // SAFETY: jemalloc passes two variables of its own.
    let (zero, commit) = unsafe { (&mut *zero, &mut *commit) };
    if !*commit
        && !*zero
        && align <= PAGE_SIZE
        && let Some(start) = Heap::get().and_then(|heap| heap.claim(size))
    {
        return start as *mut c_void;
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let Ok(memory) = map_anonymous(size, align, prot, MapFlags::PRIVATE) else {
        return null_mut();
    };
    (*zero, *commit) = (true, true);
    memory
}

/// Returns false for success.
unsafe extern "C" fn commit(
    _: *mut extent_hooks_t,
    start: *mut c_void,
    _: usize,
    offset: usize,
    length: usize,
    jemalloc_arena: c_uint,
) -> bool {
    let from = start as usize + offset;
    let Some(heap) = Heap::get().filter(|_| Heap::contains(from)) else {
        return false;
    };
    shrink::committed(jemalloc_arena, length / PAGE_SIZE);
    match (heap.commit(from..from + length), jemalloc_arena) {
        (true, 0) => {}
        // SAFETY: just committed, and nobody uses it yet.
        (false, 0) => unsafe { std::ptr::write_bytes(from as *mut u8, 0, length) },
        (true, _) => zero::set_known_zero(from..from + length),
        (false, _) => {}
    }
    false
}

/// Returns false for success, and true if the pages stay committed.
unsafe extern "C" fn decommit(
    _: *mut extent_hooks_t,
    start: *mut c_void,
    _: usize,
    offset: usize,
    length: usize,
    jemalloc_arena: c_uint,
) -> bool {
    let from = start as usize + offset;
    if let Some(heap) = Heap::get().filter(|_| Heap::contains(from)) {
        shrink::decommitted(jemalloc_arena, length / PAGE_SIZE);
        heap.decommit(from..from + length);
        return false;
    }
    if length < MIN_MADVISE {
        return true;
    }
    // SAFETY: pages of jemalloc that nobody uses.
    unsafe { madvise(from as *mut c_void, length, Advice::LinuxDontNeed).is_err() }
}

/// Allows every split: returns false.
unsafe extern "C" fn split(
    _: *mut extent_hooks_t,
    _: *mut c_void,
    _: usize,
    _: usize,
    _: usize,
    _: bool,
    _: c_uint,
) -> bool {
    false
}

/// Refuses to merge an extent of the heap with one of normal memory: returns true.
unsafe extern "C" fn merge(
    _: *mut extent_hooks_t,
    first: *mut c_void,
    _: usize,
    second: *mut c_void,
    _: usize,
    _: bool,
    _: c_uint,
) -> bool {
    Heap::contains(first as usize) != Heap::contains(second as usize)
}
