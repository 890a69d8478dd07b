//! The thread that watches the guest's page faults.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::Strict;
use crate::memory::{GuestRam, MemoryError, MissingPages};
use crate::sys::panic_point;
use crate::sys::seccomp::Role;

/// Strict mode cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Page faults cannot be watched.
    #[error("--lazy strict=on cannot be had here")]
    Watch(#[from] MemoryError),
    /// No thread or descriptor is left.
    #[error("starting the thread ebb-strict failed")]
    Thread(#[source] io::Error),
}

/// The thread `ebb-strict`: makes each missing page that a thread waits for. Stopped and joined on drop. Until then any
/// thread that touches guest memory may wait for it, so it must end after all of these.
pub struct StrictThread {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl StrictThread {
    /// Watches `ram`, the memory of `strict`'s machine, from now on.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(strict: Arc<Strict>, ram: Arc<GuestRam>) -> Result<Self, StartError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| StartError::Thread(e.into()))?;
        let stop = Arc::new(stop);
        let stopped = Arc::clone(&stop);
        let pages = MissingPages::watch(ram)?;
        let thread = Builder::new().name("ebb-strict".into()).spawn(move || {
            Role::Strict.enter();
            // When this ends, for whatever reason, `pages` is dropped, and then no thread waits for this one.
            if let Err(error) = watch(&strict, &pages, &stopped) {
                tracing::error!(%error, "strict mode ends: accesses to lazily free memory are not caught any more");
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread.map_err(StartError::Thread)?),
        })
    }
}

impl Drop for StrictThread {
    fn drop(&mut self) {
        let written = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        debug_assert_eq!(written, Ok(8), "an event can be written once");
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread ebb-strict has panicked");
        }
    }
}

fn watch(strict: &Strict, pages: &MissingPages, stop: &OwnedFd) -> io::Result<()> {
    loop {
        let mut fds =
            [stop.as_fd(), pages.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        while let Some(missing) = pages.next()? {
            panic_point();
            strict.judge(&missing);
            pages.zero(&missing)?;
        }
    }
}
