//! Processes: making one, closing its descriptors, ending one, and freeing the memory of a dying one.

use std::ffi::{c_int, c_void};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::process::{Pid, getpid, getppid};

/// Makes a process that runs only `child` and exits with the status that `child` returns. The process has a copy of
/// this one's memory, and the same descriptors: what one of the two opens or closes, the other sees. They stay open until
/// both have ended.
///
/// # Errors
/// clone(2)'s; `Unsupported` if this process has other threads, because a lock that one of them holds would stay
/// locked in the copy.
pub fn fork_sharing_files(child: impl FnOnce(&SharedFiles) -> u8) -> io::Result<Pid> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let shared = SharedFiles { parent: getpid() };
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: the child has a copy of the only thread, of its stack too. libc does not know of it: its locks are free, as no
    // other thread could hold one, and what it takes for the thread's id is the parent's, which nothing here asks for.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    run_in_child(libc::pid_t::try_from(pid).unwrap_or(-1), || child(&shared))
}

/// Has the kernel allow this process `wanted` open descriptors, or as many as it may (RLIMIT_NOFILE). Returns how many that are.
pub fn raise_descriptor_limit(wanted: u64) -> u64 {
    let resource = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(resource);
    let (now, most) = (
        limit.current.unwrap_or(u64::MAX),
        limit.maximum.unwrap_or(u64::MAX),
    );
    let wanted = wanted.min(most);
    if now >= wanted {
        return now;
    }
    let raised = rustix::process::Rlimit {
        current: Some(wanted),
        ..limit
    };
    rustix::process::setrlimit(resource, raised).map_or(now, |()| wanted)
}

/// Makes a process that runs only `child` and exits with the status that `child` returns. It has a copy of this one's memory
/// and descriptors.
///
/// # Errors
/// fork(2)'s; `Unsupported` if this process has other threads.
pub fn fork(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: the child has a copy of the only thread.
    let pid = unsafe { libc::fork() };
    run_in_child(pid, child)
}

/// As [`fork`]. The child has none of this process's descriptors but the standard streams and `kept`, so it must use no
/// other that was opened before.
///
/// # Errors
/// As for [`fork`].
pub fn fork_without_files(kept: &[RawFd], child: impl FnOnce() -> u8) -> io::Result<Pid> {
    fork(|| {
        close_all_but(kept);
        child()
    })
}

fn close_all_but(kept: &[RawFd]) {
    let kept = kept.iter().filter_map(|fd| u32::try_from(*fd).ok());
    let mut kept: Vec<u32> = kept.collect();
    kept.sort_unstable();
    let mut first = 3;
    for &fd in kept.iter().chain([&u32::MAX]) {
        if fd > first {
            // SAFETY: the call takes numbers only. The callers answer for it that nobody needs these descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = first.max(fd.saturating_add(1));
    }
}

/// The descriptors of a process that was made by [`fork_sharing_files`].
#[derive(Debug)]
pub struct SharedFiles {
    parent: Pid,
}

impl SharedFiles {
    /// Releases the locks (flock(2)) on all files but `kept`. It is quick, other than to close everything. Does nothing
    /// while the parent lives.
    ///
    /// What a thread was writing when it died is written by now. Not so direct I/O by io_uring: the disk may still be at
    /// work. Such a file is closed instead, and the kernel releases its lock with the last request that uses it.
    pub fn unlock_all_but(&self, kept: &[BorrowedFd<'_>]) {
        if getppid() == Some(self.parent) {
            return;
        }
        let entries = fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        for number in numbers.filter(|it| kept.iter().all(|kept| kept.as_raw_fd() != *it)) {
            // SAFETY: the calls take numbers only. The parent is dead, and nobody else counts on its locks or its disks.
            unsafe {
                let flags = libc::fcntl(number, libc::F_GETFL);
                if number > 2 && flags >= 0 && flags & libc::O_DIRECT != 0 {
                    libc::close(number);
                } else {
                    libc::flock(number, libc::LOCK_UN);
                }
            }
        }
    }

    /// Closes all of them but the standard streams and `kept`, for every process that shares them. Does nothing while the
    /// parent lives, because it uses them.
    ///
    /// Meanwhile the calling process must open nothing in another thread: that might be closed, too.
    pub fn close_all_but(&self, kept: &[RawFd]) {
        // Another process takes the children of one that dies.
        if getppid() == Some(self.parent) {
            return;
        }
        // The parent is dead, and this process needs the kept ones only.
        close_all_but(kept);
    }
}

/// What [`clone_task`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// A process that shares this one's memory and open files. A SIGKILL for one of the two does not reach the other.
    Process,
    /// A thread of the calling process.
    Thread,
}

/// Starts a task in this address space. It runs `main(argument)` on its own stack and inherits the signal mask.
///
/// # Errors
/// clone(2)'s.
///
/// # Safety
/// - `stack_top` is the end of a mapped area that is large enough for `main` and used by nothing else while the task runs.
/// - libc does not know the task, and it shares heap, locks and thread-local storage with the threads of this process.
///   So `main` makes system calls and uses atomics only: it allocates nothing, takes no lock, and cannot panic.
/// - `main` takes its argument for a `&'static T`.
pub unsafe fn clone_task<T: Sync>(
    kind: TaskKind,
    stack_top: usize,
    main: extern "C" fn(*mut c_void) -> c_int,
    argument: &'static T,
) -> io::Result<Pid> {
    let shared = libc::CLONE_VM | libc::CLONE_FILES;
    let flags = match kind {
        TaskKind::Process => shared | libc::SIGCHLD,
        TaskKind::Thread => shared | libc::CLONE_FS | libc::CLONE_SIGHAND | libc::CLONE_THREAD,
    };
    let stack = std::ptr::with_exposed_provenance_mut(stack_top);
    let argument = std::ptr::from_ref(argument).cast_mut().cast();
    // SAFETY: the caller answers for the stack and for `main`.
    let pid = unsafe { libc::clone(main, stack, flags, argument) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Pid::from_raw(pid).ok_or_else(|| io::ErrorKind::Other.into())
}

/// Ends this process and all its threads at once. Runs no exit handlers.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: it ends the process and returns to nobody.
    unsafe { libc::_exit(status.into()) }
}

/// Ends the child with the status that `child` returns; `pid` is what fork(2) has returned.
fn run_in_child(pid: libc::pid_t, child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    match Pid::from_raw(pid) {
        Some(pid) => Ok(pid),
        None => {
            let child = std::panic::AssertUnwindSafe(child);
            let status = std::panic::catch_unwind(child).unwrap_or(101);
            // SAFETY: ends the process at once, without handlers that belong to its parent.
            unsafe { libc::_exit(status.into()) }
        }
    }
}

/// Frees memory of the dying process behind `pidfd` while the kernel does the same (process_mrelease(2), Linux 5.15).
///
/// # Errors
/// `EINVAL` while the process, or one that shares its memory, is not dying; `ESRCH` if there is no memory left that
/// could be freed this way; `EAGAIN` if the call should be tried again.
pub fn release_memory_of(pidfd: impl AsFd) -> io::Result<()> {
    let pidfd = pidfd.as_fd().as_raw_fd();
    // SAFETY: the call takes numbers only and touches no memory of this process.
    let rc = unsafe { libc::syscall(libc::SYS_process_mrelease, pidfd, 0) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Blocks every signal in the calling thread but SIGSYS, which reports a forbidden system call, and returns the mask that it
/// had before.
pub fn block_all_signals() -> libc::sigset_t {
    // SAFETY: a signal set of zeroes is a value, and both sets are filled before they are used.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigdelset(&raw mut all, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

/// Runs `action` with every signal blocked in the calling thread. Tasks that it starts inherit that.
pub fn with_signals_blocked<T>(action: impl FnOnce() -> T) -> T {
    let before = block_all_signals();
    let result = action();
    // SAFETY: the set is a mask that this thread had.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    result
}

/// Returns to the kernel what this process may not need again: the allocator's free memory, and the program's code and
/// constants, which the kernel maps again from the page cache when they are touched.
pub fn shrink() {
    // SAFETY: the call concerns only memory that is free.
    unsafe { libc::malloc_trim(0) };
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, len) in maps.lines().filter_map(code) {
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: nothing was ever written there, so pages that are dropped are read again from their file.
        let _ = unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxDontNeed) };
    }
}

/// Address and length in bytes of the mapping that `line` of /proc/PID/maps describes, if it holds a file's code or
/// constants.
fn code(line: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    // Code, or the constants before it in the file. The linker writes only to what lies after the code.
    let unwritten = rest.starts_with("r-xp ") || rest.starts_with("r--p 00000000 ");
    (unwritten && rest.contains(" /")).then_some(())?;
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let start = address(start)?;
    Some((start, address(end)?.checked_sub(start)?))
}

/// Makes a process that runs only `child`, with descriptors of its own. The test runner has other threads, but they are idle.
#[cfg(test)]
pub(crate) fn fork_for_test(child: impl FnOnce() -> u8) -> Pid {
    // SAFETY: the child has the calling thread only, and the others hold no lock.
    let pid = unsafe { libc::fork() };
    run_in_child(pid, child).unwrap()
}

/// Forbids this process to start threads: its user may have only one task. That limit does not bind the superuser, so
/// the process changes its user first.
#[cfg(test)]
pub(crate) fn forbid_threads() {
    let limit = rustix::process::Rlimit {
        current: Some(1),
        maximum: Some(1),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nproc, limit).unwrap();
    if rustix::process::geteuid().is_root() {
        const NOBODY: libc::uid_t = 65_534;
        // SAFETY: the call takes numbers only.
        assert_eq!(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) }, 0);
    }
}

/// A killed process that is stopped before it frees its memory, so that a test can see who else does (ptrace(2)).
#[cfg(test)]
pub(crate) struct StoppedExit(Pid);

#[cfg(test)]
impl StoppedExit {
    /// Stops `child` at its end, which `kill` brings about. It ends when the returned value is dropped, by the same thread.
    pub fn of(child: Pid, kill: impl FnOnce()) -> Self {
        let (pid, options) = (child.as_raw_nonzero().get(), libc::PTRACE_O_TRACEEXIT);
        // SAFETY: the calls concern the child only, and `status` outlives the second.
        unsafe {
            let traced = libc::ptrace(libc::PTRACE_SEIZE, pid, 0, options);
            assert_eq!(traced, 0, "{}", io::Error::last_os_error());
            kill();
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &raw mut status, libc::__WALL), pid);
            let at_exit = libc::SIGTRAP | libc::PTRACE_EVENT_EXIT << 8;
            assert_eq!(status >> 8, at_exit, "{status:#x}");
        }
        Self(child)
    }

    /// Resident memory of the process in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.0)).unwrap();
        let pages = statm.split(' ').nth(1).unwrap();
        pages.parse::<u64>().unwrap() * 4096
    }
}

#[cfg(test)]
impl Drop for StoppedExit {
    /// Lets the process end.
    fn drop(&mut self) {
        let pid = self.0.as_raw_nonzero().get();
        // SAFETY: the calls concern the child only.
        unsafe {
            libc::ptrace(libc::PTRACE_CONT, pid, 0, 0);
            libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::fs::{FlockOperation, OFlags, flock};
    use rustix::process::{WaitOptions, waitpid};

    use super::*;
    use crate::sys::own_process;

    #[test]
    fn shared_descriptors_are_closed_for_all_once_the_parent_is_dead() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (go, going) = rustix::pipe::pipe().unwrap();
        let (seen, see) = rustix::pipe::pipe().unwrap();
        let child = fork_for_test(|| {
            // Never closed: the other process has the same descriptors.
            let parent = std::mem::ManuallyDrop::new(own_process().unwrap());
            let shared = fork_sharing_files(|files| {
                files.close_all_but(&[]);
                let _ = rustix::io::write(&writer, b"still open");
                let _ = rustix::io::write(&see, b"!");
                let _ = poll(&mut [PollFd::new(&*parent, PollFlags::IN)], None);
                files.close_all_but(&[go.as_raw_fd()]);
                // The test lets it go on.
                let _ = rustix::io::read(&go, &mut [0; 1]);
                0
            });
            // It lives until then.
            let _ = rustix::io::read(&seen, &mut [0; 1]);
            u8::from(shared.is_err())
        });
        drop(writer);
        waitpid(Some(child), WaitOptions::empty()).unwrap();
        assert_eq!(rustix::io::read(&reader, &mut [0; 99]), Ok(10));
        assert_eq!(rustix::io::read(&reader, &mut [0; 99]), Ok(0));
        drop(going);
    }

    /// The test's own reference stands for a request that is under way.
    #[test]
    fn a_disk_with_direct_io_stays_locked_until_its_last_request_is_done() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let files = [false, true].map(|direct| {
            let path = dir.path().join(if direct { "direct" } else { "cached" });
            fs::write(&path, [0; 512]).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            if direct {
                rustix::fs::fcntl_setfl(&file, OFlags::DIRECT).unwrap();
            }
            flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
            (path, file)
        });
        let (done, is_done) = rustix::pipe::pipe().unwrap();
        let child = fork_for_test(|| {
            let parent = std::mem::ManuallyDrop::new(own_process().unwrap());
            let shared = fork_sharing_files(|shared| {
                let _ = poll(&mut [PollFd::new(&*parent, PollFlags::IN)], None);
                // Other tests have their files here, too.
                let [cached, direct] = [&files[0].1, &files[1].1].map(AsRawFd::as_raw_fd);
                let own = [cached, direct, is_done.as_raw_fd()];
                shared.close_all_but(&own);
                shared.unlock_all_but(&[]);
                let _ = rustix::io::write(&is_done, b"!");
                0
            });
            u8::from(shared.is_err())
        });
        waitpid(Some(child), WaitOptions::empty()).unwrap();
        assert_eq!(rustix::io::read(&done, &mut [0; 1]), Ok(1));
        let is_free = files.each_ref().map(|(path, _)| {
            let file = File::open(path).unwrap();
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        assert_eq!(is_free, [true, false]);
        let [_, (path, direct)] = files;
        drop(direct);
        let file = File::open(path).unwrap();
        // Children of other tests, forked meanwhile, have it open until they end.
        flock(&file, FlockOperation::LockExclusive).unwrap();
    }

    #[test]
    fn only_what_nobody_has_written_to_is_dropped() {
        assert_eq!(
            code("1000-3000 r-xp 00004000 fe:00 7   /bin/ebb"),
            Some((0x1000, 0x2000))
        );
        assert_eq!(
            code("0-1000 r--p 00000000 fe:00 7   /bin/ebb"),
            Some((0, 0x1000))
        );
        for line in [
            "1000-3000 r--p 00004000 fe:00 7   /bin/ebb",
            "1000-3000 rw-p 00000000 fe:00 7   /bin/ebb",
            "1000-3000 r-xp 00000000 00:00 0   [vdso]",
            "1000-3000 r-xp 00000000 00:00 0",
        ] {
            assert_eq!(code(line), None, "{line}");
        }
    }
}
