//! Releases lazily freed memory: the requests to reclaim, and what one reclaim leaves to the next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebb_core::generation::Gate;
use ebb_core::lazy::LazyMemory;
use ebb_core::offer::OfferSlot;
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::{Release, ReleasePages};
use ebb_core::slice::{SliceOutcome, SliceRequest, Slicer};

use super::backoff::Backoff;
use super::free::{self, FreeLists, FreePagesStats};
use super::granules::Marked;
use super::held::{Held, Look};
use super::job::{Job, MAX_MISSES};
use super::outcome::Pause;
use super::pace::Pace;
use super::stats::{Counters, ReclaimStats};
use super::turns::{Ended, Turns};
use super::{Mode, Order, Outcome, Reach, ReclaimTuning, Sample, Until};
use crate::arena::Arenas;

/// How long the status may look at free lists, and the reclaim thread, before they take an estimate.
const STATUS_TIME: Duration = Duration::from_micros(500);
const ESTIMATE_TIME: Duration = Duration::from_millis(2);

/// How long such an estimate is used.
const ESTIMATE_AGE: Duration = Duration::from_millis(500);

/// Work that a vCPU thread does for the machine before it enters the guest.
pub trait EntryHook: Send + Sync {
    /// Called before each entry. Costs next to nothing if there is nothing to do. Never waits for another vCPU.
    fn before_entry(&self);
}

/// What one step leaves to the next, and one reclaim to the next.
pub(super) struct Round {
    /// The size of chunks.
    pub pace: Pace,
    /// The last pause, and when it ended.
    pub last_pause: Option<(Instant, Pause)>,
    /// The machine's generation when the last reclaim began. What was freed up to then has survived it.
    old: u64,
    /// How far the granules of each arena are marked free.
    pub marked: Vec<Marked>,
    /// Where orders in the background look for discarded memory that came back.
    pub look: Look,
    /// Skips offers to the vCPU threads after offers that nobody took: a guest that does not exit costs reclaim little.
    pub offers: Backoff,
    /// Runs slices with the gate open after vCPUs have missed [`MAX_MISSES`] pauses in a row.
    pub holds: Backoff,
    /// How free lists are read.
    pub free: free::Progress,
}

/// Returns lazily freed memory to the host. Of several reclaims one works at a time, for a few steps, the most urgent one
/// first. A reuse never waits for a reclaim, only for the chunk that it meets.
///
/// Whole blocks are discarded by calls of many megabytes with the vCPUs running: one interrupt for each call is nothing
/// compared with the work. Smaller pieces are discarded in slices, see [`ebb_core::slice`].
///
/// **Locks**, in this order: a turn (for some steps), the offer slot's, the gate's, the tracker's. `round` and the lock of
/// `turns` are held for moments, and no other lock is taken under them.
pub struct Reclaimer {
    pub(super) lazy: Arc<LazyMemory>,
    pub(super) pages: Arc<dyn ReleasePages>,
    pub(super) gate: Arc<Gate>,
    pub(super) arenas: Arenas,
    pub(super) free: Option<Box<dyn FreeLists>>,
    pub(super) tuning: ReclaimTuning,
    round: Mutex<Round>,
    /// Reuses that have waited, as far as events tell.
    told_waits: AtomicU64,
    /// Cost of a range in a slice, see [`Slicer::cost`].
    cost: AtomicU64,
    pub(super) offer: OfferSlot<SliceRequest, SliceOutcome>,
    pub(super) free_offer: OfferSlot<free::FreeOffer, free::Taken>,
    pub(super) turns: Turns,
    pub(super) counters: Counters,
    pub(super) free_counters: free::Counters,
}

impl Reclaimer {
    /// Reclaims what is lazy in `lazy`, whose addresses are those of `pages`, in a machine whose vCPUs enter through `gate`.
    #[must_use]
    pub fn new(
        lazy: Arc<LazyMemory>,
        pages: Arc<dyn ReleasePages>,
        gate: Arc<Gate>,
        tuning: ReclaimTuning,
    ) -> Self {
        Self {
            lazy,
            pages,
            gate,
            arenas: Arenas::from([]),
            free: None,
            tuning,
            round: Mutex::new(Round {
                pace: Pace::new(),
                last_pause: None,
                marked: Vec::new(),
                look: Look::new(),
                old: 0,
                offers: Backoff::new(),
                holds: Backoff::tolerant(MAX_MISSES - 1),
                free: free::Progress::new(),
            }),
            told_waits: AtomicU64::new(0),
            cost: AtomicU64::new(0),
            offer: OfferSlot::default(),
            free_offer: OfferSlot::default(),
            turns: Turns::default(),
            counters: Counters::default(),
            free_counters: free::Counters::default(),
        }
    }

    /// Reclaims granules of `arenas`, too, whose addresses are those of its pages.
    #[must_use]
    pub fn with_arenas(self, arenas: Arenas) -> Self {
        self.round().marked = vec![Marked::default(); arenas.len()];
        let reclaimer = Self { arenas, ..self };
        // What is freed from now on has not survived a reclaim.
        reclaimer.next_generation();
        reclaimer
    }

    /// Takes what is free by `lists`, too, whose addresses are those of its pages.
    #[must_use]
    pub fn with_free_lists(self, lists: Box<dyn FreeLists>) -> Self {
        Self {
            free: Some(lists),
            ..self
        }
    }

    /// When and how it reclaims.
    #[must_use]
    pub const fn tuning(&self) -> ReclaimTuning {
        self.tuning
    }

    /// Discards up to `bytes` for someone who waits: unmapped memory, whole blocks, fragments, and at the end less than
    /// 2 MiB of a block.
    pub fn reclaim(&self, bytes: u64) -> Outcome {
        self.reclaim_until(bytes, Until::default())
    }

    /// As [`Reclaimer::reclaim`], but not for longer than `until`: what was taken by then is the result.
    pub fn reclaim_until(&self, bytes: u64, until: Until<'_>) -> Outcome {
        let order = Order {
            bytes,
            reach: Reach::Everything,
            newest: u64::MAX,
            urgent: true,
        };
        self.discard_until(order, until)
    }

    /// Discards what `order` says. What the kernel refuses stays as it was and is not tried again in this call.
    pub fn discard(&self, order: Order) -> Outcome {
        self.discard_until(order, Until::default())
    }

    /// As [`Reclaimer::discard`], but not for longer than `until`.
    pub fn discard_until(&self, order: Order, until: Until<'_>) -> Outcome {
        let now = self.lazy.generation();
        let old = std::mem::replace(&mut self.round().old, now);
        self.next_generation();
        let outcome = self.work(order, Release::Discard, until, |job| job.discard(old, now));
        self.count_discard(&outcome);
        outcome
    }

    /// Invalidates what `order` says: it becomes unmapped, so the host may take it at any time, and to discard it later
    /// interrupts no vCPU. Granules are marked free in the same way, but stay lazy. Memory that cannot be marked free is left
    /// alone. An order by age discards such memory, and granules (see [`Order::newest`]).
    pub fn invalidate(&self, order: Order) -> Outcome {
        self.invalidate_until(order, Until::default())
    }

    /// As [`Reclaimer::invalidate`], but not for longer than `until`.
    pub fn invalidate_until(&self, order: Order, until: Until<'_>) -> Outcome {
        let (marks, by_age) = (self.pages.can_mark_free(), order.newest < u64::MAX);
        let now = self.lazy.generation();
        self.next_generation();
        let mut outcome = self.work(order, Release::MarkFree, until, |job| {
            if marks {
                job.lazy_ram()?;
            }
            if by_age { Ok(()) } else { job.mark_arenas(now) }
        });
        self.counters.invalidate_calls_total.add(outcome.calls);
        self.counters
            .invalidate_failures_total
            .add(outcome.failures);
        if by_age && !outcome.cut_short {
            let rest = Order {
                bytes: order.bytes - outcome.bytes.min(order.bytes),
                ..order
            };
            let aged = self.work(rest, Release::Discard, until, |job| {
                job.discard_aged(!marks)
            });
            self.count_discard(&aged);
            outcome += aged;
        }
        outcome
    }

    /// Tells what a reclaim has done, and that reuses had to wait for it.
    fn tell(&self, outcome: &Outcome) {
        let Outcome {
            bytes, failures, ..
        } = *outcome;
        if bytes > 0 || failures > 0 {
            let micros = u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX);
            event!(
                "reclaim",
                bytes,
                failures,
                micros,
                cut_short = outcome.cut_short
            );
        }
        let waits = self.lazy.snapshot().reuse_waits_total;
        let new = waits.saturating_sub(self.told_waits.swap(waits, Ordering::Relaxed));
        if new > 0 {
            event!("reuse_stall", waits = new);
        }
    }

    fn count_discard(&self, outcome: &Outcome) {
        self.tell(outcome);
        self.counters.discard_calls_total.add(outcome.calls);
        self.counters.discard_failures_total.add(outcome.failures);
    }

    fn work<'a>(
        &'a self,
        order: Order,
        how: Release,
        until: Until<'a>,
        work: impl FnOnce(&mut Job<'a>) -> Result<(), Ended>,
    ) -> Outcome {
        let start = Instant::now();
        let mut job = Job {
            reclaimer: self,
            order,
            how,
            ticket: self.turns.ticket(order.urgent, until),
            outcome: Outcome::default(),
        };
        let ended = work(&mut job).is_err();
        Outcome {
            duration: start.elapsed(),
            cut_short: ended,
            ..job.outcome
        }
    }

    /// Discards `ranges`, without tracking them, for a guest that will use them without a message. The caller must make
    /// sure that nobody uses them before this returns.
    pub fn discard_now(&self, ranges: &[GpaRange]) -> Outcome {
        let start = Instant::now();
        let mut outcome = Outcome::from(&self.pages.release(ranges, Release::Discard));
        self.counters.eager_bytes_total.add(outcome.bytes);
        self.counters.eager_calls_total.add(outcome.calls);
        self.counters.discard_failures_total.add(outcome.failures);
        outcome.duration = start.elapsed();
        outcome
    }

    /// Ends all reclaims that are under way, each after the step that it is at, and each later one.
    pub fn stop(&self) {
        self.turns.stop();
    }

    /// Begins a generation, so that what is freed in arenas from now on is younger than what is free already. For RAM the
    /// tracker begins one at each free; but no one sees a free in an arena.
    fn next_generation(&self) {
        if !self.arenas.is_empty() {
            let generation = self.lazy.begin_generation();
            self.arenas
                .iter()
                .for_each(|arena| arena.publish(generation));
        }
    }

    /// Fills in the machine's lazy memory in `sample`. Arenas are counted only if the decision may depend on them.
    #[must_use]
    pub fn sampled(&self, sample: Sample) -> Sample {
        let lazy = self.lazy.snapshot();
        if matches!(self.tuning.mode, Mode::Age(_)) {
            self.next_generation();
        }
        let counted = self.tuning.mode != Mode::Pressure || !sample.is_calm();
        let arenas = self.arenas.iter().filter(|_| counted);
        let granules: u64 = arenas.map(|arena| arena.lazy_bytes()).sum();
        Sample {
            lazy: lazy.lazy_bytes + granules,
            unmapped: lazy.unmapped_bytes,
            generation: lazy.generation,
            ..sample
        }
    }

    /// Counts a reclaim that memory pressure has started.
    pub(super) fn count_pressure_event(&self) {
        self.counters.pressure_events_total.increment();
    }

    /// Counts how often the kernel has said that a limit was reached.
    pub(super) fn count_limit_events(&self, events: u64) {
        self.counters.limit_events_total.add(events);
    }

    /// The counters. Each is exact; they are not read at the same moment.
    #[must_use]
    pub fn snapshot(&self) -> ReclaimStats {
        ReclaimStats {
            quiescent_generation: self.gate.quiescent_generation(),
            ..self.counters.snapshot()
        }
    }

    /// The counters of free lists.
    #[must_use]
    pub fn free_pages(&self) -> FreePagesStats {
        FreePagesStats {
            resident_bytes: self.free_bytes(free::BLOCKS, STATUS_TIME),
            ..self.free_counters.snapshot()
        }
    }

    /// What could be taken that is free by the guest's free lists: an estimate of some milliseconds, refreshed twice a second.
    /// With `pieces` what is smaller than a block counts, too. 0 if the decision about `sample` does not depend on it.
    pub(super) fn free_now(&self, sample: &Sample, pieces: bool) -> u64 {
        if self.tuning.mode == Mode::Off || (self.tuning.mode != Mode::Eager && sample.is_calm()) {
            return 0;
        }
        let pieces = pieces && self.pages.unit() < BLOCK_SIZE;
        let order = if pieces { free::PIECES } else { free::BLOCKS };
        let (now, last) = (Instant::now(), self.round().free.estimate);
        let fresh = last.filter(|(at, of, _)| *of == order && now < *at + ESTIMATE_AGE);
        if let Some((_, _, bytes)) = fresh {
            return bytes;
        }
        let bytes = self.free_bytes(order, ESTIMATE_TIME);
        self.round().free.estimate = Some((now, order, bytes));
        bytes
    }

    /// What has been free by the guest's free lists for `age` at least, and the host holds; it is `now`.
    pub(super) fn old_free(&self, now: Duration, age: Duration) -> u64 {
        let Some(source) = self.free.as_deref() else {
            return 0;
        };
        let mut ages = std::mem::take(&mut self.round().free.ages);
        let bytes = ages.look((now, age), source, &*self.pages, ESTIMATE_TIME);
        self.round().free.ages = ages;
        bytes
    }

    /// Takes what [`Reclaimer::old_free`] has found, as far as `order` goes, but not for longer than `until`.
    pub(super) fn discard_old_free(&self, order: Order, until: Until<'_>) -> Outcome {
        let outcome = self.work(order, Release::Discard, until, Job::old_free_blocks);
        self.count_discard(&outcome);
        outcome
    }

    fn free_bytes(&self, order: u32, time: Duration) -> u64 {
        let source = self.free.as_deref();
        source.map_or(0, |source| {
            free::held_bytes(source, &*self.pages, order, time)
        })
    }

    pub(super) fn held(&self) -> Held<'_> {
        Held {
            lazy: &self.lazy,
            pages: &*self.pages,
        }
    }

    pub(super) fn slicer(&self) -> Slicer<'_> {
        Slicer {
            lazy: &self.lazy,
            gate: &self.gate,
            pages: &*self.pages,
            cost: &self.cost,
        }
    }

    pub(super) fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EntryHook for Reclaimer {
    /// Does the offered work if there is some and every vCPU is out. Two relaxed loads if there is none.
    #[inline]
    fn before_entry(&self) {
        if self.offer.is_open() {
            self.offer
                .run(|request| self.slicer().held_if_empty(request));
        }
        if self.free_offer.is_open() {
            self.free_offer.run(|offer| {
                offer
                    .pass
                    .take_if_empty(&self.gate, &self.tuning, &mut offer.cost)
            });
        }
    }
}
