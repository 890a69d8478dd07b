//! Work by io_uring(7).
//!
//! The kernel uses a job's pieces and its file from [`Ring::submit`] until the job's completion is read. So the job stays in
//! the ring until then, and a ring that is dropped waits for all of its jobs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::{Action, Done, Job};

/// The most threads of the kernel for one ring: for what a file system cannot do without waiting, and for what has no bound,
/// such as fsync.
const KERNEL_THREADS: [u32; 2] = [8, 4];

/// A ring with room for its jobs.
pub(super) struct Ring {
    ring: IoUring,
    /// A job's index is the user data of its entries.
    jobs: Vec<Option<Job>>,
    free: Vec<u32>,
}

impl Ring {
    pub fn new(depth: u16) -> io::Result<Self> {
        let depth = u32::from(depth).next_power_of_two();
        // Completions need not interrupt this thread: it looks for them (Linux 5.19).
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(depth)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(depth),
                _ => Err(error),
            })?;
        // Linux 5.15; without it the kernel's own bound holds.
        let _ = ring
            .submitter()
            .register_iowq_max_workers(&mut { KERNEL_THREADS });
        Ok(Self {
            ring,
            jobs: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
        })
    }

    pub fn start(&mut self, job: Job) -> Result<(), Job> {
        let Some(index) = self.free.pop() else {
            return Err(job);
        };
        let entry = entry(self.jobs[index as usize].insert(job)).user_data(index.into());
        // SAFETY: the job stays in its slot, unchanged, until its completion is read: its list of pieces, the memory that
        // these name, and its file are valid until then.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            return Ok(());
        }
        self.free.push(index);
        self.jobs[index as usize].take().map_or(Ok(()), Err)
    }

    pub fn submit(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match error.raw_os_error() {
                    // No memory for a request, or completions that wait to be read.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => return false,
                    _ => panic!("io_uring_enter failed: {error}"),
                },
            }
        }
        true
    }

    pub fn next_done(&mut self) -> Option<Done> {
        let completion = self.ring.completion().next()?;
        let index = u32::try_from(completion.user_data()).ok()?;
        let job = self.jobs.get_mut(index as usize)?.take()?;
        self.free.push(index);
        let result = match -completion.result() {
            // The kernel could start no thread for it.
            libc::ECANCELED | libc::EAGAIN | libc::EINTR => job.run(),
            // It is older than this request.
            libc::EINVAL | libc::EOPNOTSUPP if job.action.is_fallocate() => job.run(),
            error if error > 0 => Err(io::Error::from_raw_os_error(error)),
            moved => Ok(moved.unsigned_abs() as usize),
        };
        Some((job, result))
    }

    pub fn wait(&mut self) -> Option<Done> {
        while self.in_flight() > 0 {
            if let Some(done) = self.next_done() {
                return Some(done);
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => std::thread::yield_now(),
                    _ => panic!("io_uring_enter failed: {error}"),
                },
            }
        }
        None
    }

    pub fn in_flight(&self) -> usize {
        self.jobs.len() - self.free.len()
    }
}

impl Action {
    const fn is_fallocate(self) -> bool {
        matches!(self, Self::Punch(_) | Self::Zero(_))
    }
}

/// What the kernel is asked for.
fn entry(job: &Job) -> Entry {
    let file = Fd(job.file.as_raw_fd());
    let (list, count) = job.pieces.list(job.action);
    match job.action {
        Action::Read => opcode::Readv::new(file, list, count).offset(job.at).build(),
        Action::Write => opcode::Writev::new(file, list, count)
            .offset(job.at)
            .build(),
        Action::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Action::Punch(bytes) | Action::Zero(bytes) => opcode::Fallocate::new(file, bytes)
            .offset(job.at)
            .mode(job.action.flags().bits().cast_signed())
            .build(),
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.wait().is_some() {}
    }
}
