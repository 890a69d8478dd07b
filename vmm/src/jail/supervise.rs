//! The two processes around a jailed machine. The outer one is outside of all namespaces: who has called `ebb jail` waits for
//! it. The inner one is process 1 of the machine's namespace; the kernel kills all processes there when it ends.
//!
//! Signals go from the outer to the inner to the machine, and the status comes back the same way. When the outer one is dead,
//! the inner one kills the machine and cleans up in its place.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, wait, waitpid,
};

use crate::exit;
use crate::sys::{Request, Signals};

/// What a shell reports of a program that a signal has ended is that much more than the signal's number.
const BY_SIGNAL: i32 = 128;

/// Waits for `child` to end, and returns its status. Meanwhile `signals` are passed on to it. Kills it when the process
/// behind `outer` has ended.
pub(super) fn wait_for(child: Pid, signals: &Signals, outer: Option<&OwnedFd>) -> u8 {
    match watch(child, signals, outer) {
        Ok(()) => {}
        // Without a way to watch, only its end is waited for.
        Err(error) => tracing::debug!(%error, "signals are not passed on"),
    }
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(Some((_, status))) => return status_of(status),
            _ => return exit::CRASH,
        }
    }
}

fn watch(child: Pid, signals: &Signals, outer: Option<&OwnedFd>) -> io::Result<()> {
    let process = pidfd_open(child, PidfdFlags::empty())?;
    let mut outer = outer;
    loop {
        let mut fds = vec![
            PollFd::new(&process, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        fds.extend(outer.map(|outer| PollFd::new(outer, PollFlags::IN)));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            return Ok(());
        }
        while let Some(request) = signals.take()? {
            let signal = match request {
                Request::End => Signal::TERM,
                Request::HangUp => Signal::HUP,
            };
            let _ = kill_process(child, signal);
        }
        if ready.get(2) == Some(&true) {
            let _ = kill_process(child, Signal::KILL);
            outer = None;
        }
    }
}

/// Waits until this process has no children any more, in whatever process group they are: those of a child that has ended are
/// this one's in a namespace where it is process 1.
pub(super) fn wait_for_orphans() {
    while !matches!(wait(WaitOptions::empty()), Err(rustix::io::Errno::CHILD)) {}
}

/// Returns true if the process has ended.
pub(super) fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    poll(&mut fds, Some(&rustix::event::Timespec::default())) == Ok(1)
}

fn status_of(status: WaitStatus) -> u8 {
    let number = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| BY_SIGNAL + signal));
    number
        .and_then(|it| u8::try_from(it).ok())
        .unwrap_or(exit::CRASH)
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;
    use crate::sys::process::{fork, fork_for_test};

    /// As the guardian, which signals for the monitor's process group do not concern.
    #[test]
    fn orphans_in_sessions_of_their_own_are_waited_for() {
        let (is_away, away) = rustix::pipe::pipe().unwrap();
        let parent = fork_for_test(|| {
            let orphan = fork(|| {
                let _ = rustix::process::setsid();
                let _ = rustix::io::write(&away, b"!");
                sleep(Duration::from_millis(200));
                0
            });
            let _ = rustix::io::read(&is_away, &mut [0; 1]);
            wait_for_orphans();
            let left = orphan.map(|orphan| waitpid(Some(orphan), WaitOptions::NOHANG));
            u8::from(!matches!(left, Ok(Err(rustix::io::Errno::CHILD))))
        });
        let (_, status) = waitpid(Some(parent), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }
}
