//! A slice that a vCPU thread runs on its way in, so that nobody has to be brought out for it.
//!
//! A guest that exits often has its vCPUs out all the time, for moments. A reclaimer that comes by itself rarely
//! meets such a moment; so it first offers its slice, and a vCPU thread that is out anyway, when all the others are
//! out too, runs it before it enters. The time is the guest's either way, but nobody is interrupted. Only when
//! nobody has come by for a while, the reclaimer kicks.

use std::time::Duration;

use super::slice::{Limits, Slice, Slicer, Stage};
use crate::lazy::Sweep;
use crate::sync::{
    AtomicU32, Condvar, Deadline, Mutant, Mutex, Ordering, lock, mutant, try_lock, wait_until,
};

/// One slice to run.
#[derive(Clone, Debug)]
pub struct Work {
    /// Where to go on.
    pub sweep: Sweep,
    /// What to do.
    pub stage: Stage,
    /// How much of it.
    pub limits: Limits,
}

/// What lies on the desk.
#[derive(Default)]
struct Desk {
    work: Option<Work>,
    done: Option<Slice>,
}

/// Where the reclaimer lays a slice down for whoever comes by.
///
/// The desk's lock is held for the slice by the vCPU thread that runs it: who wants the work back waits for
/// that, and a thread that panics leaves the work where it was. Locks, in this order: the desk's, the gate's, the
/// tracker's.
#[derive(Default)]
pub struct Offer {
    /// Not 0: there may be work. All that a way in looks at when there is none.
    open: AtomicU32,
    desk: Mutex<Desk>,
    done: Condvar,
}

impl Offer {
    /// Whether there may be work. One relaxed load: who misses an offer comes by again.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) != 0
    }

    /// Lays `work` down. One at a time.
    pub fn post(&self, work: Work) {
        *lock(&self.desk) = Desk {
            work: Some(work),
            done: None,
        };
        self.open.store(1, Ordering::Relaxed);
    }

    /// Waits until somebody has run the slice, for `patience` at most.
    pub fn wait(&self, patience: Duration) {
        let deadline = Deadline::after(patience);
        let mut desk = lock(&self.desk);
        while desk.done.is_none() && !deadline.passed() {
            desk = wait_until(&self.done, desk, deadline);
        }
    }

    /// Takes the work back, and what was done of it, if anybody came by. Waits for a slice that is being run.
    pub fn take_back(&self) -> Option<(Work, Option<Slice>)> {
        self.open.store(0, Ordering::Relaxed);
        let Desk { work, done } = std::mem::take(&mut *lock(&self.desk));
        Some((work?, done))
    }

    /// For a vCPU thread on its way in: runs the slice if there is one and every vCPU is out. Never waits for
    /// another thread to do so.
    #[cold]
    pub fn run(&self, slicer: &Slicer<'_>) {
        let Some(mut desk) = try_lock(&self.desk) else {
            return;
        };
        let Desk { work, done } = &mut *desk;
        let (Some(work), None) = (work, &done) else {
            return;
        };
        let Work {
            sweep,
            stage,
            limits,
        } = work;
        if let Some(slice) = slicer.in_passing(sweep, *stage, *limits) {
            *done = Some(slice);
            self.open.store(0, Ordering::Relaxed);
            if !mutant(Mutant::SilentOffer) {
                self.done.notify_all();
            }
        }
    }
}
