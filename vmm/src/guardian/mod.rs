//! Who looks after a machine when its monitor is gone.
//!
//! Two helpers are made before anything else. The *heir* shares the monitor's memory and frees it, with
//! several threads, once the monitor is dead: so the end is visible at once, and memory follows. The
//! *guardian* is a copy of the monitor made while it is small: it reports a violent end, removes what would be
//! left behind, helps the kernel with a dying heir, and says when memory is free. Neither kills anything.

pub mod lock;
mod watch;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::sys::{self, Board, Heir, Legacy};
use lock::MemoryLock;
use watch::Watch;

/// Where the log goes: a file, or standard error.
pub type Log = Option<Arc<File>>;

/// The monitor's side of heir and guardian. It is never dropped: the heir has the same descriptors.
#[derive(Debug)]
pub struct Guardian {
    helpers: Option<Helpers>,
    lock: Option<MemoryLock>,
}

#[derive(Debug)]
struct Helpers {
    board: &'static Board,
    heir: Heir,
}

impl Guardian {
    /// Starts both helpers for the machine `id` with its API at `socket`, or neither when not `wanted`. Where
    /// that fails a warning is logged, and the machine does without: then memory is free when the monitor has
    /// ended, and not before.
    ///
    /// Must be called while the process has one thread.
    #[must_use]
    pub fn start(wanted: bool, id: &str, socket: Option<&Path>, log: &Log) -> &'static Self {
        // Process 1 of a namespace takes all others with it.
        let helpers = (wanted && !getpid().is_init()).then(|| start(id, socket, log));
        let helpers = helpers.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "no guardian");
            None
        });
        // Only now: from here on there is somebody to remove its file.
        let held = socket.map(MemoryLock::hold).transpose();
        let lock = held.unwrap_or_else(|error| {
            tracing::warn!(%error, "`ebb ctl wait` will not know when the memory is free");
            None
        });
        let this: &'static Self = Box::leak(Box::new(Self { helpers, lock }));
        if let (Some(helpers), Some(lock)) = (&this.helpers, &this.lock) {
            helpers.heir.keep(lock.as_fd());
        }
        this
    }

    /// The socket that is to be removed after a violent end, by device and inode.
    pub fn watch_socket(&self, (device, inode): (u64, u64)) {
        if let Some(helpers) = &self.helpers {
            helpers.board.socket_device.store(device, Ordering::Relaxed);
            helpers.board.socket_inode.store(inode, Ordering::Release);
        }
    }

    /// What is to be freed when the monitor is dead.
    pub fn entrust(&self, legacy: Legacy) {
        if let Some(helpers) = &self.helpers {
            helpers.heir.entrust(legacy);
        }
    }

    /// Whether somebody frees what was entrusted. If not, nothing is entrusted any more.
    #[must_use]
    pub fn frees(&self) -> bool {
        let alive = self.helpers.as_ref().is_some_and(|it| it.heir.is_alive());
        if !alive {
            self.disinherit();
        }
        alive
    }

    /// Nothing is left to be freed.
    pub fn disinherit(&self) {
        if let Some(helpers) = &self.helpers {
            helpers.heir.disinherit();
        }
    }

    /// Whether there are helpers.
    #[must_use]
    pub const fn is_there(&self) -> bool {
        self.helpers.is_some()
    }

    /// The monitor ends by itself, having stopped everything; whatever is entrusted is freed behind it.
    pub fn farewell(&self) {
        let entrusted = match &self.helpers {
            Some(helpers) => {
                helpers.board.clean.store(1, Ordering::Release);
                helpers.board.total.load(Ordering::Relaxed) > 0
            }
            None => false,
        };
        // Otherwise the heir holds it to its end.
        if let Some(lock) = &self.lock
            && !entrusted
        {
            lock.remove_if_last();
        }
    }
}

fn start(id: &str, socket: Option<&Path>, log: &Log) -> io::Result<Helpers> {
    let board = Board::new()?;
    let monitor = pidfd_open(getpid(), PidfdFlags::empty())?;
    let heir = Heir::new(board)?;
    let watch = Watch {
        board,
        monitor: monitor.as_fd(),
        pid: getpid(),
        heir: heir.as_fd(),
        id,
        socket: socket.map(absolute),
        log,
    };
    let kept = [
        Some(monitor.as_fd()),
        Some(heir.as_fd()),
        log.as_ref().map(|file| file.as_fd()),
    ];
    let kept: Vec<_> = kept.into_iter().flatten().collect();
    sys::process::fork(&kept, || watch.run())?;
    Ok(Helpers { board, heir })
}

/// The guardian's folder is not the monitor's for ever.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
