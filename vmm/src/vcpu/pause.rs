//! Keeps the vCPU threads out of the guest while the machine is paused.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ebb_core::generation::Kick;

use crate::kvm::{KickTable, KickTarget};

/// Time until a vCPU is kicked again that has not come: its thread may not have been there yet.
const RETRY: Duration = Duration::from_millis(10);

/// What the vCPU threads shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Run the guest.
    Run,
    /// Rest, with nothing of the last exit left to do.
    Pause,
    /// End.
    Stop,
}

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// The machine ends, so its vCPUs cannot be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine is ending")]
pub struct Ending;

/// What a thread does with the vCPU of this number.
type Job = Arc<dyn Fn(usize, &mut KickTarget) + Send + Sync>;

/// By this the vCPU threads of a machine are paused, resumed and stopped. They look at it before each entry: one load.
pub struct PauseSwitch {
    wish: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    kicks: Arc<KickTable>,
}

/// Held for moments, but by a thread that rests or waits for others to rest.
struct State {
    /// Which vCPUs rest.
    resting: Vec<bool>,
    /// What each is to do meanwhile, and which have not done it yet.
    job: Option<Job>,
    due: Vec<bool>,
    /// A vCPU thread has ended, or shall.
    ending: bool,
}

impl PauseSwitch {
    /// For so many vCPUs, whose threads register with `kicks`.
    #[must_use]
    pub fn new(vcpus: usize, kicks: Arc<KickTable>) -> Self {
        Self {
            wish: AtomicU8::new(RUN),
            state: Mutex::new(State {
                resting: vec![false; vcpus],
                job: None,
                due: vec![false; vcpus],
                ending: false,
            }),
            changed: Condvar::new(),
            kicks,
        }
    }

    /// Has the vCPUs rest from the start, before any of their threads is there.
    pub fn start_paused(&self) {
        self.wish.store(PAUSE, Ordering::SeqCst);
    }

    /// What a vCPU thread shall do. It must have forgotten earlier kicks before.
    #[must_use]
    pub fn wish(&self) -> Wish {
        match self.wish.load(Ordering::SeqCst) {
            RUN => Wish::Run,
            PAUSE => Wish::Pause,
            _ => Wish::Stop,
        }
    }

    /// Brings all vCPUs out of the guest, and returns when all of them rest. They do until [`PauseSwitch::resume`].
    ///
    /// # Errors
    /// [`Ending`].
    pub fn pause(&self) -> Result<(), Ending> {
        let mut state = self.state();
        if !state.ending {
            self.wish.store(PAUSE, Ordering::SeqCst);
        }
        loop {
            if state.ending {
                return Err(Ending);
            }
            let mut left = (state.resting.iter().enumerate())
                .filter(|(_, rests)| !**rests)
                .peekable();
            if left.peek().is_none() {
                return Ok(());
            }
            left.for_each(|(index, _)| self.kicks.kick(index));
            let waited = self.changed.wait_timeout(state, RETRY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the thread of each vCPU do `job` while they rest, and returns what came of it, by the number of the vCPU.
    ///
    /// # Errors
    /// [`Ending`].
    pub fn at_rest<T: Send + 'static>(
        &self,
        job: impl Fn(&mut KickTarget) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, Ending> {
        let mut state = self.state();
        let results: Vec<_> = state.due.iter().map(|_| Mutex::new(None)).collect();
        let results = Arc::new(results);
        let kept = Arc::clone(&results);
        state.job = Some(Arc::new(move |index, vcpu| {
            let result = job(vcpu);
            *kept[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }));
        state.due.fill(true);
        self.changed.notify_all();
        while state.due.contains(&true) && !state.ending {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.job = None;
        state.due.fill(false);
        let take = |slot: &Mutex<Option<T>>| {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            slot.take()
        };
        let all: Option<Vec<T>> = results.iter().map(take).collect();
        all.ok_or(Ending)
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// [`Ending`].
    pub fn resume(&self) -> Result<(), Ending> {
        let state = self.state();
        if state.ending {
            return Err(Ending);
        }
        self.wish.store(RUN, Ordering::SeqCst);
        self.changed.notify_all();
        Ok(())
    }

    /// From now on the vCPUs shall end. Those that rest hear of it; who waits for others to rest gives up.
    pub fn stop(&self) {
        let mut state = self.state();
        state.ending = true;
        self.wish.store(STOP, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// What the thread of a vCPU does after `Wish::Pause`, when KVM has completed the last exit.
    pub fn rest(&self, index: usize, vcpu: &mut KickTarget) {
        let mut state = self.state();
        state.resting[index] = true;
        self.changed.notify_all();
        while self.wish() == Wish::Pause {
            if let (true, Some(job)) = (state.due[index], state.job.clone()) {
                drop(state);
                job(index, vcpu);
                state = self.state();
                state.due[index] = false;
                self.changed.notify_all();
                continue;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.resting[index] = false;
        drop(state);
        vcpu.was_paused();
    }

    /// The thread of a vCPU has ended, so the machine does.
    pub fn has_ended(&self) {
        self.state().ending = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
