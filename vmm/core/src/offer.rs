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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::Instant;

    use super::*;
    use crate::generation::{Gate, NoKick, VmGeneration};
    use crate::lazy::{LazyMemory, Pieces, Sweep};
    use crate::range::{GpaRange, PAGE_SIZE};
    use crate::release::{Release, ReleasePages, Released};
    use crate::slice::Limits;

    const SOON: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    /// Memory that releases everything.
    struct Memory;

    impl ReleasePages for Memory {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            1
        }

        fn release(&self, ranges: &[GpaRange], _: Release) -> Released {
            Released {
                bytes: ranges.iter().map(|range| range.len()).collect(),
                calls: 1,
                ..Released::default()
            }
        }
    }

    /// Two vCPUs and a lazy page.
    fn with_slicer(test: impl FnOnce(&OfferSlot, &Slicer<'_>)) {
        let generation = Arc::new(VmGeneration::default());
        let lazy = LazyMemory::new(Arc::clone(&generation));
        lazy.free(&[GpaRange::new(0, PAGE_SIZE).unwrap()]);
        let slicer = Slicer {
            lazy: &lazy,
            gate: &Gate::new(2, generation, Box::new(NoKick)),
            pages: &Memory,
            cost: &AtomicU64::new(0),
        };
        test(&OfferSlot::default(), &slicer);
    }

    fn request() -> SliceRequest {
        SliceRequest {
            sweep: Sweep::new(Pieces::Any, u64::MAX),
            how: Release::Discard,
            limits: Limits {
                ranges: 1,
                bytes: u64::MAX,
                pause: LONG,
            },
        }
    }

    #[test]
    fn an_offer_is_run_once_and_taken_back_with_its_outcome() {
        with_slicer(|slot, slicer| {
            assert!(!slot.is_open());
            slot.run(slicer);
            assert!(slot.take_back().is_none());
            slot.post(request());
            assert!(slot.is_open());
            slot.run(slicer);
            assert!(!slot.is_open());
            slicer.lazy.free(&[GpaRange::new(0, PAGE_SIZE).unwrap()]);
            slot.run(slicer);
            slot.wait(LONG);
            let outcome = slot.take_back().unwrap().outcome.unwrap();
            assert_eq!((outcome.ranges, slicer.gate.stats().closings_total), (1, 1));
            assert!(slot.take_back().is_none());
        });
    }

    #[test]
    fn an_offer_that_nobody_can_run_is_taken_back_as_it_was() {
        with_slicer(|slot, slicer| {
            slot.post(request());
            let inside = slicer.gate.enter(0);
            slot.run(slicer);
            let start = Instant::now();
            slot.wait(SOON);
            assert!(start.elapsed() >= SOON && slot.is_open());
            drop(inside);
            let mut offered = slot.take_back().unwrap();
            assert!(offered.outcome.is_none() && !slot.is_open());
            assert_eq!(slicer.open(&mut offered.request).ranges, 1);
        });
    }

    #[test]
    fn a_vcpu_thread_does_not_wait_for_another_one() {
        with_slicer(|slot, slicer| {
            slot.post(request());
            let busy = lock(&slot.slot);
            slot.run(slicer);
            drop(busy);
            assert!(slot.take_back().unwrap().outcome.is_none());
        });
    }
}
