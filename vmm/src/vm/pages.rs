//! Watches the page server of a restored machine. Any thread that touches memory which that has not given yet waits for it, in the
//! kernel, without a bound: a vCPU, a device's worker, the first thread while it builds the machine. So
//! - the machine ends when its server is gone: what the guest has not read yet is lost;
//! - an end takes [`PATIENCE`] at most. After that the process is ended as if it were killed. The threads that wait do no more: no
//!   disk gets zeros in the place of data that never came. Guardian and reaper do the rest.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::LaunchError;
use super::instance::Instance;
use crate::bus::ExitReason;
use crate::exit;
use crate::snapshot::PageServer;
use crate::sys::process::exit_now;
use crate::sys::seccomp::Role;
use crate::sys::{Request, Signals, panic_point};

/// How long the end of a machine may take whose threads may wait for a page server.
const PATIENCE: Duration = Duration::from_secs(5);

/// The machine is being built: nobody reads the signals.
const BUILDING: u8 = 0;
/// It runs, or ends.
const RUNNING: u8 = 1;
/// Nobody needs its memory any more.
const OVER: u8 = 2;

/// What the thread and its owner share.
struct Stage {
    now: AtomicU8,
    changed: OwnedFd,
}

/// The thread `ebb-pages`. Stopped and joined on drop, when nobody needs the memory any more.
pub struct PageWatch {
    stage: Arc<Stage>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread knows.
struct Watch {
    server: Arc<PageServer>,
    instance: Arc<Instance>,
    signals: Signals,
    stage: Arc<Stage>,
}

impl PageWatch {
    /// Watches `server`, which gives `instance` its memory. Until [`PageWatch::built`] also looks whether somebody reads `signals`.
    ///
    /// # Errors
    /// [`LaunchError::System`].
    pub fn start(
        server: Arc<PageServer>,
        instance: Arc<Instance>,
        signals: &Signals,
    ) -> Result<Self, LaunchError> {
        let failed = LaunchError::system("thread ebb-pages");
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stage = Arc::new(Stage {
            now: AtomicU8::new(BUILDING),
            changed: changed.map_err(|error| failed(error.into()))?,
        });
        let watch = Watch {
            server,
            instance,
            signals: signals.try_clone().map_err(&failed)?,
            stage: Arc::clone(&stage),
        };
        let thread = Builder::new().name("ebb-pages".into()).spawn(move || {
            Role::Pages.enter();
            watch.run();
        });
        Ok(Self {
            stage,
            thread: Some(thread.map_err(failed)?),
        })
    }

    /// From now on the first thread reads the signals.
    pub fn built(&self) {
        self.stage.set(RUNNING);
    }
}

impl Drop for PageWatch {
    fn drop(&mut self) {
        self.stage.set(OVER);
        if let Some(thread) = self.thread.take() {
            // It has reported a panic itself.
            let _ = thread.join();
        }
    }
}

impl Stage {
    fn set(&self, stage: u8) {
        self.now.store(stage, Ordering::Release);
        // The counter cannot overflow.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }

    fn is(&self, stage: u8) -> bool {
        self.now.load(Ordering::Acquire) == stage
    }
}

impl Watch {
    fn run(&self) {
        let mut end = None;
        while !self.stage.is(OVER) {
            panic_point();
            if self.server.has_gone() && self.instance.exit.reason().is_none() {
                tracing::error!(
                    "the page server {} is gone, and with it what the guest has not read of its memory yet: the machine ends",
                    self.server.path().display()
                );
                self.instance.exit.request(ExitReason::PageServer);
            }
            let is_asked = self.instance.exit.reason().is_some() || self.has_signal();
            end = is_asked.then(|| end.unwrap_or_else(|| Instant::now() + PATIENCE));
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                self.force();
            }
            self.wait(is_asked, left);
        }
    }

    /// Waits until something has changed, or for so long.
    fn wait(&self, is_asked: bool, left: Option<Duration>) {
        let mut fds = self.server.signs_of_life();
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        fds.push(input(self.stage.changed.as_fd()));
        if !is_asked {
            fds.push(input(self.instance.exit.as_fd()));
            if self.stage.is(BUILDING) {
                fds.push(input(self.signals.as_fd()));
            }
        }
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        // What has happened is looked at afterwards, also after an interruption.
        let _ = poll(&mut fds, left.as_ref());
        let _ = rustix::io::read(&self.stage.changed, &mut [0; 8]);
    }

    /// Returns true if a signal has come while nobody reads them.
    fn has_signal(&self) -> bool {
        self.stage.is(BUILDING) && self.signals.are_pending()
    }

    /// Ends the process, which had its time.
    fn force(&self) {
        let asked = || match self.signals.take() {
            Ok(Some(Request::End)) => Some(ExitReason::Stop),
            _ => None,
        };
        let Some(reason) = self.instance.exit.reason().or_else(asked) else {
            return;
        };
        tracing::error!(
            "the machine ends by force: its threads wait for memory that the page server {} does not give",
            self.server.path().display()
        );
        self.end_process(reason)
    }

    fn end_process(&self, reason: ExitReason) -> ! {
        self.instance.finish_log();
        exit_now(match self.instance.config.as_firecracker {
            true => exit::firecracker_status(reason),
            false => exit::status(reason),
        })
    }
}

impl Drop for Watch {
    /// After a panic nobody would see to it that the machine ends while its threads wait.
    fn drop(&mut self) {
        if thread::panicking() {
            self.end_process(ExitReason::Crash);
        }
    }
}
