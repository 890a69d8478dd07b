//! A program that knows nothing of Ebb and does what is hard for a malloc with a heap of its own kind.
//!
//! `ebb-cases CASE…` does each, and prints `CASE: right`, or `CASE: right, no fork` if a fork was refused with ENOSYS. Anything
//! else ends it with an error, and so does a minute without an end.

use std::ffi::{c_int, c_void};
use std::io::{Error, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;

const PAGE: usize = 4096;
/// Seconds after which nothing comes any more.
const LIMIT: u32 = 60;

/// Turns what a C function returns into a result.
fn check(returned: c_int) -> Result<c_int> {
    (returned >= 0)
        .then_some(returned)
        .ok_or_else(Error::last_os_error)
}

/// Forks. The child changes `block` and ends, and this process waits and checks its own. Returns false if there is no fork.
fn fork(block: &mut [u8]) -> Result<bool> {
    block.fill(7);
    // SAFETY: the child touches only what this thread has, and ends without running anything else.
    let child = match check(unsafe { libc::fork() }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(false),
        result => result?,
    };
    if child == 0 {
        let wrong = block.iter().filter(|byte| **byte != 7).count();
        block.fill(9);
        drop(vec![1_u8; 3 << 20]);
        // SAFETY: ends the process.
        unsafe { libc::_exit(c_int::from(wrong != 0)) };
    }
    let mut status = -1;
    // SAFETY: waits for the child that was just made.
    check(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    assert_eq!(status, 0, "how the child ended");
    assert!(block.iter().all(|byte| *byte == 7), "a child's write");
    Ok(true)
}

/// Forks several times. Returns false if there is no fork.
fn forks() -> Result<bool> {
    let mut block = vec![0; 5 << 20];
    (0..5).try_fold(true, |all, _| Ok(all & fork(&mut block)?))
}

/// Runs `work` while four threads do `other` again and again.
fn beside<T>(other: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    let done = &done;
    let other = &other;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                // Once at least: `work` may be done before this thread begins.
                other();
                while !done.load(Ordering::Relaxed) {
                    other();
                }
            });
        }
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    })
}

/// Threads open, flush and close files: the C library's locks are held most of the time.
fn stdio() -> Result<bool> {
    let files = || {
        // SAFETY: a file of this thread's own, closed once.
        unsafe {
            let file = libc::fopen(c"/dev/null".as_ptr(), c"w".as_ptr());
            libc::fflush(null_mut());
            libc::fclose(file);
        }
    };
    beside(files, forks)
}

static ON_STACK: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: c_int) {
    ON_STACK.fetch_add(1, Ordering::Relaxed);
}

/// Makes memory from malloc this thread's stack for signals, for ever.
fn use_signal_stack() {
    // SAFETY: the stack is never freed, and the structure is complete.
    unsafe {
        let stack = libc::stack_t {
            ss_sp: libc::malloc(1 << 16),
            ss_flags: 0,
            ss_size: 1 << 16,
        };
        assert_eq!(libc::sigaltstack(&raw const stack, null_mut()), 0);
    }
}

/// As Python's faulthandler: every thread has a stack for signals from malloc.
fn signal_stacks() -> Result<bool> {
    // SAFETY: a handler that only counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
        check(libc::sigaction(
            libc::SIGUSR1,
            &raw const action,
            null_mut(),
        ))?;
    }
    use_signal_stack();
    let signals = || {
        use_signal_stack();
        for _ in 0..100 {
            // SAFETY: flushes; a signal to this thread.
            unsafe {
                libc::fflush(null_mut());
                libc::raise(libc::SIGUSR1);
            }
        }
    };
    let forked = beside(signals, forks)?;
    assert!(ON_STACK.load(Ordering::Relaxed) > 0);
    Ok(forked)
}

/// A page from posix_memalign that cannot be touched, as a guard.
fn protect() -> Result<bool> {
    let mut memory = null_mut();
    // SAFETY: three pages of our own.
    unsafe {
        check(-libc::posix_memalign(&raw mut memory, PAGE, 3 * PAGE))?;
        memory.cast::<u8>().write_bytes(3, 3 * PAGE);
        let guard = memory.byte_add(PAGE);
        check(libc::mprotect(guard, PAGE, libc::PROT_NONE))?;
        let forked = forks()?;
        check(libc::mprotect(
            guard,
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
        ))?;
        let bytes = std::slice::from_raw_parts(memory.cast::<u8>(), 3 * PAGE);
        assert!(bytes.iter().all(|byte| *byte == 3));
        libc::free(memory);
        Ok(forked)
    }
}

/// MADV_DONTNEED makes anonymous memory zero.
fn dont_need() -> Result<bool> {
    let mut memory = vec![5_u8; 8 << 20];
    let unaligned = memory.as_ptr() as usize;
    let first = unaligned.next_multiple_of(PAGE) - unaligned;
    let pages = &mut memory[first..first + (6 << 20)];
    // SAFETY: pages of our own.
    check(unsafe { libc::madvise(pages.as_mut_ptr().cast(), pages.len(), libc::MADV_DONTNEED) })?;
    assert!(pages.iter().all(|byte| *byte == 0), "it is not zero");
    assert!(memory[first + (6 << 20)..].iter().all(|byte| *byte == 5));
    Ok(true)
}

/// All memory is locked: not that which nobody has asked for.
fn lock_all() -> Result<bool> {
    // SAFETY: takes a number.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) })?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let locked = locked.and_then(|line| line.split_whitespace().next()?.parse().ok());
    let locked: u64 = locked.expect("VmLck");
    assert!(locked < 512 << 10, "{locked} KiB are locked");
    let forked = forks()?;
    // SAFETY: takes nothing.
    check(unsafe { libc::munlockall() })?;
    Ok(forked)
}

/// Another thread waits for the child of a vfork, which waits until this process has forked.
fn vfork() -> Result<bool> {
    let mut pipe = [0; 2];
    // SAFETY: two descriptors.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) })?;
    let [read, write] = pipe;
    let waiting = AtomicBool::new(false);
    thread::scope(|scope| {
        let (waiting, read) = (&waiting, &read);
        scope.spawn(move || {
            let stack = vec![0_u64; 1 << 13];
            let top = stack.as_ptr_range().end.cast_mut().cast::<c_void>();
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            let argument = (read, waiting);
            // SAFETY: as vfork, with a stack of its own.
            let child = unsafe {
                libc::clone(
                    child_of_vfork,
                    top,
                    flags,
                    (&raw const argument).cast_mut().cast(),
                )
            };
            // SAFETY: our child.
            unsafe { libc::waitpid(child, null_mut(), 0) };
        });
        while !waiting.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let forked = forks();
        // SAFETY: one byte.
        unsafe { libc::write(write, [0_u8].as_ptr().cast(), 1) };
        forked
    })
}

extern "C" fn child_of_vfork(argument: *mut c_void) -> c_int {
    // SAFETY: what `vfork` passes, in the memory that it shares.
    let (read, waiting) = unsafe { *argument.cast::<(&c_int, &AtomicBool)>() };
    waiting.store(true, Ordering::Release);
    let mut byte = 0_u8;
    // SAFETY: one byte.
    unsafe { libc::read(*read, (&raw mut byte).cast(), 1) };
    0
}

/// The first thread has ended by pthread_exit, and the process goes on.
fn without_main(case: &str) -> ! {
    let (send, receive) = mpsc::channel::<()>();
    let case = case.to_owned();
    thread::spawn(move || {
        // Fails when the first thread has let go of its end.
        receive.recv().expect_err("nothing is sent");
        while !state_of_main().contains('Z') {
            thread::yield_now();
        }
        report(&case, forks());
        std::process::exit(0);
    });
    drop(send);
    // SAFETY: nothing on this stack has a destructor that matters.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!()
}

/// Third word of /proc/self/stat, of the first thread.
fn state_of_main() -> String {
    let path = format!("/proc/self/task/{}/stat", std::process::id());
    let stat = std::fs::read_to_string(path).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .unwrap_or("")
        .trim_start()
        .chars()
        .take(1)
        .collect()
}

/// In an empty root, without /proc.
fn chroot() -> Result<bool> {
    let folder = std::env::temp_dir().join(format!("ebb-cases-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    std::env::set_current_dir(&folder)?;
    std::fs::remove_dir(&folder)?;
    std::os::unix::fs::chroot(".")?;
    forks()
}

/// Programs that it starts fork as they like.
fn children() -> Result<bool> {
    let block = vec![7_u8; 5 << 20];
    let script = "x=$(echo hi | tr a-z A-Z); (exit 3); echo $x$?";
    let output = Command::new("sh").args(["-c", script]).output()?;
    assert_eq!((output.stdout, output.stderr), (b"HI3\n".to_vec(), vec![]));
    // SAFETY: a string.
    let status = unsafe { libc::system(c"(exit 3) | exit 4".as_ptr()) };
    assert_eq!(status, 4 << 8);
    assert!(block.iter().all(|byte| *byte == 7), "a child's write");
    Ok(true)
}

/// The start of an io_uring's parameters, of 120 bytes: sizes, flags, CPU, idle time.
#[repr(C)]
struct RingParameters {
    entries: [u32; 2],
    flags: u32,
    cpu: u32,
    idle: u32,
    rest: [u32; 25],
}

/// A thread of the kernel's polls an io_uring, with a heap block as its registered buffer.
fn ring() -> Result<bool> {
    let mut parameters = RingParameters {
        entries: [0; 2],
        flags: 2, // IORING_SETUP_SQPOLL
        cpu: 0,
        idle: 60_000,
        rest: [0; 25],
    };
    let buffer = vec![1_u8; 1 << 20];
    let vector = libc::iovec {
        iov_base: buffer.as_ptr().cast_mut().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the kernel's structures; the buffer outlives the process's use of the ring.
    unsafe {
        let ring = libc::syscall(libc::SYS_io_uring_setup, 8, &raw mut parameters) as c_int;
        check(ring)?;
        let register = libc::SYS_io_uring_register;
        check(libc::syscall(register, ring, 0, &raw const vector, 1) as c_int)?;
        let forked = forks()?;
        check(libc::close(ring))?;
        Ok(forked)
    }
}

/// Becomes `ebb-cases CASE` under a filter that ends whoever calls ioperm or iopl.
fn filtered(case: &str) -> Error {
    let statement = |code: u32, k: usize, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k: k as u32,
    };
    let (load, equal, give) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    let mut filter = [
        statement(load, 0, 0, 0),
        statement(equal, libc::SYS_ioperm as usize, 1, 0),
        statement(equal, libc::SYS_iopl as usize, 0, 1),
        statement(give, libc::SECCOMP_RET_KILL_PROCESS as usize, 0, 0),
        statement(give, libc::SECCOMP_RET_ALLOW as usize, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: a complete program.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if set != 0 {
        return Error::last_os_error();
    }
    Command::new("/proc/self/exe").arg(case).exec()
}

fn report(case: &str, forked: Result<bool>) {
    match forked {
        Ok(true) => println!("{case}: right"),
        Ok(false) => println!("{case}: right, no fork"),
        Err(error) => panic!("{case}: {error}"),
    }
}

fn main() {
    // SAFETY: ends this process if it has no end of its own.
    unsafe { libc::alarm(LIMIT) };
    for case in std::env::args().skip(1) {
        let result = match case.as_str() {
            "forks" => forks(),
            "stdio" => stdio(),
            "signal-stacks" => signal_stacks(),
            "protect" => protect(),
            "dont-need" => dont_need(),
            "lock-all" => lock_all(),
            "vfork" => vfork(),
            "without-main" => without_main(&case),
            "chroot" => chroot(),
            "children" => children(),
            "ring" => ring(),
            "filtered" => Err(filtered("forks")),
            _ => panic!("no such case: {case}"),
        };
        report(&case, result);
    }
}
