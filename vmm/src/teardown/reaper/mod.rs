//! The reaper: a process that shares the monitor's memory, and frees it once the monitor is dead.
//!
//! The kernel frees the memory of a process on one CPU, and tells the parent of its end only afterwards. But it does not
//! free an address space that another process still uses. So with a reaper the end of the monitor is visible at
//! once, however it ended, and the reaper frees the guest's memory with several threads.
//!
//! The reaper is made by clone(2) with `CLONE_VM` and `CLONE_FILES`, and without `CLONE_THREAD`. A SIGKILL for the monitor
//! does not reach it; the OOM killer, however, ends all processes that share an address space.
//!
//! The reaper sleeps while the monitor lives. The monitor leaves a [`Job`] for it in shared memory; [`StatusPage`] says with
//! how many workers it is done, and how far it is. `process` is what runs in the reaper.

mod process;
mod status;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ebb_core::range::GpaRange;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use super::Plan;
use super::queue::BatchQueue;
use crate::kvm::RunPages;
use crate::memory::GuestRam;
use crate::sys::process::{TaskKind, clone_task};
use crate::sys::{self, nodes};
use process::{Stacks, State, reaper_main};

pub use status::{Socket, StatusPage};

/// What the reaper has to do when the monitor is dead.
#[derive(Debug)]
pub struct Job {
    batches: Vec<Batch>,
    /// Hands them out.
    queue: BatchQueue,
    /// More threads than this have nothing to do.
    max_workers: usize,
    /// Unmapped before anything is freed.
    run_pages: Arc<RunPages>,
    /// Keeps the batches mapped.
    ram: Option<Arc<GuestRam>>,
}

/// A part of the address space that one worker frees in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// Address of its first byte in this process.
    pub address: usize,
    /// Bytes, whole pages.
    pub len: usize,
    /// Files are behind it, see [`sys::Mapping::shared`].
    pub shared: bool,
}

impl Batch {
    /// `range` of `ram` in this process; `None` unless it lies in one region.
    pub fn new(ram: &GuestRam, range: GpaRange) -> Option<Self> {
        let regions = ram.regions();
        let region = regions.iter().find(|region| region.gpa.contains(range))?;
        let offset = range.start() - region.gpa.start();
        Some(Self {
            address: region.host + usize::try_from(offset).ok()?,
            len: usize::try_from(range.len()).ok()?,
            shared: region.file.is_some(),
        })
    }

    /// Its address and length.
    pub const fn place(&self) -> (usize, usize) {
        (self.address, self.len)
    }
}

impl Job {
    /// Free the batches of `plan`, which was made for `ram`, after unmapping `run_pages`.
    #[must_use]
    pub fn new(plan: &Plan, ram: Arc<GuestRam>, run_pages: Arc<RunPages>) -> Self {
        let batches = plan.batches().iter();
        let batches: Vec<_> = batches.filter_map(|it| Batch::new(&ram, *it)).collect();
        Self {
            queue: BatchQueue::new(batches.len(), nodes::all().len()),
            batches,
            max_workers: plan.max_workers(),
            run_pages,
            ram: Some(ram),
        }
    }
}

/// The reaper as the monitor sees it.
#[derive(Debug)]
pub struct Reaper {
    process: OwnedFd,
    state: &'static State,
}

impl Reaper {
    /// Makes the reaper, which has no job yet.
    ///
    /// # Errors
    /// The error of the system call; `ENOSYS` and `EPERM` where the host does not allow pidfds.
    pub fn new(status: &'static StatusPage) -> io::Result<Self> {
        let (monitor, stacks) = (sys::own_process()?, Stacks::new()?);
        let stack = stacks.reaper();
        let state: &'static State = Box::leak(Box::new(State::new(status, monitor, stacks)));
        // SAFETY: the stack is for this task alone, and the argument is a leaked `State`. What `reaper_main` may do is
        // said at the head of its file.
        let clone = || unsafe { clone_task(TaskKind::Process, stack, reaper_main, state) };
        let pid = sys::process::with_signals_blocked(clone)?;
        Ok(Self {
            process: pidfd_open(pid, PidfdFlags::empty())?,
            state,
        })
    }

    /// A pidfd of the monitor, by which the reaper knows of its end. It must stay open.
    #[must_use]
    pub fn monitor(&self) -> BorrowedFd<'_> {
        self.state.monitor.as_fd()
    }

    /// Sets what is to be done when the monitor is dead, instead of an earlier job.
    pub fn set_job(&self, job: Job) {
        let bytes = job.batches.iter().map(|batch| batch.len as u64).sum();
        self.replace_job(bytes, Box::into_raw(Box::new(job)));
    }

    /// Takes the job back: the reaper will have nothing to do.
    pub fn clear_job(&self) {
        self.replace_job(0, ptr::null_mut());
    }

    fn replace_job(&self, bytes: u64, job: *mut Job) {
        self.state.status.set_total(bytes);
        let old = self.state.job.swap(job, Ordering::AcqRel);
        if !old.is_null() {
            // SAFETY: the box comes from `set_job`. The reaper looks at it only when this process is dead.
            drop(unsafe { Box::from_raw(old) });
        }
    }

    /// Returns true if the reaper is alive.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
    }
}

impl AsFd for Reaper {
    /// Its pidfd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

#[cfg(test)]
pub(super) mod tests;
