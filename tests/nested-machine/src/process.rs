//! Helper processes that end with this one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Sender};
use std::thread;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;

use crate::error::{Context, Result};

/// A child that is killed on drop, and by the kernel when this process dies.
///
/// The kernel sends the death signal when the *thread* that has spawned the child ends, so that thread is kept alive.
pub struct Helper {
    child: Child,
    name: String,
    _keeper: Sender<()>,
}

impl Helper {
    /// Spawns `command`. The child inherits `fds` with the same numbers.
    pub fn spawn(mut command: Command, fds: Vec<OwnedFd>) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: between fork and exec the closure only makes system calls on descriptors that it
        // owns; it does not allocate, lock or touch memory shared with the parent.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                for fd in &fds {
                    fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
                }
                Ok(())
            });
        }
        command.process_group(0);
        let (to_us, from_keeper) = mpsc::channel::<io::Result<Child>>();
        let (keeper, dropped) = mpsc::channel::<()>();
        thread::Builder::new()
            .name(format!("keep {name}"))
            .spawn(move || {
                let _ = to_us.send(command.spawn());
                drop(command); // Closes our copies of the descriptors.
                let _ = dropped.recv();
            })
            .context(|| format!("start the thread that keeps {name}"))?;
        let child = from_keeper
            .recv()
            .context(|| format!("start {name}"))?
            .context(|| format!("start {name}"))?;
        Ok(Self {
            child,
            name,
            _keeper: keeper,
        })
    }

    /// The child's exit status, if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .context(|| format!("wait for {}", self.name))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill(); // Fails if it has ended.
        let _ = self.child.wait();
    }
}
