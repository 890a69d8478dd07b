//! Work that a vCPU thread does before it enters the guest, so that no vCPU has to be brought out for it.
//!
//! In a guest that exits often, every vCPU is out all the time, for moments. A reclaimer that looks by itself
//! rarely meets such a moment. So it first offers its work, and a vCPU thread that is out anyway does it before
//! it enters, if all the others are out too. The guest loses the same time, but nobody is interrupted. If no
//! thread takes the offer for a while, the reclaimer takes it back and brings the vCPUs out.

use std::time::Duration;

use crate::fault::fault_point;
use crate::sync::{AtomicU32, Condvar, Deadline, Mutex, Ordering, lock, try_lock, wait_until};

/// Work that was offered: a request of type `R` with an outcome of type `O`.
#[derive(Debug)]
pub struct Offered<R, O> {
    /// The request; if the work was done, it says how to go on.
    pub request: R,
    /// What the work did, if a vCPU thread has done it.
    pub outcome: Option<O>,
}

/// Holds at most one request that the reclaimer offers to the vCPU threads.
///
/// A vCPU thread that does the work holds the slot's lock meanwhile: [`OfferSlot::take_back`] waits for that,
/// and if the thread panics the request stays in the slot. Locks, in this order: the slot's, the gate's, the
/// tracker's.
pub struct OfferSlot<R, O> {
    /// Not 0: there may be an offer. The only thing that a vCPU thread looks at when there is none.
    open: AtomicU32,
    slot: Mutex<Option<Offered<R, O>>>,
    /// Signalled when the work was done.
    ran: Condvar,
}

impl<R, O> Default for OfferSlot<R, O> {
    fn default() -> Self {
        Self {
            open: AtomicU32::new(0),
            slot: Mutex::new(None),
            ran: Condvar::new(),
        }
    }
}

impl<R, O> OfferSlot<R, O> {
    /// Returns true if there may be an offer. One relaxed load: a thread that misses an offer will look again.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) != 0
    }

    /// Offers `request`, instead of the one that was offered before.
    pub fn post(&self, request: R) {
        *lock(&self.slot) = Some(Offered {
            request,
            outcome: None,
        });
        self.open.store(1, Ordering::Relaxed);
    }

    /// Waits until the offered work was done, for `timeout` at most.
    pub fn wait(&self, timeout: Duration) {
        let deadline = Deadline::after(timeout);
        let mut slot = lock(&self.slot);
        let waiting = |slot: &Option<Offered<R, O>>| {
            slot.as_ref()
                .is_some_and(|offered| offered.outcome.is_none())
        };
        while waiting(&slot) && !deadline.passed() {
            slot = wait_until(&self.ran, slot, deadline);
        }
    }

    /// Takes the offer out of the slot. Waits for work that is being done.
    pub fn take_back(&self) -> Option<Offered<R, O>> {
        self.open.store(0, Ordering::Relaxed);
        lock(&self.slot).take()
    }

    /// For a vCPU thread before it enters the guest: does the offered work if there is some, by `work`, which returns `None`
    /// if a vCPU is in the guest. Never waits for another thread to do so.
    #[cold]
    pub fn run(&self, work: impl FnOnce(&mut R) -> Option<O>) {
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
        *outcome = work(request);
        if outcome.is_some() {
            self.open.store(0, Ordering::Relaxed);
            if !fault_point!("running an offer wakes nobody") {
                self.ran.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    /// Counts how often it was done.
    fn count(times: &mut u32) -> Option<&'static str> {
        *times += 1;
        Some("done")
    }

    #[test]
    fn an_offer_is_run_once_and_taken_back_with_its_outcome() {
        let slot = OfferSlot::default();
        assert!(!slot.is_open());
        slot.run(count);
        assert!(slot.take_back().is_none());
        slot.post(0);
        assert!(slot.is_open());
        slot.run(count);
        assert!(!slot.is_open());
        slot.run(count);
        slot.wait(LONG);
        let offered = slot.take_back().unwrap();
        assert_eq!((offered.request, offered.outcome), (1, Some("done")));
        assert!(slot.take_back().is_none());
    }

    #[test]
    fn an_offer_that_nobody_can_run_is_taken_back_as_it_was() {
        let slot = OfferSlot::<u32, &str>::default();
        slot.post(0);
        slot.run(|_| None);
        let start = Instant::now();
        slot.wait(SOON);
        assert!(start.elapsed() >= SOON && slot.is_open());
        let offered = slot.take_back().unwrap();
        assert_eq!((offered.request, offered.outcome), (0, None));
        assert!(!slot.is_open());
    }

    #[test]
    fn a_vcpu_thread_does_not_wait_for_another_one() {
        let slot = OfferSlot::default();
        slot.post(0);
        let busy = lock(&slot.slot);
        slot.run(count);
        drop(busy);
        assert!(slot.take_back().unwrap().outcome.is_none());
    }
}
