//! fork(3): the child gets a copy of the heap in normal memory, at the same addresses.
//!
//! A device-dax mapping is always shared, so a child that inherited the heap would write into its parent's. The kernel
//! therefore does not pass it on (MADV_DONTFORK), and a child of a bare clone(2) faults at its first access. A fork(3) takes
//! three steps:
//!
//! 1. [`before`], in the parent: jemalloc's locks are held and the other threads are stopped. The committed pages are copied
//!    to normal memory, and the copy is moved to the heap's addresses, where the kernel's fork finds it.
//! 2. [`in_parent`]: the heap is moved back over the copy. Nothing has changed the copy: the other threads were stopped,
//!    signals were blocked, and this thread's stack is elsewhere.
//! 3. [`in_child`]: the child keeps the copy at the heap's addresses and never uses the arena again.
//!
//! glibc takes locks of its own after step 1, and a stopped thread may hold one of them. Then a timer undoes step 1, lets the
//! threads run for a moment, and does it again.
//!
//! vfork(2), posix_spawn(3), system(3) and popen(3) share the parent's memory until they call exec, so nothing is copied.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ebb_guest_agent::memory::{HUGE_PAGE_SIZE, PAGE_SIZE, map_anonymous};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mremap_fixed, munmap};

use crate::heap::Heap;
use crate::{stderr, stop_threads};

/// Bytes of available memory that must remain after the copy.
const RESERVE: usize = 16 << 20;
/// How long the threads run when a fork waits for one of their locks.
const RUN_TIME: Duration = Duration::from_millis(1);

/// Held during a fork.
static FORKING: AtomicBool = AtomicBool::new(false);
/// Address of the heap while the copy has its place, or 0.
static HEAP_MOVED_TO: AtomicUsize = AtomicUsize::new(0);
/// Set while the other threads are stopped.
static STOPPED: AtomicBool = AtomicBool::new(false);

thread_local! {
    // Types without destructors, because registering one allocates.
    /// Why this thread's last fork has no copy of the heap.
    static FAILURE: Cell<Option<CopyError>> = const { Cell::new(None) };
    /// The signal mask before the fork.
    static MASK: Cell<MaybeUninit<libc::sigset_t>> = const { Cell::new(MaybeUninit::uninit()) };
}

/// Why the heap cannot be copied.
#[derive(Clone, Copy)]
enum CopyError {
    StackInHeap,
    NoMemory { bytes: usize },
    NoAddressSpace,
    ThreadsNotStopped,
    CannotMove,
    NoTimer,
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StackInHeap => {
                f.write_str("its stack lies in the heap; fork from a thread's own stack")
            }
            Self::NoMemory { bytes } => write!(
                f,
                "a copy of the heap, {} MiB, does not fit into the available memory; add memory (--memory) or \
                 set EBB_FORK=off",
                bytes.div_ceil(1 << 20)
            ),
            Self::NoAddressSpace => f.write_str(
                "no address space for a copy of the heap; set vm.overcommit_memory to 0 or 1, or raise ulimit -v",
            ),
            Self::ThreadsNotStopped => write!(
                f,
                "other threads did not stop within {} s, or are more than {}",
                stop_threads::STOP_TIMEOUT.as_secs(),
                stop_threads::MAX_THREADS
            ),
            Self::CannotMove => f.write_str(
                "the heap's mapping cannot be moved; has the program split it by mprotect or mlock?",
            ),
            Self::NoTimer => {
                f.write_str("no timer; raise the limit of pending signals (ulimit -i)")
            }
        }
    }
}

/// Registers the three steps for each fork(3). Must come before jemalloc does the same: the handlers before a fork run in
/// reverse order, so jemalloc then holds its locks while the heap is copied.
pub fn register() {
    // SAFETY: the functions live as long as the process.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

/// Checks what can be checked before the heap is copied.
fn check(heap: &Heap) -> Result<(), CopyError> {
    let stack = &raw const heap as usize;
    if heap.range().contains(&stack) {
        return Err(CopyError::StackInHeap);
    }
    let bytes = heap.committed().count() * PAGE_SIZE;
    if available_memory().is_some_and(|available| bytes + RESERVE > available) {
        return Err(CopyError::NoMemory { bytes });
    }
    Ok(())
}

/// MemAvailable of /proc/meminfo in bytes, read without allocating.
fn available_memory() -> Option<usize> {
    let (flags, mode) = (rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty());
    let file = rustix::fs::open(c"/proc/meminfo", flags, mode).ok()?;
    let mut buffer = [0; 1024];
    let len = rustix::io::read(file, &mut buffer).ok()?;
    let text = std::str::from_utf8(&buffer[..len]).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Maps anonymous memory where whole page tables can be moved to and from.
fn reserve(len: usize, prot: ProtFlags) -> Result<*mut c_void, CopyError> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    map_anonymous(len, HUGE_PAGE_SIZE, prot, flags).map_err(|_| CopyError::NoAddressSpace)
}

/// Copies the committed pages and moves the copy to the heap's addresses. The other threads are stopped.
fn replace_by_copy(heap: &Heap) -> Result<(), CopyError> {
    let range = heap.range();
    let (base, len) = (range.start as *mut c_void, range.len());
    let unmap = |memory| {
        // SAFETY: made by `reserve`, and nobody uses it. An error only leaks it.
        let _ = unsafe { munmap(memory, len) };
    };
    let copy = reserve(len, ProtFlags::READ | ProtFlags::WRITE)?;
    let moved_to = reserve(len, ProtFlags::empty()).inspect_err(|_| unmap(copy))?;
    heap.committed().each_run(|run| {
        let (offset, bytes) = (run.start * PAGE_SIZE, run.len() * PAGE_SIZE);
        // SAFETY: committed pages of the heap, and the same offset in the copy, which has the heap's length.
        unsafe {
            std::ptr::copy_nonoverlapping(
                base.byte_add(offset).cast::<u8>(),
                copy.byte_add(offset).cast::<u8>(),
                bytes,
            );
        }
    });
    let flags = MremapFlags::MAYMOVE;
    // SAFETY: nobody uses the heap until the copy or the heap is at its addresses. `moved_to` is our own mapping.
    if unsafe { mremap_fixed(base, len, len, flags, moved_to) }.is_err() {
        unmap(copy);
        unmap(moved_to);
        return Err(CopyError::CannotMove);
    }
    // SAFETY: the addresses that the heap has left.
    if unsafe { mremap_fixed(copy, len, len, flags, base) }.is_err() {
        // SAFETY: as above.
        if unsafe { mremap_fixed(moved_to, len, len, flags, base) }.is_err() {
            abort();
        }
        unmap(copy);
        return Err(CopyError::CannotMove);
    }
    HEAP_MOVED_TO.store(moved_to as usize, Ordering::Relaxed);
    Ok(())
}

/// Moves the heap back over the copy, if it was moved.
fn move_back(heap: &Heap) {
    let moved_to = HEAP_MOVED_TO.swap(0, Ordering::Relaxed);
    if moved_to == 0 {
        return;
    }
    let (base, len) = (heap.range().start as *mut c_void, heap.range().len());
    // SAFETY: the heap returns to its addresses, and nobody has written to the copy.
    let moved = unsafe {
        mremap_fixed(
            moved_to as *mut c_void,
            len,
            len,
            MremapFlags::MAYMOVE,
            base,
        )
    };
    if moved.is_err() {
        abort();
    }
}

/// Without its heap the program cannot go on.
fn abort() -> ! {
    stderr::print(format_args!(
        "the heap cannot be moved back after a fork: out of memory mappings; raise vm.max_map_count"
    ));
    std::process::abort()
}

/// Step 1 without the timer: stops the threads and replaces the heap. Signals are blocked.
fn stop_and_copy(heap: &Heap) -> Result<(), CopyError> {
    let others = stop_threads::has_others();
    if others && !stop_threads::stop() {
        return Err(CopyError::ThreadsNotStopped);
    }
    STOPPED.store(others, Ordering::Relaxed);
    check(heap)
        .and_then(|()| replace_by_copy(heap))
        .inspect_err(|_| move_back_and_resume(heap))
}

/// Undoes [`stop_and_copy`].
fn move_back_and_resume(heap: &Heap) {
    move_back(heap);
    if STOPPED.swap(false, Ordering::Relaxed) {
        stop_threads::resume();
    }
}

/// Called by the stall timer: lets the other threads run for a moment, so that they release their locks.
fn on_stall() {
    let Some(heap) = Heap::get() else { return };
    if HEAP_MOVED_TO.load(Ordering::Relaxed) == 0 {
        return;
    }
    move_back_and_resume(heap);
    std::thread::sleep(RUN_TIME);
    if let Err(failure) = stop_and_copy(heap) {
        // The child will have no heap, and exit.
        FAILURE.set(Some(failure));
    }
}

/// Runs in the parent before the kernel's fork.
pub extern "C" fn before() {
    FAILURE.set(None);
    let Some(heap) = Heap::get() else { return };
    while FORKING.swap(true, Ordering::Acquire) {
        rustix::thread::sched_yield();
    }
    let mut mask = MaybeUninit::uninit();
    // SAFETY: two sets of signals. glibc never blocks its own signals, of which `stop_threads` uses one.
    unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), mask.as_mut_ptr());
    }
    MASK.set(mask);
    let mut done = stop_and_copy(heap);
    if done.is_ok() && STOPPED.load(Ordering::Relaxed) && !stop_threads::start_stall_timer(on_stall)
    {
        move_back_and_resume(heap);
        done = Err(CopyError::NoTimer);
    }
    FAILURE.set(done.err());
}

fn unblock_signals() {
    // SAFETY: `before` has stored the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, MASK.get().as_ptr(), null_mut()) };
}

/// Runs in the parent after the kernel's fork, even if that failed.
pub extern "C" fn in_parent() {
    let Some(heap) = Heap::get() else { return };
    stop_threads::stop_stall_timer();
    move_back_and_resume(heap);
    FORKING.store(false, Ordering::Release);
    unblock_signals();
}

/// Runs in the child before the program's code.
pub extern "C" fn in_child() {
    if Heap::get().is_none() {
        return;
    }
    Heap::detach();
    stop_threads::forget_stall_timer();
    if FAILURE.get().is_some() {
        // This child has no heap. `fork` returns ENOMEM in the parent.
        // SAFETY: ends the process without running its code.
        unsafe { libc::_exit(127) };
    }
    HEAP_MOVED_TO.store(0, Ordering::Relaxed);
    STOPPED.store(false, Ordering::Relaxed);
    FORKING.store(false, Ordering::Relaxed);
    unblock_signals();
}

/// The result of fork(3), where `real_fork` forks and runs the three steps.
///
/// If the heap cannot be copied, prints why and fails with ENOMEM. No child ever shares the heap.
pub fn fork(real_fork: impl FnOnce() -> c_int) -> c_int {
    if let Some(failure) = Heap::get().and_then(|heap| check(heap).err()) {
        return fail(failure);
    }
    let child = real_fork();
    if child <= 0 {
        return child;
    }
    let Some(failure) = FAILURE.take() else {
        return child;
    };
    // SAFETY: the child without a heap, which has not run any code of the program.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, null_mut(), 0);
    }
    fail(failure)
}

/// Prints why a fork has failed. Sets errno and returns -1.
fn fail(failure: CopyError) -> c_int {
    stderr::print(format_args!("fork failed: {failure}"));
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() = libc::ENOMEM };
    -1
}
