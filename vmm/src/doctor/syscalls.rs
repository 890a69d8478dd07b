//! Finds out which system calls the kernel has, by calls that have no effect.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

use rustix::process::PidfdFlags;

/// `process_madvise` with an empty list of ranges and `MADV_DONTNEED`, on this process: the kernel checks
/// the advice (allowed on oneself since Linux 6.13), and has nothing to do.
pub(super) fn process_madvise_self() -> io::Result<()> {
    let pidfd = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let none = ptr::null::<libc::iovec>();
    // SAFETY: the list of ranges has no entries, so the kernel reads and discards nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            none,
            0_usize,
            libc::MADV_DONTNEED,
            0_u32,
        )
    };
    check(result)
}

/// Returns true if the kernel has `process_mrelease` (Linux 5.15): then the error is about the descriptor.
pub(super) fn has_process_mrelease() -> bool {
    let no_descriptor: RawFd = -1;
    // SAFETY: no process is named, so nothing is released.
    let result = unsafe { libc::syscall(libc::SYS_process_mrelease, no_descriptor, 0_u32) };
    check(result).is_err_and(|error| error.raw_os_error() == Some(libc::EBADF))
}

/// The version of Landlock's interface (landlock_create_ruleset(2)).
pub(super) fn landlock_version() -> io::Result<i64> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the call reads nothing.
    let result = unsafe {
        let none = ptr::null::<u8>();
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION)
    };
    check(result).map(|()| result)
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
