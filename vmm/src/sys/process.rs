//! Processes: making one, and helping the kernel with the memory of a dying one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::process::Pid;

/// Makes a process that runs `child` and ends with the status that it returns, running nothing else of this
/// one. It gets copies of memory, of the standard streams, and of the descriptors in `keep`; it must not use
/// others.
///
/// # Errors
/// fork(2)'s; `Unsupported` when this process has other threads: what they have locked would stay locked.
pub fn fork(keep: &[BorrowedFd<'_>], child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let mut kept: Vec<u32> = keep
        .iter()
        .map(|fd| fd.as_raw_fd().unsigned_abs())
        .collect();
    kept.sort_unstable();
    fork_unchecked(|| {
        close_all_but(&kept);
        child()
    })
}

/// Closes all descriptors above those of standard error but `kept`, which is ascending.
fn close_all_but(kept: &[u32]) {
    let mut first = 3;
    for &fd in kept.iter().chain([&u32::MAX]) {
        if fd > first {
            // SAFETY: a process that has just been made uses none of these: what it runs was given the others.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = first.max(fd.saturating_add(1));
    }
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

/// Gives back what this process has of its parent's memory and does not need to sleep: the allocator's free
/// memory, and the program's code and constants, which are in the page cache and come back page by page.
pub fn shrink() {
    // SAFETY: it concerns only memory that is free.
    unsafe { libc::malloc_trim(0) };
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, len) in maps.lines().filter_map(code) {
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: nobody has written there: what is dropped is read again from its file when it is touched.
        let _ = unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxDontNeed) };
    }
}

/// Address and length of a mapping of a file's code or constants, from a line of /proc/PID/maps.
fn code(line: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    // Code, or what stands before it in the file; what the linker has written to lies behind it.
    let unwritten = rest.starts_with("r-xp ") || rest.starts_with("r--p 00000000 ");
    (unwritten && rest.contains(" /")).then_some(())?;
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let start = address(start)?;
    Some((start, address(end)?.checked_sub(start)?))
}

/// [`fork`] whatever threads there are.
#[cfg(test)]
pub(crate) fn fork_for_test(child: impl FnOnce() -> u8) -> Pid {
    fork_unchecked(child).unwrap()
}

/// Lets this process start no further thread: its user may have one task. The superuser is not bound by that, so
/// it becomes somebody else.
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

#[cfg(test)]
mod tests {
    use super::*;

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
