//! Makes all other threads of the process stand still, while a fork copies the heap.
//!
//! A fork by the kernel is a cut: no thread's later write is in the child without its earlier ones. A copy that others
//! write to meanwhile is none, so they wait in a signal handler. The signal is the one that glibc keeps for setuid in
//! threads, which programs cannot block (nptl(7)); what comes from glibc is handed on to its own handler, and what comes
//! from here bears a mark of ours.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::thread::futex;

/// SIGSETXID of glibc's nptl.
const SIGNAL: c_int = 33;
/// Most threads that can be parked.
const THREADS: usize = 8192;
/// How long a thread may take to stop, for instance in a page fault.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks.
const NAP: Duration = Duration::from_micros(50);
/// Marks signals that park, and those of [`arm_rescue`].
const PARK: usize = 0x6562_6270_6172_6b00;
const RESCUE: usize = PARK + 1;
/// Time after which a fork that does not get on is rescued.
const STUCK: libc::timespec = libc::timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Odd while threads are to wait.
static EPOCH: AtomicU32 = AtomicU32::new(0);
static PARKED: AtomicUsize = AtomicUsize::new(0);
static WHO: [AtomicI32; THREADS] = [const { AtomicI32::new(0) }; THREADS];
/// What handled the signal before, and is called for signals that are not ours.
static BEFORE: AtomicUsize = AtomicUsize::new(0);
/// What the timer calls.
static ON_RESCUE: AtomicUsize = AtomicUsize::new(0);

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
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const SA_RESTORER: u64 = 0x0400_0000;

/// Makes our handler the signal's. glibc refuses to do that for a signal of its own, so the kernel is asked.
fn install() -> bool {
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = handle;
    let action = Action {
        handler: handler as usize,
        flags: (libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK) as u64 | SA_RESTORER,
        restorer: ebb_heap_restorer as *const () as usize,
        mask: u64::MAX,
    };
    let mut before = Action {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    // SAFETY: both structures are the kernel's; the handler is safe to run at any time.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            SIGNAL,
            &raw const action,
            &raw mut before,
            size_of::<u64>(),
        )
    };
    if done == 0 && before.handler != action.handler {
        BEFORE.store(before.handler, Ordering::Relaxed);
    }
    done == 0
}

/// Allocates nothing and leaves errno alone.
extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes it.
    let (code, mark) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr as usize) };
    match (code, mark) {
        (libc::SI_QUEUE, PARK) => wait(),
        (libc::SI_TIMER, RESCUE) => {
            let rescue = ON_RESCUE.load(Ordering::Relaxed);
            if rescue != 0 {
                // SAFETY: stored by `arm_rescue` from a function of that type.
                let rescue: fn() = unsafe { std::mem::transmute(rescue) };
                rescue();
            }
        }
        // 0 and 1 are SIG_DFL and SIG_IGN.
        _ => {
            let before = BEFORE.load(Ordering::Relaxed);
            if before > 1 {
                // SAFETY: the handler that was installed before ours, which takes these arguments.
                let before: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    unsafe { std::mem::transmute(before) };
                before(signal, info, context);
            }
        }
    }
}

/// Stands still while the epoch is odd.
fn wait() {
    let epoch = EPOCH.load(Ordering::Acquire);
    if epoch.is_multiple_of(2) {
        return;
    }
    let place = PARKED.fetch_add(1, Ordering::AcqRel);
    if let Some(who) = WHO.get(place) {
        who.store(own_id(), Ordering::Release);
    }
    while EPOCH.load(Ordering::Acquire) == epoch {
        // Woken, or the epoch has changed before it slept: both are looked at again.
        let _ = futex::wait(&EPOCH, futex::Flags::PRIVATE, epoch, None);
    }
}

fn own_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Calls `each` with the other threads' ids; whether they could be listed.
fn others(mut each: impl FnMut(i32)) -> bool {
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

/// Whether the process has other threads. `true` when that is not known.
pub fn has_others() -> bool {
    let mut any = false;
    !others(|_| any = true) || any
}

fn send(thread: i32) {
    // SAFETY: zeroes are a valid structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_signo = SIGNAL;
    info.si_code = libc::SI_QUEUE;
    // The value's place is fixed: behind the sender's process and user, see siginfo_t in the kernel's uapi/asm-generic.
    // SAFETY: inside the structure, and aligned.
    unsafe {
        let place = (&raw mut info).cast::<u8>().add(24).cast::<usize>();
        place.write(PARK);
    }
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the structure is complete. A thread that has ended meanwhile is no harm.
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

fn is_parked(thread: i32) -> bool {
    let parked = PARKED.load(Ordering::Acquire).min(THREADS);
    WHO[..parked]
        .iter()
        .any(|who| who.load(Ordering::Acquire) == thread)
}

/// All other threads stand still, until [`unpark`]. `false`: they do not, and go on.
pub fn park() -> bool {
    if !install() {
        return false;
    }
    PARKED.store(0, Ordering::Relaxed);
    WHO.iter().for_each(|who| who.store(0, Ordering::Relaxed));
    EPOCH.fetch_add(1, Ordering::AcqRel);
    let start = Instant::now();
    // Ids grow, so whoever was sent the signal is below this, but for ids that wrapped around: those wait for no signal and
    // are given one when nothing else is to be done.
    let mut signalled = 0;
    let mut quiet = 0_u32;
    loop {
        let (mut running, mut highest) = (0, signalled);
        let again = quiet > 1000;
        let listed = others(|thread| {
            if is_parked(thread) {
                return;
            }
            running += 1;
            if thread > signalled || again {
                send(thread);
                highest = highest.max(thread);
            }
        });
        if listed && running == 0 {
            return true;
        }
        quiet = if highest > signalled || again {
            0
        } else {
            quiet + 1
        };
        signalled = highest;
        if !listed || start.elapsed() > PATIENCE || PARKED.load(Ordering::Relaxed) > THREADS {
            unpark();
            return false;
        }
        std::thread::sleep(NAP);
    }
}

/// Lets them go on.
pub fn unpark() {
    EPOCH.fetch_add(1, Ordering::AcqRel);
    let _ = futex::wake(&EPOCH, futex::Flags::PRIVATE, u32::MAX >> 1);
}

/// The timer of [`arm_rescue`]; -1: there is none. Not in a thread's own storage: nothing may be allocated here.
static TIMER: AtomicI32 = AtomicI32::new(-1);

/// Calls `rescue` in a signal handler of this thread every 100 ms, until [`disarm_rescue`]: when it has waited for so long,
/// then for a lock of glibc's that a parked thread holds. `false`: there is no timer.
pub fn arm_rescue(rescue: fn()) -> bool {
    ON_RESCUE.store(rescue as usize, Ordering::Relaxed);
    // SAFETY: zeroes are a valid structure.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event.sigev_notify_thread_id = own_id();
    event.sigev_value.sival_ptr = RESCUE as *mut c_void;
    let (mut id, clock): (c_int, _) = (0, libc::CLOCK_MONOTONIC);
    // SAFETY: the kernel's call, with its structures. glibc's would refuse the signal.
    let made = unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut id) };
    if made != 0 {
        return false;
    }
    TIMER.store(id, Ordering::Relaxed);
    let times = libc::itimerspec {
        it_interval: STUCK,
        it_value: STUCK,
    };
    let before = std::ptr::null_mut::<libc::itimerspec>();
    // SAFETY: the timer is ours.
    let set = unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &raw const times, before) };
    if set != 0 {
        disarm_rescue();
    }
    set == 0
}

/// Ends the timer, if there is one.
pub fn disarm_rescue() {
    let id = TIMER.swap(-1, Ordering::Relaxed);
    if id >= 0 {
        // SAFETY: the timer is ours.
        unsafe { libc::syscall(libc::SYS_timer_delete, id) };
    }
}

/// A child has no timer.
pub fn forget_rescue() {
    TIMER.store(-1, Ordering::Relaxed);
}
