//! This process: a descriptor of it, how much memory it uses, and the names of its threads.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// Bytes of a page on x86-64.
const PAGE_SIZE: u64 = 4096;

/// A descriptor of this process (pidfd_open(2), Linux 5.3).
///
/// # Errors
/// The error of the system call.
pub fn own_process() -> io::Result<OwnedFd> {
    Ok(pidfd_open(getpid(), PidfdFlags::empty())?)
}

/// Resident memory of this process in bytes (the second number of /proc/self/statm); `None` if it cannot be read.
/// Allocates nothing.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let file = open(c"/proc/self/statm", OFlags::RDONLY, Mode::empty()).ok()?;
    let mut text = [0; 128];
    let len = rustix::io::read(&file, &mut text).ok()?;
    let pages = text.get(..len)?.split(|byte| *byte == b' ').nth(1)?;
    let pages: u64 = str::from_utf8(pages).ok()?.parse().ok()?;
    Some(pages * PAGE_SIZE)
}

/// Name of the thread with the id `thread` of this process; `None` if there is no such thread.
#[must_use]
pub fn thread_name(thread: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_counts() {
        const TOUCHED: usize = 256 << 20;
        // Keeps the compiler from leaving out the allocation.
        let touched = std::hint::black_box(vec![1u8; TOUCHED]);
        assert!(resident_bytes().unwrap() >= TOUCHED as u64);
        drop(touched);
    }
}
