//! Processes: making one, and helping the kernel with the memory of a dying one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::process::Pid;

/// Makes a process that runs `child` and ends with the status that it returns, running nothing else of this
/// one. It gets copies of memory and descriptors.
///
/// # Errors
/// fork(2)'s; `Unsupported` when this process has other threads: what they have locked would stay locked.
pub fn fork(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    fork_unchecked(child)
}

/// [`fork`] whatever threads there are; for tests, whose program has some that idle.
pub(super) fn fork_unchecked(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    // SAFETY: the child has the calling thread only; `fork` has seen to it that there was no other.
    let pid = unsafe { libc::fork() };
    match Pid::from_raw(pid) {
        Some(pid) => Ok(pid),
        None if pid < 0 => Err(io::Error::last_os_error()),
        None => {
            let child = std::panic::AssertUnwindSafe(child);
            let status = std::panic::catch_unwind(child).unwrap_or(101);
            // SAFETY: ends the process at once, without handlers that belong to its parent.
            unsafe { libc::_exit(status.into()) }
        }
    }
}

/// Frees memory of the process behind `pidfd` beside the kernel, where that process is dying
/// (process_mrelease(2), Linux 5.15).
///
/// # Errors
/// `EINVAL` while the process, or one that shares its memory, is alive; `ESRCH` when its memory is free or
/// beyond help; `EAGAIN` to be tried again.
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

/// Blocks every signal in the calling thread.
pub fn block_all_signals() {
    // SAFETY: the set is filled before it is used.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}
