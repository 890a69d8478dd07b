//! Reads, writes and other work on files, several at a time, while the thread that asks for it goes on: by io_uring, or by
//! threads.

mod pieces;
mod pool;
mod ring;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::seccomp::Role;
use pool::Pool;
use ring::Ring;

pub use pieces::{Outside, Pieces};

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read into the pieces.
    Read,
    /// Write the pieces.
    Write,
    /// Make durable what was written (fdatasync(2)).
    Sync,
    /// Free what so many bytes take; they read as zeroes then.
    Punch(u64),
    /// Make so many bytes zeroes, and keep the room that they take.
    Zero(u64),
}

/// Work on a file.
pub struct Job {
    /// By this the caller knows it again.
    pub token: u32,
    /// The file.
    pub file: Arc<File>,
    /// What is to be done.
    pub action: Action,
    /// The position in the file.
    pub at: u64,
    /// Memory for [`Action::Read`] and [`Action::Write`].
    pub pieces: Pieces,
}

impl Job {
    /// Does it on the calling thread. Returns the number of bytes that were read or written, which may be fewer than asked for.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn run(&self) -> io::Result<usize> {
        loop {
            let done = self.try_run();
            match done {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    fn try_run(&self) -> io::Result<usize> {
        match self.action {
            Action::Read => self.pieces.read(&self.file, self.at, 0),
            Action::Write => self.pieces.write(&self.file, self.at),
            Action::Sync => self.file.sync_data().map(|()| 0),
            Action::Punch(bytes) | Action::Zero(bytes) => {
                fallocate(&*self.file, self.action.flags(), self.at, bytes)?;
                Ok(0)
            }
        }
    }
}

impl Action {
    /// Those of fallocate(2), if it does this.
    const fn flags(self) -> FallocateFlags {
        let how = match self {
            Self::Zero(_) => FallocateFlags::ZERO_RANGE,
            _ => FallocateFlags::PUNCH_HOLE,
        };
        how.union(FallocateFlags::KEEP_SIZE)
    }
}

/// Work that is done, and how: the number of bytes that were read or written.
pub type Done = (Job, io::Result<usize>);

/// Which way work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// io_uring(7).
    Ring,
    /// Threads.
    Threads,
}

/// Does work on files. Dropping it waits for the work that is under way.
pub struct Transfers(Way);

enum Way {
    Ring(Box<Ring>),
    Pool(Pool),
}

impl Transfers {
    /// Does up to `depth` jobs at a time by io_uring.
    ///
    /// # Errors
    /// The host's kernel has no io_uring, or does not let this process use it.
    pub fn ring(depth: u16) -> io::Result<Self> {
        Ok(Self(Way::Ring(Box::new(Ring::new(depth)?))))
    }

    /// Does up to `depth` jobs at a time by threads whose names begin with `name`, and which make the system calls of `role`.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn threads(depth: u16, name: &str, role: Role) -> io::Result<Self> {
        Ok(Self(Way::Pool(Pool::new(depth, name, role)?)))
    }

    /// Which way it is done.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self.0 {
            Way::Ring(_) => Kind::Ring,
            Way::Pool(_) => Kind::Threads,
        }
    }

    /// Takes on a job. It may begin only at [`submit`](Self::submit).
    ///
    /// # Errors
    /// The job, if there are as many as there can be.
    pub fn start(&mut self, job: Job) -> Result<(), Job> {
        match &mut self.0 {
            Way::Ring(ring) => ring.start(job),
            Way::Pool(pool) => pool.start(job),
        }
    }

    /// Lets the jobs begin. Returns false if some could not, for want of memory: try again soon.
    pub fn submit(&mut self) -> bool {
        match &mut self.0 {
            Way::Ring(ring) => ring.submit(),
            Way::Pool(_) => true,
        }
    }

    /// The next job that is done, if there is one.
    pub fn next_done(&mut self) -> Option<Done> {
        match &mut self.0 {
            Way::Ring(ring) => ring.next_done(),
            Way::Pool(pool) => pool.next_done(),
        }
    }

    /// Waits until a job is done, if there are any.
    pub fn wait(&mut self) -> Option<Done> {
        match &mut self.0 {
            Way::Ring(ring) => ring.wait(),
            Way::Pool(pool) => pool.wait(),
        }
    }

    /// Number of jobs that were taken on and not handed out as done.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match &self.0 {
            Way::Ring(ring) => ring.in_flight(),
            Way::Pool(pool) => pool.in_flight(),
        }
    }
}

/// Readable when a job is done.
impl AsRawFd for Transfers {
    fn as_raw_fd(&self) -> RawFd {
        match &self.0 {
            Way::Ring(ring) => ring.as_raw_fd(),
            Way::Pool(pool) => pool.as_raw_fd(),
        }
    }
}

/// Returns true if the file's system can free what a part of a file takes. Asks by freeing nothing: what is behind the end.
#[must_use]
pub fn can_punch(file: &File, size: u64) -> bool {
    let at = size.next_multiple_of(1 << 12);
    let punched = fallocate(file, Action::Punch(0).flags(), at, 1 << 12);
    // Behind the end of a block device nothing can be freed, whatever it can do.
    !matches!(punched, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::BADF))
}
