//! This process: a descriptor of it, how much memory it takes, and what its threads are called.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// A descriptor of this process (pidfd_open(2), Linux 5.3).
///
/// # Errors
/// The error of the system call.
pub fn own_process() -> io::Result<OwnedFd> {
    Ok(pidfd_open(getpid(), PidfdFlags::empty())?)
}

/// Resident memory of this process in bytes (proc_pid_statm(5)); `None` if /proc cannot be read.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
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
        let before = resident_bytes().unwrap();
        // Only the part of the result that is used is allocated.
        let touched = std::hint::black_box(vec![1u8; 32 << 20]);
        let after = resident_bytes().unwrap();
        assert!(
            after >= before + (24 << 20),
            "{before} {after} {}",
            touched.len()
        );
    }
}
