//! Descriptors of files.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Lets the descriptor of `file` be one of `by` from now on: for every process that shares this one's descriptors, and at
/// once (dup3(2)).
///
/// # Errors
/// dup3(2)'s; `file` is as it was then.
pub fn replace_file(file: &File, by: File) -> io::Result<()> {
    // SAFETY: the call takes numbers only. `file` owns its number before and after.
    let rc = unsafe { libc::dup3(by.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A descriptor of its own for what the descriptor `number`, with which this process was started, leads to.
///
/// # Errors
/// fcntl(2)'s; `EBADF` if there is no such descriptor.
pub fn inherited_file(number: i32) -> io::Result<File> {
    // SAFETY: the call takes numbers only; one that is no open descriptor is refused.
    let own = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if own < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made the descriptor `own`, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(own) })
}
