//! Stops all other threads of the process while a fork copies the heap, by a signal whose handler waits.
//!
//! The kernel's fork copies memory at one moment. Our copy takes longer, so nobody may write meanwhile.
//!
//! The signal is the one that glibc uses for setuid in threads, because programs cannot block it: nptl(7). Our signals carry
//! a mark; all others are passed on to glibc's handler.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::thread::futex;

/// SIGSETXID of glibc.
const SIGNAL: c_int = 33;
/// At most so many threads can be stopped.
pub const MAX_THREADS: usize = 8192;
/// How long threads may take to stop. A page fault may delay one.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Sleep between two checks whether all threads have stopped.
const POLL_INTERVAL: Duration = Duration::from_micros(50);
/// Marks the signals that stop threads.
const STOP_MARK: usize = 0x6562_6270_6172_6b00;
/// Marks the signals of the stall timer.
const STALL_MARK: usize = STOP_MARK + 1;
/// Period of the stall timer.
const STALL_PERIOD: libc::timespec = libc::timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Odd while threads have to wait.
static EPOCH: AtomicU32 = AtomicU32::new(0);
/// Number of stopped threads, and their ids.
static STOPPED: AtomicUsize = AtomicUsize::new(0);
static STOPPED_IDS: [AtomicI32; MAX_THREADS] = [const { AtomicI32::new(0) }; MAX_THREADS];
/// The handler that was installed before ours.
static OLD_HANDLER: AtomicUsize = AtomicUsize::new(0);
/// The function that the stall timer calls.
static ON_STALL: AtomicUsize = AtomicUsize::new(0);
/// Id of the stall timer, or -1. Not thread-local, because that would allocate.
static STALL_TIMER: AtomicI32 = AtomicI32::new(-1);

type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

global_asm!(
    ".globl ebb_heap_restorer",
    ".hidden ebb_heap_restorer",
    "ebb_heap_restorer:",
    "mov eax, 15", // rt_sigreturn
    "syscall",
);

unsafe extern "C" {
    fn ebb_heap_restorer();
}

/// The kernel's struct sigaction on x86-64.
#[repr(C)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const SA_RESTORER: u64 = 0x0400_0000;

/// Installs our handler by a system call, because glibc's functions refuse its own signal. Returns true on success.
fn install_handler() -> bool {
    let action = KernelSigaction {
        handler: handle as Handler as usize,
        flags: (libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK) as u64 | SA_RESTORER,
        restorer: ebb_heap_restorer as *const () as usize,
        mask: u64::MAX,
    };
    let mut old = KernelSigaction {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    // SAFETY: the kernel's structures, and a handler that may run at any time.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            SIGNAL,
            &raw const action,
            &raw mut old,
            size_of::<u64>(),
        )
    };
    if done == 0 && old.handler != action.handler {
        OLD_HANDLER.store(old.handler, Ordering::Relaxed);
    }
    done == 0
}

/// The signal handler. Allocates nothing and leaves errno alone.
extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid structure.
    let (code, mark) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr as usize) };
    match (code, mark) {
        (libc::SI_QUEUE, STOP_MARK) => wait_while_stopped(),
        (libc::SI_TIMER, STALL_MARK) => {
            let on_stall = ON_STALL.load(Ordering::Relaxed);
            if on_stall != 0 {
                // SAFETY: `start_stall_timer` has stored a function of this type.
                let on_stall: fn() = unsafe { std::mem::transmute(on_stall) };
                on_stall();
            }
        }
        _ => {
            let old = OLD_HANDLER.load(Ordering::Relaxed);
            if old != libc::SIG_DFL && old != libc::SIG_IGN {
                // SAFETY: glibc's handler, which takes these arguments.
                let old: Handler = unsafe { std::mem::transmute(old) };
                old(signal, info, context);
            }
        }
    }
}

fn wait_while_stopped() {
    let epoch = EPOCH.load(Ordering::Acquire);
    if epoch.is_multiple_of(2) {
        return;
    }
    let index = STOPPED.fetch_add(1, Ordering::AcqRel);
    if let Some(id) = STOPPED_IDS.get(index) {
        id.store(own_id(), Ordering::Release);
    }
    while EPOCH.load(Ordering::Acquire) == epoch {
        // Errors mean that the epoch has changed or that a signal came. The loop checks again.
        let _ = futex::wait(&EPOCH, futex::Flags::PRIVATE, epoch, None);
    }
}

fn own_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Calls `each` with the id of every other thread. Returns false if they cannot be listed. Allocates nothing.
fn for_each_other(mut each: impl FnMut(i32)) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open(c"/proc/self/task", flags, Mode::empty()) else {
        return false;
    };
    let me = own_id();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(folder, &mut buffer);
    while let Some(entry) = entries.next() {
        let Ok(entry) = entry else {
            return false;
        };
        let id = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|name| name.parse().ok());
        if let Some(id) = id.filter(|id| *id != me) {
            each(id);
        }
    }
    true
}

/// Returns true if the process has other threads, or if that is unknown.
pub fn has_others() -> bool {
    let mut any = false;
    !for_each_other(|_| any = true) || any
}

fn send_stop(thread: i32) {
    // SAFETY: zeroes are a valid structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_signo = SIGNAL;
    info.si_code = libc::SI_QUEUE;
    // The value follows the sender's process and user ids: siginfo_t in include/uapi/asm-generic/siginfo.h.
    // SAFETY: inside the structure, and aligned.
    unsafe {
        let value = (&raw mut info).cast::<u8>().add(24).cast::<usize>();
        value.write(STOP_MARK);
    }
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the structure is complete. The call fails if the thread has ended.
    unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            SIGNAL,
            &raw const info,
        )
    };
}

fn is_stopped(thread: i32) -> bool {
    let stopped = STOPPED.load(Ordering::Acquire).min(MAX_THREADS);
    STOPPED_IDS[..stopped]
        .iter()
        .any(|id| id.load(Ordering::Acquire) == thread)
}

/// Stops all other threads until [`resume`]. Returns false if they cannot be stopped; then they run.
pub fn stop() -> bool {
    if !install_handler() {
        return false;
    }
    STOPPED.store(0, Ordering::Relaxed);
    for id in &STOPPED_IDS {
        id.store(0, Ordering::Relaxed);
    }
    EPOCH.fetch_add(1, Ordering::AcqRel);
    let start = Instant::now();
    // Thread ids grow, so all ids up to this one have been sent the signal. When ids wrap around, new threads are missed;
    // so after many checks without a new thread, all that still run are sent the signal again.
    let mut signalled = 0;
    let mut idle_checks = 0_u32;
    loop {
        let (mut running, mut highest) = (0, signalled);
        let resend = idle_checks > 1000;
        let listed = for_each_other(|thread| {
            if is_stopped(thread) {
                return;
            }
            running += 1;
            if thread > signalled || resend {
                send_stop(thread);
                highest = highest.max(thread);
            }
        });
        if listed && running == 0 {
            return true;
        }
        let sent = highest > signalled || resend;
        idle_checks = if sent { 0 } else { idle_checks + 1 };
        signalled = highest;
        let too_many = STOPPED.load(Ordering::Relaxed) > MAX_THREADS;
        if !listed || too_many || start.elapsed() > STOP_TIMEOUT {
            resume();
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Lets the stopped threads run.
pub fn resume() {
    EPOCH.fetch_add(1, Ordering::AcqRel);
    let _ = futex::wake(&EPOCH, futex::Flags::PRIVATE, u32::MAX >> 1);
}

/// Starts a timer that calls `on_stall` in a signal handler of this thread every 100 ms, until [`stop_stall_timer`].
///
/// A fork that takes so long waits for a lock of glibc that a stopped thread holds. Returns false if there is no timer.
pub fn start_stall_timer(on_stall: fn()) -> bool {
    ON_STALL.store(on_stall as usize, Ordering::Relaxed);
    // SAFETY: zeroes are a valid structure.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event.sigev_notify_thread_id = own_id();
    event.sigev_value.sival_ptr = STALL_MARK as *mut c_void;
    let (mut id, clock): (c_int, _) = (0, libc::CLOCK_MONOTONIC);
    // SAFETY: the kernel's call with its structures. glibc's function would refuse the signal.
    let made = unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut id) };
    if made != 0 {
        return false;
    }
    STALL_TIMER.store(id, Ordering::Relaxed);
    let times = libc::itimerspec {
        it_interval: STALL_PERIOD,
        it_value: STALL_PERIOD,
    };
    let old = null_mut::<libc::itimerspec>();
    // SAFETY: our own timer.
    let set = unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &raw const times, old) };
    if set != 0 {
        stop_stall_timer();
    }
    set == 0
}

/// Deletes the stall timer, if there is one.
pub fn stop_stall_timer() {
    let id = STALL_TIMER.swap(-1, Ordering::Relaxed);
    if id >= 0 {
        // SAFETY: our own timer.
        unsafe { libc::syscall(libc::SYS_timer_delete, id) };
    }
}

/// To be called in a child of a fork, which inherits no timer.
pub fn forget_stall_timer() {
    STALL_TIMER.store(-1, Ordering::Relaxed);
}
