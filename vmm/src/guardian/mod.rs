//! The processes that look after a machine when its monitor has ended.
//!
//! The monitor makes two of them before it does anything else. The *reaper* ([`Reaper`]) shares the monitor's memory and
//! frees it, with several threads, once the monitor is dead: so the end is visible at once, and memory is freed after
//! it. The *guardian* is a copy of the monitor, made while that is small, with the same descriptors. It reports a violent
//! end, removes the monitor's sockets, closes the descriptors, helps the kernel if the reaper is killed too, passes on how many
//! workers the operator wants, and lets go of the lock that says that memory is not free yet. Neither of them kills
//! anything.

pub mod lock;
mod watch;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::process::getpid;

use crate::output::Log;
use crate::sys::{self, Terminal};
use crate::teardown::{Reaper, StatusPage};
use lock::MemoryLock;
use watch::Watch;

/// The machine that is looked after.
#[derive(Clone, Copy, Debug)]
pub struct Watched<'a> {
    /// Its name.
    pub id: &'a str,
    /// Path of its API's socket.
    pub socket: Option<&'a Path>,
    /// It will put the terminal at standard input into raw mode.
    pub has_console: bool,
    /// Where its log goes.
    pub log: &'a Log,
}

/// The monitor's side of the reaper and the guardian. It is never dropped, because the reaper has the same descriptors.
#[derive(Debug)]
pub struct Guardian {
    status: &'static StatusPage,
    /// There is a guardian, too, if there is a reaper.
    reaper: Option<Reaper>,
    lock: Option<MemoryLock>,
}

impl Guardian {
    /// Starts both processes for `machine`, unless `wanted` is false. Should that fail, a
    /// warning is logged, and there are none: then the monitor frees the memory before it ends.
    ///
    /// Must be called while the process has one thread.
    ///
    /// # Errors
    /// mmap(2)'s: there is no memory for the status page.
    pub fn start(wanted: bool, machine: &Watched<'_>) -> io::Result<&'static Self> {
        let status = StatusPage::new()?;
        // The end of process 1 of a namespace ends all others in it.
        let reaper = (wanted && !getpid().is_init()).then(|| start(status, machine));
        let reaper = reaper.transpose().unwrap_or_else(|error| {
            tracing::warn!(
                %error,
                "no reaper and no guardian: the monitor frees the memory before it ends"
            );
            None
        });
        // Only now is there a process that will remove the lock's file.
        let lock = machine.socket.map(MemoryLock::acquire).transpose();
        let lock = lock.unwrap_or_else(|error| {
            tracing::warn!(%error, "`ebb ctl wait` will not know when the memory is free");
            None
        });
        let guardian: &'static Self = Box::leak(Box::new(Self {
            status,
            reaper,
            lock,
        }));
        Ok(guardian)
    }

    /// The page that monitor, reaper and guardian share. It is there even if they are not.
    #[must_use]
    pub const fn status(&self) -> &'static StatusPage {
        self.status
    }

    /// The reaper, if there is one.
    #[must_use]
    pub const fn reaper(&self) -> Option<&Reaper> {
        self.reaper.as_ref()
    }

    /// The monitor has stopped everything and ends now. If the reaper has a job, it does it after that.
    pub fn finish(&self) {
        self.status.set_finished();
        let (_, left_to_reaper) = self.status.progress();
        // The reaper and the guardian hold it until they have ended.
        if let Some(lock) = &self.lock
            && left_to_reaper == 0
        {
            lock.remove_if_last();
        }
    }
}

/// Starts the reaper and the guardian.
fn start(status: &'static StatusPage, machine: &Watched<'_>) -> io::Result<Reaper> {
    let reaper = Reaper::new(status)?;
    let watch = Watch {
        status,
        monitor: reaper.monitor(),
        pid: getpid(),
        reaper: reaper.as_fd(),
        id: machine.id,
        socket: machine.socket.map(absolute),
        terminal: Terminal::at_stdin().filter(|_| machine.has_console),
        log: machine.log,
    };
    sys::process::fork_sharing_files(|files| watch.run(files))?;
    Ok(reaper)
}

/// The monitor's working directory may change, so relative paths are not kept.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_helpers_the_lock_goes_when_the_monitor_has_finished() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let machine = Watched {
            id: "test",
            socket: Some(&socket),
            has_console: false,
            log: &Log::to_stderr(),
        };
        let guardian = Guardian::start(false, &machine).unwrap();
        assert!(guardian.reaper().is_none());
        let lock = folder.path().join("api.memory");
        assert!(lock.exists() && !guardian.status().is_finished());
        guardian.finish();
        assert!(guardian.status().is_finished() && !lock.exists());
    }

    #[test]
    fn a_relative_path_is_of_the_present_folder() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute(Path::new("api")), here.join("api"));
        assert_eq!(absolute(Path::new("/run/api")), Path::new("/run/api"));
    }
}
