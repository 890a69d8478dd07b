//! A slice that a vCPU thread runs before it enters the guest, so that no vCPU has to be brought out for it.
//!
//! In a guest that exits often, every vCPU is out all the time, for moments. A reclaimer that looks by itself
//! rarely meets such a moment. So it first offers its slice, and a vCPU thread that is out anyway runs it before
//! it enters, if all the others are out too. The guest loses the same time, but nobody is interrupted. If no
//! thread takes the offer for a while, the reclaimer takes it back and brings the vCPUs out.

use std::time::Duration;

use crate::fault::fault_point;
use crate::slice::{SliceOutcome, SliceRequest, Slicer};
use crate::sync::{AtomicU32, Condvar, Deadline, Mutex, Ordering, lock, try_lock, wait_until};

/// One offered slice.
#[derive(Debug)]
pub struct Offered {
    /// The request; if the slice was run, its sweep has moved.
    pub request: SliceRequest,
    /// What the slice did, if a vCPU thread has run it.
    pub outcome: Option<SliceOutcome>,
}

/// Holds at most one slice that the reclaimer offers to the vCPU threads.
///
/// A vCPU thread that runs the slice holds the slot's lock meanwhile: [`OfferSlot::take_back`] waits for that,
/// and if the thread panics the request stays in the slot. Locks, in this order: the slot's, the gate's, the
/// tracker's.
#[derive(Default)]
pub struct OfferSlot {
    /// Not 0: there may be an offer. The only thing that a vCPU thread looks at when there is none.
    open: AtomicU32,
    slot: Mutex<Option<Offered>>,
    /// Signalled when the slice has been run.
    ran: Condvar,
}

impl OfferSlot {
    /// Returns true if there may be an offer. One relaxed load: a thread that misses an offer will look again.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) != 0
    }

    /// Offers a slice, instead of the one that was offered before.
    pub fn post(&self, request: SliceRequest) {
        *lock(&self.slot) = Some(Offered {
            request,
            outcome: None,
        });
        self.open.store(1, Ordering::Relaxed);
    }

    /// Waits until the offered slice has been run, for `timeout` at most.
    pub fn wait(&self, timeout: Duration) {
        let deadline = Deadline::after(timeout);
        let mut slot = lock(&self.slot);
        let waiting = |slot: &Option<Offered>| {
            slot.as_ref()
                .is_some_and(|offered| offered.outcome.is_none())
        };
        while waiting(&slot) && !deadline.passed() {
            slot = wait_until(&self.ran, slot, deadline);
        }
    }

    /// Takes the offer out of the slot. Waits for a slice that is being run.
    pub fn take_back(&self) -> Option<Offered> {
        self.open.store(0, Ordering::Relaxed);
        lock(&self.slot).take()
    }

    /// For a vCPU thread before it enters the guest: runs the offered slice if there is one and every vCPU is
    /// out. Never waits for another thread to do so.
    #[cold]
    pub fn run(&self, slicer: &Slicer<'_>) {
        let Some(mut slot) = try_lock(&self.slot) else {
            return;
        };
        let Some(Offered {
            request,
            outcome: outcome @ None,
        }) = &mut *slot
        else {
            return;
        };
        *outcome = slicer.held_if_empty(request);
        if outcome.is_some() {
            self.open.store(0, Ordering::Relaxed);
            if !fault_point!("running an offer wakes nobody") {
                self.ran.notify_all();
            }
        }
    }
}
