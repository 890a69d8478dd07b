//! jemalloc's extent hooks: its extents live in the arena, and decommitting is freeing lazily.
//!
//! Pages that jemalloc decommits go to [`Pages`](crate::pages::Pages), which frees whole granules. jemalloc believes that
//! pages which it commits again are zero, as they are after munmap and mmap; here they may hold what they held. Nobody
//! relies on it: see [`crate::zero`].

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use tikv_jemalloc_sys::{extent_hooks_t, mallctl};

use crate::heap::Heap;
use crate::pages::PAGE;
use crate::{tide, zero};

/// How jemalloc is set up, before it serves its first call.
///
/// Big allocations get no arena of their own, which would lack our hooks, and no odd page in front, which would cost each a
/// second granule.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static CONFIGURATION: Option<&'static c_char> =
    // SAFETY: the first byte of a string that ends in a zero and lives for ever.
    Some(unsafe { &*c"oversize_threshold:0,cache_oblivious:false".as_ptr() });

/// Ordinary memory below this size is not handed back to the kernel piece by piece.
const WORTH_A_CALL: usize = 64 << 10;

static mut HOOKS: extent_hooks_t = extent_hooks_t {
    alloc: Some(alloc),
    // What was claimed stays ours: the host has its memory, and address space is plentiful.
    dalloc: None,
    destroy: None,
    commit: Some(commit),
    decommit: Some(decommit),
    // Pages are decommitted, so that jemalloc says when it uses them again.
    purge_lazy: None,
    purge_forced: None,
    split: Some(split),
    merge: Some(merge),
};

/// Lets all of jemalloc's arenas live in the heap, and give back at once what is free.
pub fn install(granule: usize) -> io::Result<()> {
    let arenas: c_uint = read(c"opt.narenas")?;
    for arena in 0..arenas {
        let hooks = &raw mut HOOKS;
        set(arena, "extent_hooks", hooks)?;
        set(arena, "retain_grow_limit", granule.max(2 << 20))?;
        set(arena, "dirty_decay_ms", 0_isize)?;
        set(arena, "muzzy_decay_ms", 0_isize)?;
    }
    // Number 0 serves jemalloc itself and is slower: it zeroes what it commits, and has ordinary memory from before.
    if arenas > 1 {
        write(c"thread.arena", 1 as c_uint)?;
        // SAFETY: jemalloc is set up and has its arena 0; the count is atomic, and only compared with those of others.
        unsafe {
            let first = arenas_of_jemalloc[0].load(Ordering::Acquire);
            (0..CROWD).for_each(|_| nthreads_inc(first, false));
        }
    }
    Ok(())
}

/// Threads that arena 0 seems to have, so that jemalloc, which gives a new thread the arena with the fewest, gives it another.
const CROWD: usize = 4096;

// jemalloc's own, 5.3: no control of its keeps new threads off an arena.
unsafe extern "C" {
    #[link_name = "_rjem_je_arenas"]
    static arenas_of_jemalloc: [AtomicPtr<c_void>; 1];
    #[link_name = "_rjem_je_arena_nthreads_inc"]
    fn nthreads_inc(arena: *mut c_void, internal: bool);
}

fn result(code: c_int) -> io::Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(code))
    }
}

fn read<T: Default>(name: &CStr) -> io::Result<T> {
    let (mut value, mut size) = (T::default(), size_of::<T>());
    let to = (&raw mut value).cast();
    // SAFETY: the value is as long as `size` says, which jemalloc checks.
    result(unsafe { mallctl(name.as_ptr(), to, &raw mut size, null_mut(), 0) })?;
    Ok(value)
}

fn write<T>(name: &CStr, mut value: T) -> io::Result<()> {
    let from = (&raw mut value).cast();
    // SAFETY: the value is as long as its size says, which jemalloc checks.
    result(unsafe { mallctl(name.as_ptr(), null_mut(), null_mut(), from, size_of::<T>()) })
}

/// Sets `arena.<arena>.<what>`.
fn set<T>(arena: c_uint, what: &str, value: T) -> io::Result<()> {
    let mut name = String::new();
    // Writing to a string does not fail.
    let _ = write!(name, "arena.{arena}.{what}\0");
    let name = CStr::from_bytes_with_nul(name.as_bytes()).map_err(io::Error::other)?;
    write(name, value)
}

/// Memory as every process has it, zero. `None`: there is none.
fn ordinary(size: usize, align: usize) -> Option<*mut c_void> {
    let slack = align.saturating_sub(PAGE);
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let with_slack = size.checked_add(slack)?;
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe { mmap_anonymous(null_mut(), with_slack, prot, MapFlags::PRIVATE).ok()? };
    let lead = (start as usize).next_multiple_of(align) - start as usize;
    let memory = start.wrapping_byte_add(lead);
    for (part, bytes) in [
        (start, lead),
        (memory.wrapping_byte_add(size), slack - lead),
    ] {
        if bytes > 0 {
            // SAFETY: a part of the new mapping that nobody knows yet. A failure leaks it.
            let _ = unsafe { munmap(part, bytes) };
        }
    }
    Some(memory)
}

/// Where an arena grows, jemalloc asks for uncommitted memory and gets a piece of the heap. For its own books, and for what
/// is left when growing fails, it asks for committed memory and gets ordinary memory, as it does when the heap is full.
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
        && align <= PAGE
        && let Some(start) = Heap::get().and_then(|heap| heap.claim(size))
    {
        return start as *mut c_void;
    }
    let memory = ordinary(size, align);
    if memory.is_some() {
        (*zero, *commit) = (true, true);
    }
    memory.unwrap_or(null_mut())
}

/// `false`: done.
unsafe extern "C" fn commit(
    _: *mut extent_hooks_t,
    start: *mut c_void,
    _: usize,
    offset: usize,
    length: usize,
    arena: c_uint,
) -> bool {
    let from = start as usize + offset;
    let Some(heap) = Heap::get().filter(|_| Heap::owns(from)) else {
        return false;
    };
    tide::rise(arena, length / PAGE);
    match (heap.commit(from..from + length), arena) {
        (true, 0) => {}
        // SAFETY: committed now, and nobody has it yet.
        (false, 0) => unsafe { std::ptr::write_bytes(from as *mut u8, 0, length) },
        (true, _) => zero::remember(from..from + length),
        (false, _) => {}
    }
    false
}

/// `false`: done. `true`: the pages stay as they are.
unsafe extern "C" fn decommit(
    _: *mut extent_hooks_t,
    start: *mut c_void,
    _: usize,
    offset: usize,
    length: usize,
    arena: c_uint,
) -> bool {
    let from = start as usize + offset;
    if let Some(heap) = Heap::get().filter(|_| Heap::owns(from)) {
        tide::fall(arena, length / PAGE);
        heap.decommit(from..from + length);
        return false;
    }
    if length < WORTH_A_CALL {
        return true;
    }
    // SAFETY: pages of jemalloc's that nobody uses.
    unsafe { madvise(from as *mut c_void, length, Advice::LinuxDontNeed).is_err() }
}

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

/// Neighbours are one extent unless only one of them is the heap's.
unsafe extern "C" fn merge(
    _: *mut extent_hooks_t,
    first: *mut c_void,
    _: usize,
    second: *mut c_void,
    _: usize,
    _: bool,
    _: c_uint,
) -> bool {
    Heap::owns(first as usize) != Heap::owns(second as usize)
}
