//! What the guardian does. It is a process with one thread, made before the monitor had a second one.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;

use super::lock::MemoryLock;
use crate::output::Log;
use crate::sys::process::SharedFiles;
use crate::sys::seccomp::Role;
use crate::sys::sockets::{
    FileIdentity, beside, connect_at_once, file_identity, remove_file_if, server_of,
};
use crate::sys::{self, Terminal};
use crate::teardown::{Socket, StatusPage};

/// Time between two looks at the reaper.
const PERIOD: Duration = Duration::from_millis(2);

/// Everything that the guardian knows.
pub(super) struct Watch<'a> {
    pub status: &'static StatusPage,
    /// Pidfd of the monitor.
    pub monitor: BorrowedFd<'a>,
    /// Process id of the monitor.
    pub pid: Pid,
    /// Pidfd of the reaper.
    pub reaper: BorrowedFd<'a>,
    /// Name of the machine.
    pub id: &'a str,
    /// Path of the API's socket.
    pub socket: Option<PathBuf>,
    /// The operator's terminal as it was before the monitor used it.
    pub terminal: Option<Terminal>,
    pub log: &'a Log,
}

impl Watch<'_> {
    /// Runs until memory is free, and returns the exit status. `files` are the monitor's descriptors.
    pub fn run(&self, files: &SharedFiles) -> u8 {
        sys::process::block_all_signals();
        // Signals for the monitor's terminal or process group do not concern the guardian.
        let _ = rustix::process::setsid();
        let _ = rustix::thread::set_name(c"ebb-guardian");
        // The usual hook makes system calls that the filter forbids.
        panic::set_hook(Box::new(|panic| {
            tracing::error!("the guardian has panicked: {panic}");
        }));
        Role::Guardian.enter();
        // Last: each page of code that is touched brings its neighbours with it.
        sys::process::shrink();
        wait_for_exit(self.monitor, None);
        sys::panic_point_at("ebb-guardian");
        if !self.status.is_finished()
            && let Some(terminal) = &self.terminal
        {
            terminal.leave_raw_mode();
        }
        let null = File::options().read(true).write(true).open("/dev/null");
        if let Ok(null) = &null {
            // Another process may be waiting for their end.
            let _ = rustix::stdio::dup2_stdin(null);
            let _ = rustix::stdio::dup2_stdout(null);
        }
        // Taken while the monitor's lock is still there: so it is not free before the guardian has done the rest, too.
        let lock = self.socket.as_deref().and_then(MemoryLock::share);
        // Whoever starts the machine again needs its disks, now.
        files.unlock_all_but(&lock.iter().map(AsFd::as_fd).collect::<Vec<_>>());
        let cause = (!self.status.is_finished()).then(|| cause_of_end(self.pid));
        if cause.is_some() && !self.status.leaves_sockets() {
            self.remove_socket(Socket::Api, self.socket.as_deref());
            self.remove_socket(Socket::Vsock, self.status.vsock_path().as_deref());
        }
        let is_awaited = is_pipe_or_socket(io::stderr().as_fd());
        thread::scope(|scope| {
            // As long as this thread runs nothing else is opened here.
            let close = || self.close(files, lock.as_ref());
            if thread::Builder::new().spawn_scoped(scope, close).is_err() {
                close();
            }
            if let Some(cause) = &cause {
                self.report_violent_end(cause);
            }
            if let Ok(null) = &null
                && is_awaited
            {
                let _ = rustix::stdio::dup2_stderr(null);
            }
            self.wait_for_reaper(lock.as_ref());
        });
        // `close` has closed it.
        mem::forget(null);
        self.log_teardown();
        if let Some(lock) = lock {
            lock.remove_if_last();
        }
        0
    }

    /// Closes the monitor's descriptors but those that reaper and guardian need. It takes long: KVM destroys the machine
    /// when its last descriptor goes, and the kernel waits before it removes a trigger of memory pressure.
    fn close(&self, files: &SharedFiles, lock: Option<&MemoryLock>) {
        let log = self.log.file();
        let kept = [self.monitor, self.reaper].into_iter();
        let kept = kept.chain(log).chain(lock.map(AsFd::as_fd));
        let kept = kept.map(|fd| fd.as_raw_fd());
        files.close_all_but(&kept.chain(self.status.page_faults()).collect::<Vec<_>>());
    }

    /// Says what the monitor could not say.
    fn report_violent_end(&self, cause: &str) {
        let text = format!(
            "machine {}: the monitor, process {}, was {cause}; its memory is being freed",
            self.id, self.pid
        );
        tracing::error!("{text}");
        if self.log.file().is_some() {
            let _ = writeln!(io::stderr(), "ebb: {text}");
        }
    }

    /// Removes a socket, if it is still the monitor's. The monitor's descriptors must still be open: as long as the
    /// socket is, no other file has its identity.
    fn remove_socket(&self, socket: Socket, path: Option<&Path>) {
        let Some(path) = path else {
            return;
        };
        let identity = self.status.socket(socket);
        // The monitor may have died while its socket had the other name: before it moved it to `path`, or to remove it.
        for path in [path.to_owned(), beside(path, self.pid)] {
            if let Some(identity) = identity.or_else(|| self.served_socket(&path))
                && let Err(error) = remove_file_if(&path, identity)
            {
                tracing::warn!("{}: not removed: {error}", path.display());
            }
        }
    }

    /// The identity of the socket at `path` if the monitor listens on it: it may have died before it could say which file is
    /// its socket.
    fn served_socket(&self, path: &Path) -> Option<FileIdentity> {
        let identity = file_identity(path).ok()?;
        let server = server_of(&connect_at_once(path).ok()?);
        (server == Some(self.pid)).then_some(identity)
    }

    /// Waits until the reaper has ended. Meanwhile passes on what the operator asks for, writes down the progress, and
    /// helps the kernel should the reaper be killed.
    fn wait_for_reaper(&self, lock: Option<&MemoryLock>) {
        let mut written = None;
        while !wait_for_exit(self.reaper, Some(PERIOD)) {
            // The kernel refuses while the reaper is alive (EINVAL); there is nothing to do about any other error.
            let _ = sys::process::release_memory_of(self.reaper);
            let Some(lock) = lock else {
                continue;
            };
            if let Some(workers) = lock.take_request() {
                self.status.set_workers(workers);
            }
            let progress = self.status.progress();
            if written != Some(progress.0) {
                lock.write_progress(progress);
                written = Some(progress.0);
            }
        }
    }

    /// Logs what the reaper did.
    fn log_teardown(&self) {
        if let Some(report) = self.status.report() {
            report.log();
        } else if self.status.has_begun() {
            tracing::warn!("teardown: the reaper was killed; the kernel freed the rest");
        }
    }
}

/// Waits for a process to end, at most for `timeout`. Returns true if it has ended.
fn wait_for_exit(process: BorrowedFd<'_>, timeout: Option<Duration>) -> bool {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOMEM) => {}
            // poll(2) documents no other error here. A guardian that cannot watch must not stay for ever.
            Err(_) => return true,
        }
    }
}

/// Returns true if `output` is a pipe or a socket.
fn is_pipe_or_socket(output: BorrowedFd<'_>) -> bool {
    let kind = output
        .try_clone_to_owned()
        .map(File::from)
        .and_then(|file| file.metadata());
    kind.is_ok_and(|kind| kind.file_type().is_fifo() || kind.file_type().is_socket())
}

/// How a process was ended that has not said so.
fn cause_of_end(pid: Pid) -> String {
    match status_of(pid) {
        None | Some(0) => "killed".to_owned(),
        Some(status) if libc::WIFSIGNALED(status) => {
            format!("killed by signal {}", libc::WTERMSIG(status))
        }
        Some(status) => format!("ended by status {}", libc::WEXITSTATUS(status)),
    }
}

/// The wait status of a process that has ended, the last field of /proc/PID/stat (proc_pid_stat(5)); `None` if its parent has
/// waited for it already.
fn status_of(pid: Pid) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.split_ascii_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use rustix::process::{PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open};

    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::guardian::lock::request_workers;
    use crate::sys::process::{StoppedExit, fork_for_test};

    const LIMIT: Duration = Duration::from_secs(10);

    fn watch<'a>(process: BorrowedFd<'a>, log: &'a Log) -> Watch<'a> {
        Watch {
            status: StatusPage::new().unwrap(),
            monitor: process,
            pid: getpid(),
            reaper: process,
            id: "test",
            socket: None,
            terminal: None,
            log,
        }
    }

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < LIMIT, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn only_the_monitors_own_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let log = Log::to_stderr();
        let mut watch = watch(own.as_fd(), &log);
        let socket = Socket::Vsock;
        watch.status.set_socket(Socket::Api, (1, 1));
        // Made before the monitor could tell which file it is.
        let made = UnixListener::bind(&path).unwrap();
        watch.remove_socket(socket, Some(&path));
        assert!(!path.exists());
        drop(made);
        let served = UnixListener::bind(&path).unwrap();
        watch.pid = Pid::INIT;
        watch.remove_socket(socket, Some(&path));
        assert!(path.exists(), "another process serves it");
        let file = path.metadata().unwrap();
        watch
            .status
            .set_socket(socket, (file.dev(), file.ino() + 1));
        watch.remove_socket(socket, Some(&path));
        assert!(path.exists(), "another machine has made it");
        watch.status.set_socket(socket, (file.dev(), file.ino()));
        watch.status.forget_socket(socket);
        watch.remove_socket(socket, Some(&path));
        assert!(path.exists(), "the monitor has removed its own");
        watch.status.set_socket(socket, (file.dev(), file.ino()));
        watch.remove_socket(socket, Some(&path));
        assert!(!path.exists());
        drop(served);
    }

    /// It was killed after it had moved its socket aside to remove it, or before it had moved it to its place.
    #[test]
    fn a_socket_that_the_monitor_has_moved_aside_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let log = Log::to_stderr();
        let watch = watch(own.as_fd(), &log);
        let aside = beside(&path, watch.pid);
        for is_told in [true, false] {
            let made = UnixListener::bind(&aside).unwrap();
            let file = aside.metadata().unwrap();
            if is_told {
                watch
                    .status
                    .set_socket(Socket::Api, (file.dev(), file.ino()));
            }
            watch.remove_socket(Socket::Api, Some(&path));
            assert!(!aside.exists(), "told: {is_told}");
            watch.status.set_socket(Socket::Api, (0, 0));
            drop(made);
        }
    }

    #[test]
    fn how_a_process_ended_is_known_until_it_is_waited_for() {
        let killed = fork_for_test(|| {
            let _ = kill_process(getpid(), Signal::KILL);
            0
        });
        let pidfd = pidfd_open(killed, PidfdFlags::empty()).unwrap();
        assert!(wait_for_exit(pidfd.as_fd(), Some(LIMIT)));
        assert_eq!(cause_of_end(killed), "killed by signal 9");
        rustix::process::waitpid(Some(killed), WaitOptions::empty()).unwrap();
        assert_eq!(cause_of_end(killed), "killed");
        let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        assert!(!wait_for_exit(own.as_fd(), Some(PERIOD)));
    }

    #[test]
    fn a_process_that_ended_by_itself_has_a_status() {
        let ended = fork_for_test(|| 37);
        let pidfd = pidfd_open(ended, PidfdFlags::empty()).unwrap();
        assert!(wait_for_exit(pidfd.as_fd(), Some(LIMIT)));
        assert_eq!(cause_of_end(ended), "ended by status 37");
        rustix::process::waitpid(Some(ended), WaitOptions::empty()).unwrap();
    }

    #[test]
    fn a_pipe_is_told_from_a_file() {
        let (_, writer) = rustix::pipe::pipe().unwrap();
        assert!(is_pipe_or_socket(writer.as_fd()));
        let (socket, _) = UnixStream::pair().unwrap();
        assert!(is_pipe_or_socket(socket.as_fd()));
        assert!(!is_pipe_or_socket(tempfile::tempfile().unwrap().as_fd()));
    }

    /// Until the reaper ends, requests are passed on and the progress is written down.
    #[test]
    fn the_guardian_passes_on_what_the_operator_wants() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let lock = MemoryLock::acquire(&socket).unwrap();
        let child = fork_for_test(|| {
            loop {
                thread::sleep(LIMIT);
            }
        });
        let pidfd = pidfd_open(child, PidfdFlags::empty()).unwrap();
        let log = Log::to_stderr();
        let watch = watch(pidfd.as_fd(), &log);
        thread::scope(|scope| {
            scope.spawn(|| watch.wait_for_reaper(Some(&lock)));
            let heard = request_workers(&socket, 7);
            kill_process(child, Signal::KILL).unwrap();
            assert!(heard.unwrap());
        });
        rustix::process::waitpid(Some(child), WaitOptions::empty()).unwrap();
        assert_eq!(watch.status.workers(), 7);
        let text = std::fs::read_to_string(folder.path().join("api.memory")).unwrap();
        assert!(
            text.starts_with(&format!("{0:>20} {0:>20}\n", 0)),
            "{text:?}"
        );
    }

    /// The killed process is stopped before it frees anything, so it cannot be the one that does.
    #[test]
    fn memory_of_a_killed_reaper_is_freed_by_the_guardian() {
        const LEN: u64 = 32 << 20;
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let child = fork_for_test(|| {
            let memory = std::hint::black_box(vec![1u8; LEN as usize]);
            let _ = rustix::io::write(&writer, &memory[..1]);
            loop {
                thread::sleep(LIMIT);
            }
        });
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(1));
        let pidfd = pidfd_open(child, PidfdFlags::empty()).unwrap();
        let stopped = StoppedExit::of(child, || {
            kill_process(child, Signal::KILL).unwrap();
        });
        assert!(stopped.resident_bytes() >= LEN);
        thread::scope(|scope| {
            scope.spawn(|| watch(pidfd.as_fd(), &Log::to_stderr()).wait_for_reaper(None));
            until("memory is freed", || stopped.resident_bytes() < LEN / 2);
            drop(stopped);
        });
    }
}
