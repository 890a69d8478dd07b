//! The guardian's life. It is a process of its own, with one thread, made before the monitor had a second.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::Log;
use super::lock::MemoryLock;
use crate::config::{SocketPath, check_socket};
use crate::sys::{self, Board};
use crate::teardown::Report;

/// How often a dying heir is looked for.
const PERIOD: Duration = Duration::from_millis(2);

/// Everything that the guardian knows.
pub(super) struct Watch<'a> {
    pub board: &'static Board,
    pub monitor: BorrowedFd<'a>,
    pub pid: Pid,
    pub heir: BorrowedFd<'a>,
    pub id: &'a str,
    pub socket: Option<PathBuf>,
    pub log: &'a Log,
}

impl Watch<'_> {
    /// Watches until memory is free; the exit status.
    pub fn run(&self) -> u8 {
        sys::process::block_all_signals();
        // Signals for the monitor's terminal or process group are not for us.
        let _ = rustix::process::setsid();
        let _ = rustix::thread::set_name(c"ebb-guardian");
        let nothing = File::options().read(true).write(true).open("/dev/null");
        if let Ok(nothing) = &nothing {
            let _ = rustix::stdio::dup2_stdin(nothing);
            let _ = rustix::stdio::dup2_stdout(nothing);
        }
        sys::process::shrink();
        wait(self.monitor, None);
        // While the heir holds it, too: so nobody sees it free before the rest is done.
        let lock = self.socket.as_deref().and_then(MemoryLock::join);
        let clean = self.board.clean.load(Ordering::Acquire) == 1;
        if !clean {
            self.report();
            self.remove_socket();
        }
        if let Ok(nothing) = &nothing
            && somebody_reads(io::stderr().as_fd())
        {
            let _ = rustix::stdio::dup2_stderr(nothing);
        }
        self.attend(lock.as_ref());
        if !clean {
            // The heir had it open: only now can one be told from a served one that the monitor had just made.
            self.remove_socket();
        }
        self.sum_up();
        if let Some(lock) = lock {
            lock.remove_if_last();
        }
        0
    }

    /// Says what the monitor could not say.
    fn report(&self) {
        let cause = match signal_of(self.pid) {
            Some(signal) => format!("killed by signal {signal}"),
            None => "killed".to_owned(),
        };
        let text = format!(
            "machine {}: the monitor, process {}, was {cause}; its memory is being freed",
            self.id, self.pid
        );
        tracing::error!("{text}");
        if self.log.is_some() {
            let _ = writeln!(io::stderr(), "ebb: {text}");
        }
    }

    /// Removes the API's socket, if it is still the monitor's.
    fn remove_socket(&self) {
        let Some(path) = &self.socket else {
            return;
        };
        let device = self.board.socket_device.load(Ordering::Relaxed);
        let inode = self.board.socket_inode.load(Ordering::Acquire);
        let ours = if inode > 0 {
            path.symlink_metadata()
                .is_ok_and(|it| (it.dev(), it.ino()) == (device, inode))
        } else {
            // It died between making it and telling us.
            matches!(check_socket(path), Ok(SocketPath::Stale))
        };
        if ours && let Err(error) = std::fs::remove_file(path) {
            tracing::warn!("{}: not removed: {error}", path.display());
        }
    }

    /// Stays with the heir to its end, and helps the kernel when it is killed, too.
    fn attend(&self, lock: Option<&MemoryLock>) {
        let mut noted = u64::MAX;
        while !wait(self.heir, Some(PERIOD)) {
            // EINVAL while it lives and works; everything else is as good as it gets.
            let _ = sys::process::release_memory_of(self.heir);
            if let Some(workers) = lock.and_then(MemoryLock::hear) {
                self.board.wanted.store(workers, Ordering::Relaxed);
            }
            let done = self.board.done.load(Ordering::Relaxed);
            if let Some(lock) = lock
                && noted != done
            {
                lock.note(done, self.board.total.load(Ordering::Relaxed));
                noted = done;
            }
        }
    }

    /// Logs what was freed.
    fn sum_up(&self) {
        let get = |value: &AtomicU64| value.load(Ordering::Acquire);
        let [began, ended] = [&self.board.times[0], &self.board.times[1]].map(get);
        if ended > 0 {
            let [before, after] = [&self.board.resident[0], &self.board.resident[1]].map(get);
            let report = Report {
                bytes: before.saturating_sub(after),
                duration: Duration::from_nanos(ended.saturating_sub(began)),
                workers: usize::try_from(get(&self.board.workers)).unwrap_or(usize::MAX),
                failures: get(&self.board.failures),
            };
            report.log();
        } else if began > 0 {
            tracing::warn!(
                "teardown: whoever freed the memory was killed; the kernel did the rest"
            );
        }
    }
}

/// Waits for a process to end; whether it has.
fn wait(process: BorrowedFd<'_>, limit: Option<Duration>) -> bool {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    loop {
        match poll(&mut fds, limit.as_ref()) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOMEM) => {}
            // Nothing else is documented; whoever cannot watch must not stay.
            Err(_) => return true,
        }
    }
}

/// Whether the other end of a pipe or a socket may wait for this one to be closed.
fn somebody_reads(output: BorrowedFd<'_>) -> bool {
    let kind = output
        .try_clone_to_owned()
        .map(File::from)
        .and_then(|file| file.metadata());
    kind.is_ok_and(|kind| kind.file_type().is_fifo() || kind.file_type().is_socket())
}

/// The signal that ended a process, for as long as nobody has waited for it: the last field of
/// /proc/PID/stat is its wait status (proc_pid_stat(5)).
fn signal_of(pid: Pid) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status: i32 = stat.split_ascii_whitespace().next_back()?.parse().ok()?;
    Some(status & 0x7f).filter(|signal| *signal > 0)
}
