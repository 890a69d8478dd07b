//! Work by threads, where there is no io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Action, Done, Job};
use crate::sys::seccomp::Role;

/// Threads: as many jobs are under way at once.
const THREADS: usize = 4;

/// What the threads share.
struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end.
    todo: Condvar,
    /// There is a job that is done.
    done: Condvar,
    /// The same.
    event: EventFd,
}

#[derive(Default)]
struct State {
    todo: VecDeque<Job>,
    done: VecDeque<Done>,
    ends: bool,
}

/// Threads that do jobs.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Done, and taken from the threads.
    ready: VecDeque<Done>,
    depth: usize,
    in_flight: usize,
    /// Files can be asked for what they have in memory (`RWF_NOWAIT`).
    can_look: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.todo.pop_front() {
                drop(state);
                let result = job.run();
                state = self.state();
                state.done.push_back((job, result));
                self.done.notify_one();
                // The counter can only be full when it is readable anyway.
                let _ = self.event.write(1);
            } else if state.ends {
                return;
            } else {
                state = self
                    .todo
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Pool {
    pub fn new(depth: u16, name: &str, role: Role) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            todo: Condvar::new(),
            done: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            ready: VecDeque::new(),
            depth: depth.into(),
            in_flight: 0,
            can_look: true,
        };
        for index in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            let run = move || {
                role.enter();
                shared.work();
            };
            let thread = thread::Builder::new().name(format!("{name}-io{index}"));
            pool.threads.push(thread.spawn(run)?);
        }
        Ok(pool)
    }

    pub fn start(&mut self, job: Job) -> Result<(), Job> {
        if self.in_flight == self.depth {
            return Err(job);
        }
        self.in_flight += 1;
        if let Some(moved) = self.look(&job) {
            self.ready.push_back((job, Ok(moved)));
            return Ok(());
        }
        self.shared.state().todo.push_back(job);
        self.shared.todo.notify_one();
        Ok(())
    }

    /// Reads what is in the host's memory at once: to wake a thread for it would take longer.
    fn look(&mut self, job: &Job) -> Option<usize> {
        if job.action != Action::Read || !self.can_look {
            return None;
        }
        match job.pieces.read(&job.file, job.at, libc::RWF_NOWAIT) {
            Ok(moved) if moved > 0 => Some(moved),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.can_look = false;
                None
            }
            _ => None,
        }
    }

    pub fn next_done(&mut self) -> Option<Done> {
        if self.ready.is_empty() {
            // There may be nothing to read.
            let _ = self.shared.event.read();
            std::mem::swap(&mut self.ready, &mut self.shared.state().done);
        }
        let done = self.ready.pop_front()?;
        self.in_flight -= 1;
        Some(done)
    }

    pub fn wait(&mut self) -> Option<Done> {
        while self.in_flight > 0 {
            if let Some(done) = self.next_done() {
                return Some(done);
            }
            let state = self.shared.state();
            let more = |state: &mut State| state.done.is_empty();
            drop(self.shared.done.wait_while(state, more));
        }
        None
    }

    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl AsRawFd for Pool {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.shared.todo.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread for a file's work panicked");
            }
        }
    }
}
