//! Fork: the child gets a copy of the heap, in ordinary memory, at the same addresses.
//!
//! A device-dax mapping is shared, always; a child with it would write into its parent's heap. So the kernel is told not to
//! hand it on (MADV_DONTFORK), and a child by a bare clone(2) faults at its first touch. A child by fork(3):
//!
//! 1. Before: jemalloc's locks are held, all other threads stand still. What the heap holds is copied to ordinary memory;
//!    then copy and heap change places, so that the copy is what the kernel hands on.
//! 2. Parent: they change back, in one call, and the copy is gone. Nothing has written to it: the other threads stood still,
//!    signals were blocked, and this thread's stack is elsewhere.
//! 3. Child: it has the copy where the heap was, and uses the arena never again.
//!
//! Between 1 and 2 glibc takes locks of its own, one of which a thread that stands still may hold. Then a timer undoes
//! step 1, lets the threads run for a moment, and makes it again.
//!
//! vfork(2), posix_spawn(3), system(3) and popen(3) share the parent's memory until they exec, and cost nothing extra.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap_fixed, munmap};

use crate::heap::Heap;
use crate::pages::PAGE;
use crate::park;
use crate::say::say;

/// Page tables move in whole tables where both addresses agree in these bytes.
const ALIGN: usize = 2 << 20;
/// Ordinary memory, in bytes, that must be left when the copy is made.
const RESERVE: usize = 16 << 20;
/// For how long the threads run when a fork is stuck.
const BREATH: Duration = Duration::from_millis(1);

/// One fork at a time.
static BUSY: AtomicBool = AtomicBool::new(false);
/// Where the heap is while the copy is in its place; 0: it is in its place.
static AWAY: AtomicUsize = AtomicUsize::new(0);
/// Whether threads stand still.
static PARKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    // Without destructors: registering one allocates.
    /// Why this thread's last fork has no copy.
    static FAILED: Cell<Option<Failure>> = const { Cell::new(None) };
    static MASK: Cell<MaybeUninit<libc::sigset_t>> = const { Cell::new(MaybeUninit::uninit()) };
}

/// Why the heap cannot be copied.
#[derive(Clone, Copy)]
enum Failure {
    Stack,
    Memory { bytes: usize },
    Address,
    Threads,
    Move,
    Timer,
}

impl Failure {
    fn say(self) {
        match self {
            Self::Stack => say(format_args!(
                "fork failed: its stack lies in the heap; fork from a thread's own stack"
            )),
            Self::Memory { bytes } => say(format_args!(
                "fork failed: a copy of the heap, {} MiB, does not fit into the available memory; add memory \
                 (--memory) or set EBB_FORK=off",
                bytes.div_ceil(1 << 20)
            )),
            Self::Address => say(format_args!(
                "fork failed: no address space for a copy of the heap; is vm.overcommit_memory 2, or a limit set?"
            )),
            Self::Threads => say(format_args!(
                "fork failed: other threads did not stop within 5 s, or are more than 8192"
            )),
            Self::Move => say(format_args!(
                "fork failed: the heap's mapping cannot be moved; has the program split it with mprotect or mlock?"
            )),
            Self::Timer => say(format_args!(
                "fork failed: no timer; raise the limit of pending signals (ulimit -i)"
            )),
        }
    }
}

/// Has the steps run around each fork(3). Called before jemalloc does the same, so that its locks are held when the heap is
/// copied: handlers run before a fork in the reverse of their order.
pub fn register() {
    // SAFETY: the three functions live as long as the process.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

/// Why a fork would fail now. Everything that can be known before the kernel is asked for a child.
fn obstacle(heap: &Heap) -> Option<Failure> {
    let stack = &raw const heap as usize;
    if heap.range().contains(&stack) {
        return Some(Failure::Stack);
    }
    let bytes = heap.pages().used() * PAGE;
    let fits = available().is_none_or(|available| bytes + RESERVE <= available);
    (!fits).then_some(Failure::Memory { bytes })
}

/// MemAvailable of /proc/meminfo, in bytes, read without allocating.
fn available() -> Option<usize> {
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

fn anonymous(len: usize, prot: ProtFlags) -> Option<*mut c_void> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe { mmap_anonymous(null_mut(), len + ALIGN, prot, flags).ok()? };
    let lead = (start as usize).next_multiple_of(ALIGN) - start as usize;
    let memory = start.wrapping_byte_add(lead);
    for (part, bytes) in [(start, lead), (memory.wrapping_byte_add(len), ALIGN - lead)] {
        if bytes > 0 {
            // SAFETY: a part of the new mapping that nobody knows yet. A failure leaks it.
            let _ = unsafe { munmap(part, bytes) };
        }
    }
    Some(memory)
}

/// Copies what the heap holds and puts the copy in its place. Nobody else runs.
fn replace(heap: &Heap) -> Result<(), Failure> {
    let range = heap.range();
    let (base, len) = (range.start as *mut c_void, range.len());
    let copy = anonymous(len, ProtFlags::READ | ProtFlags::WRITE).ok_or(Failure::Address)?;
    let drop = |memory| {
        // SAFETY: made above, and nobody has a part of it. A failure leaks it.
        let _ = unsafe { munmap(memory, len) };
    };
    let Some(away) = anonymous(len, ProtFlags::empty()) else {
        drop(copy);
        return Err(Failure::Address);
    };
    heap.pages().each_run(|run| {
        let (offset, bytes) = (run.start * PAGE, run.len() * PAGE);
        // SAFETY: committed pages of the heap, and as much of the copy, which is as long as the heap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                base.byte_add(offset).cast::<u8>(),
                copy.byte_add(offset).cast::<u8>(),
                bytes,
            );
        }
    });
    let flags = MremapFlags::MAYMOVE;
    // SAFETY: nobody uses the heap until it is back or the copy is in its place; `away` is a mapping of our own.
    if unsafe { mremap_fixed(base, len, len, flags, away) }.is_err() {
        drop(copy);
        drop(away);
        return Err(Failure::Move);
    }
    // SAFETY: the room that the heap has left.
    if unsafe { mremap_fixed(copy, len, len, flags, base) }.is_err() {
        // SAFETY: as above.
        if unsafe { mremap_fixed(away, len, len, flags, base) }.is_err() {
            abandon();
        }
        drop(copy);
        return Err(Failure::Move);
    }
    AWAY.store(away as usize, Ordering::Relaxed);
    Ok(())
}

/// Puts the heap back over the copy.
fn restore(heap: &Heap) {
    let away = AWAY.swap(0, Ordering::Relaxed);
    if away == 0 {
        return;
    }
    let range = heap.range();
    let (base, len) = (range.start as *mut c_void, range.len());
    // SAFETY: the heap goes where its users expect it; nobody has written to the copy.
    let back = unsafe { mremap_fixed(away as *mut c_void, len, len, MremapFlags::MAYMOVE, base) };
    if back.is_err() {
        abandon();
    }
}

/// The heap cannot be put back: no memory of the program is where it should be.
fn abandon() -> ! {
    say(format_args!(
        "the heap cannot be moved back after a fork: out of memory mappings"
    ));
    std::process::abort()
}

/// Step 1, all of it. Signals are blocked.
fn prepare(heap: &Heap) -> Result<(), Failure> {
    let others = park::has_others();
    if others && !park::park() {
        return Err(Failure::Threads);
    }
    PARKED.store(others, Ordering::Relaxed);
    let done = obstacle(heap)
        .map_or(Ok(()), Err)
        .and_then(|()| replace(heap));
    if done.is_err() {
        release(heap);
    }
    done
}

/// Step 2, all of it.
fn release(heap: &Heap) {
    restore(heap);
    if PARKED.swap(false, Ordering::Relaxed) {
        park::unpark();
    }
}

/// The fork waits for a lock that a thread holds.
fn rescue() {
    let Some(heap) = Heap::get() else { return };
    if AWAY.load(Ordering::Relaxed) == 0 {
        return;
    }
    release(heap);
    std::thread::sleep(BREATH);
    if let Err(failure) = prepare(heap) {
        // The child will find nothing in the heap's place, and end.
        FAILED.set(Some(failure));
    }
}

/// Runs in the parent before the kernel is asked for a child.
pub extern "C" fn before() {
    FAILED.set(None);
    let Some(heap) = Heap::get() else { return };
    while BUSY.swap(true, Ordering::Acquire) {
        rustix::thread::sched_yield();
    }
    let mut mask = MaybeUninit::uninit();
    // SAFETY: two sets of signals. glibc leaves its own signals, which `park` uses, unblocked.
    unsafe {
        let mut all = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), mask.as_mut_ptr());
    }
    MASK.set(mask);
    let mut done = prepare(heap);
    if done.is_ok() && PARKED.load(Ordering::Relaxed) && !park::arm_rescue(rescue) {
        release(heap);
        done = Err(Failure::Timer);
    }
    FAILED.set(done.err());
}

fn unblock() {
    // SAFETY: `before` has stored it.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, MASK.get().as_ptr(), null_mut()) };
}

/// Runs in the parent when the child is there, or was refused.
pub extern "C" fn in_parent() {
    let Some(heap) = Heap::get() else { return };
    park::disarm_rescue();
    release(heap);
    BUSY.store(false, Ordering::Release);
    unblock();
}

/// Runs in the child before anything of the program does.
pub extern "C" fn in_child() {
    if Heap::get().is_none() {
        return;
    }
    Heap::detach();
    park::forget_rescue();
    if FAILED.get().is_some() {
        // There is nothing in the heap's place. The parent is told ENOMEM.
        // SAFETY: ends the process without running anything of it.
        unsafe { libc::_exit(127) };
    }
    AWAY.store(0, Ordering::Relaxed);
    PARKED.store(false, Ordering::Relaxed);
    BUSY.store(false, Ordering::Relaxed);
    unblock();
}

/// What fork(3) answers in this process: `real` forks and runs the three steps.
///
/// ENOMEM where the heap cannot be copied, and a line that says why; nothing is ever shared.
pub fn fork(real: impl FnOnce() -> c_int) -> c_int {
    if let Some(failure) = Heap::get().and_then(obstacle) {
        failure.say();
        set_errno(libc::ENOMEM);
        return -1;
    }
    let child = real();
    if child <= 0 {
        return child;
    }
    let Some(failure) = FAILED.take() else {
        return child;
    };
    failure.say();
    // SAFETY: the child that has no heap; it has run nothing of the program.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, null_mut(), 0);
    }
    set_errno(libc::ENOMEM);
    -1
}

fn set_errno(code: c_int) {
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() = code };
}
