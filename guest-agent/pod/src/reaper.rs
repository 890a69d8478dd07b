//! Waits for every child, as process 1 must, and keeps how those ended that somebody will ask for.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// The children that have ended.
#[derive(Debug)]
pub struct Reaper {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Those that somebody will ask for, with their exit status.
    ours: HashMap<u32, Option<u32>>,
    /// Processes of the agent that have not ended.
    living: u32,
}

impl Reaper {
    /// Starts its thread.
    pub fn start() -> Arc<Self> {
        let reaper = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = Arc::clone(&reaper);
        std::thread::spawn(move || own.run());
        reaper
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a child by `spawn`, which returns its number, so that its end cannot be missed.
    pub fn spawn<E>(&self, spawn: impl FnOnce() -> Result<u32, E>) -> Result<u32, E> {
        let mut state = self.lock();
        let pid = spawn()?;
        state.ours.insert(pid, None);
        state.living += 1;
        self.changed.notify_all();
        Ok(pid)
    }

    /// Waits for the end of a child that [`spawn`](Self::spawn) has started, once, and returns its exit status: 128 and the
    /// signal's number if a signal ended it.
    pub fn wait(&self, pid: u32) -> u32 {
        let mut state = self.lock();
        loop {
            if let Some(&Some(status)) = state.ours.get(&pid) {
                state.ours.remove(&pid);
                return status;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        loop {
            match waitpid(Pid::from_raw(-1), None) {
                Ok(WaitStatus::Exited(pid, status)) => self.ended(pid, status.cast_unsigned()),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.ended(pid, 128 + (signal as i32).cast_unsigned());
                }
                Err(Errno::ECHILD) => self.wait_for_a_child(),
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn wait_for_a_child(&self) {
        let state = self.lock();
        // An orphan that comes to process 1 meanwhile waits until the next child.
        let _state = self
            .changed
            .wait_while(state, |state| state.living == 0)
            .unwrap_or_else(PoisonError::into_inner);
    }

    fn ended(&self, pid: Pid, status: u32) {
        let mut state = self.lock();
        if let Some(kept) = state.ours.get_mut(&pid.as_raw().cast_unsigned()) {
            *kept = Some(status);
            state.living -= 1;
        }
        self.changed.notify_all();
    }
}
