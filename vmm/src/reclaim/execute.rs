//! Discards lazily freed memory, or leaves it to the host.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebb_core::generation::Gate;
use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::offer::OfferSlot;
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::{Release, ReleasePages};
use ebb_core::slice::{Limits, SliceOutcome, SliceRequest, Slicer};

use super::blocks::BlockPass;
use super::granules::GranulePass;
use super::{Mode, Reach, Sample, Tuning};
use crate::arena::Arenas;

/// Chunk size to begin with: 0.65 ms at 12 GiB/s, what one core frees in pages of 4 KiB.
const FIRST_CHUNK: u64 = 8 << 20;

/// How long a reclaim waits for vCPUs that are behind.
const PATIENCE: Duration = Duration::from_millis(10);

/// After so many closings in a row that vCPUs missed, one slice runs with the gate open: a pause budget
/// that is too short for this host costs interrupts, not progress.
const MAX_MISSES: u32 = 3;

/// How long a slice is offered to vCPUs that come by before others are brought out for it.
const OFFER_TIME: Duration = Duration::from_millis(1);

/// After an offer that nobody took up, twice as many slices as the last time are not offered, up to so many: a guest that
/// does not exit costs reclaim little.
const MAX_RELUCTANCE: u32 = 64;

/// What a guest loses by a pause, in lengths of it: with cold caches and translations it goes on slower than it was.
/// `bench reclaim` shows 1.7.
const LOST: u32 = 2;

/// The vCPUs are left alone for this long at most between two slices.
const MAX_REST: Duration = Duration::from_secs(1);

/// What to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// At most so many bytes.
    pub bytes: u64,
    /// How far down to go for them.
    pub reach: Reach,
    /// Ranges of later generations are left alone.
    pub newest: u64,
    /// Somebody waits: the vCPUs may lose ten times their usual share of time.
    pub urgent: bool,
}

/// What one reclaim did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes returned, or left, to the host.
    pub bytes: u64,
    /// System calls made.
    pub calls: u64,
    /// Parts that the host would not take: those chunks stay what they were.
    pub failures: u64,
    /// Time it took.
    pub duration: Duration,
}

ebb_core::metrics! {
    /// What reclaim has done since the machine started.
    pub struct ReclaimStats from struct Counters {
        /// The latest generation that every vCPU in the guest has seen. What was unmapped until then can be discarded
        /// without an interrupt.
        quiescent_generation: Gauge,
        /// System calls that discard lazy or unmapped memory.
        discard_calls_total: Counter,
        /// Discards that failed, eager ones included.
        discard_failures_total: Counter,
        /// System calls that invalidate lazy memory.
        invalidate_calls_total: Counter,
        /// Invalidations that failed.
        invalidate_failures_total: Counter,
        /// System calls that discard memory eagerly: before the free is acknowledged, for a driver without
        /// `MUST_TELL_HOST`.
        eager_calls_total: Counter,
        /// Memory discarded eagerly.
        eager_bytes_total: Counter of Bytes,
        /// Slices run with every vCPU out of the guest.
        held_slices_total: Counter,
        /// The part of these slices that vCPU threads have run before they entered the guest.
        passing_slices_total: Counter,
        /// Slices run with vCPUs in the guest, because they were not out within the pause budget.
        open_slices_total: Counter,
        /// Ranges released in slices.
        slice_ranges_total: Counter,
        /// Reclaims started by memory pressure on the host.
        pressure_events_total: Counter,
    }
}

/// What one reclaim leaves to the next.
struct Round {
    /// Bytes of the next chunk of blocks.
    chunk: u64,
    /// The machine's generation when the last reclaim began: what is not younger has survived it.
    old: u64,
    /// Slices that are not offered to vCPUs because offers were in vain: how many are left, and of how many.
    reluctance: (u32, u32),
}

/// Returns lazily freed memory to the host. One reclaim at a time: the others wait for their turn. Reuse
/// never waits for that, only for the chunk that it meets.
///
/// Whole blocks are discarded by calls of many megabytes with the vCPUs running: an interrupt for each is
/// nothing beside the work. What is smaller goes in slices, see [`ebb_core::slice`].
///
/// **Locks**, in this order: `round` (for one reclaim), the offer slot's, the gate's, the tracker's. `stop` is taken alone.
pub struct Reclaimer {
    lazy: Arc<LazyMemory>,
    pages: Arc<dyn ReleasePages>,
    gate: Arc<Gate>,
    arenas: Arenas,
    tuning: Tuning,
    round: Mutex<Round>,
    cost: AtomicU64,
    offer: OfferSlot,
    stop: Mutex<bool>,
    stopped: Condvar,
    counters: Counters,
}

impl Reclaimer {
    /// A reclaimer of what is lazy in `lazy`, whose addresses are those of `pages`, in a machine whose
    /// vCPUs enter through `gate`.
    #[must_use]
    pub fn new(
        lazy: Arc<LazyMemory>,
        pages: Arc<dyn ReleasePages>,
        gate: Arc<Gate>,
        tuning: Tuning,
    ) -> Self {
        Self {
            lazy,
            pages,
            gate,
            arenas: Arenas::from([]),
            tuning,
            round: Mutex::new(Round {
                chunk: FIRST_CHUNK,
                old: 0,
                reluctance: (0, 1),
            }),
            cost: AtomicU64::new(0),
            offer: OfferSlot::default(),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
            counters: Counters::default(),
        }
    }

    /// The same with these arenas, whose addresses are those of its pages.
    #[must_use]
    pub fn with_arenas(self, arenas: Arenas) -> Self {
        let reclaimer = Self { arenas, ..self };
        // What is freed from now on has not survived a reclaim.
        reclaimer.next_generation();
        reclaimer
    }

    /// How it goes about it.
    #[must_use]
    pub const fn tuning(&self) -> Tuning {
        self.tuning
    }

    /// Returns up to `bytes` to the host: what is unmapped already, whole blocks, then the pieces between
    /// them, and less than 2 MiB at the end from a block.
    pub fn reclaim(&self, bytes: u64) -> Outcome {
        self.discard(Order {
            bytes,
            reach: Reach::Everything,
            newest: u64::MAX,
            urgent: true,
        })
    }

    /// Discards what `order` says. What could not be discarded stays what it was and is left alone until
    /// the next call. The passes: unmapped and quiescent; unmapped, after those vCPUs that are behind were
    /// brought out; lazy blocks, then granules, that have survived a reclaim; all lazy blocks, then granules; lazy
    /// fragments; a piece of a block. Each is one sweep, and a sweep meets nothing twice, so this ends whatever
    /// fails.
    pub fn discard(&self, order: Order) -> Outcome {
        let start = Instant::now();
        let mut round = self.round();
        let now = self.lazy.generation();
        let old = std::mem::replace(&mut round.old, now);
        self.next_generation();
        let mut job = self.job(order, Release::Discard, &mut round);
        job.unmapped();
        let newest = now.min(order.newest);
        job.blocks(Sweep::new(Pieces::Blocks, old.min(newest)));
        job.arenas(old.min(order.newest));
        job.blocks(Sweep::new(Pieces::Blocks, newest));
        job.arenas(order.newest);
        if order.reach >= Reach::Fragments {
            job.slices(Sweep::new(Pieces::Fragments, newest));
        }
        // Only what is smaller than a block may come out of one.
        if order.reach >= Reach::Everything && job.left() < BLOCK_SIZE {
            job.slices(Sweep::new(Pieces::Any, newest));
        }
        let mut outcome = job.outcome;
        self.counters.discard_calls_total.add(outcome.calls);
        self.counters.discard_failures_total.add(outcome.failures);
        outcome.duration = start.elapsed();
        outcome
    }

    /// Invalidates what `order` says: it is unmapped then, the host may take it on its own schedule, and
    /// discarding it later is cheap. Does nothing where memory cannot be left to the host.
    pub fn invalidate(&self, order: Order) -> Outcome {
        let start = Instant::now();
        if !self.pages.can_mark_free() {
            return Outcome::default();
        }
        let mut round = self.round();
        let newest = self.lazy.generation().min(order.newest);
        let mut job = self.job(order, Release::MarkFree, &mut round);
        job.blocks(Sweep::new(Pieces::Blocks, newest));
        if order.reach >= Reach::Fragments {
            job.slices(Sweep::new(Pieces::Fragments, newest));
        }
        let mut outcome = job.outcome;
        self.counters.invalidate_calls_total.add(outcome.calls);
        self.counters
            .invalidate_failures_total
            .add(outcome.failures);
        outcome.duration = start.elapsed();
        outcome
    }

    /// Returns `ranges` to the host at once, for a guest that will use them without telling. They are not
    /// tracked. The caller answers for nobody using them before this returns.
    pub fn discard_now(&self, ranges: &[GpaRange]) -> Outcome {
        let start = Instant::now();
        let released = self.pages.release(ranges, Release::Discard);
        let outcome = Outcome {
            bytes: released.bytes.iter().sum(),
            calls: released.calls,
            failures: released.failures,
            duration: start.elapsed(),
        };
        self.counters.eager_bytes_total.add(outcome.bytes);
        self.counters.eager_calls_total.add(outcome.calls);
        self.counters.discard_failures_total.add(outcome.failures);
        outcome
    }

    /// Ends the reclaim that is under way, and all later ones at their first rest.
    pub fn stop(&self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stopped.notify_all();
    }

    /// What is freed in arenas from now on bears a later generation than what is free already. The tracker does that by
    /// itself, at each free; an arena's frees are seen by nobody.
    fn next_generation(&self) {
        if !self.arenas.is_empty() {
            let generation = self.lazy.begin_generation();
            self.arenas
                .iter()
                .for_each(|arena| arena.publish(generation));
        }
    }

    /// `sample` with the machine's lazy memory filled in. Arenas are counted for it, unless nothing depends on it.
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

    /// Counts a reclaim that pressure has started.
    pub(super) fn count_pressure_event(&self) {
        self.counters.pressure_events_total.increment();
    }

    /// The counters. Each is exact; they are not read at the same moment.
    #[must_use]
    pub fn snapshot(&self) -> ReclaimStats {
        ReclaimStats {
            quiescent_generation: self.gate.quiescent_generation(),
            ..self.counters.snapshot()
        }
    }

    /// For a vCPU thread on its way in: runs the slice that is on offer, if any, when every vCPU is out. One relaxed
    /// load when there is none.
    #[inline]
    pub fn help(&self) {
        if self.offer.is_open() {
            self.offer.run(&self.slicer());
        }
    }

    fn slicer(&self) -> Slicer<'_> {
        Slicer {
            lazy: &self.lazy,
            gate: &self.gate,
            pages: &*self.pages,
            cost: &self.cost,
        }
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const fn job<'a>(&'a self, order: Order, how: Release, round: &'a mut Round) -> Job<'a> {
        Job {
            reclaimer: self,
            order,
            how,
            round,
            outcome: Outcome {
                bytes: 0,
                calls: 0,
                failures: 0,
                duration: Duration::ZERO,
            },
        }
    }

    /// Lets the vCPUs run for long enough that what the slice cost them was its share; false: it is time to stop.
    fn rest(&self, slice: &SliceOutcome, urgent: bool) -> bool {
        let share = self.tuning.share * if urgent { 10 } else { 1 };
        let rest = if slice.disturbed > 0 || slice.missed {
            slice.held * (100 * LOST / share.clamp(1, 50) - 1)
        } else {
            Duration::ZERO
        };
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let running = |stop: &mut bool| !*stop;
        let waited = self
            .stopped
            .wait_timeout_while(stop, rest.min(MAX_REST), running);
        let (stop, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*stop
    }
}

/// One reclaim under way.
struct Job<'a> {
    reclaimer: &'a Reclaimer,
    order: Order,
    how: Release,
    round: &'a mut Round,
    outcome: Outcome,
}

impl Job<'_> {
    const fn left(&self) -> u64 {
        self.order.bytes.saturating_sub(self.outcome.bytes)
    }

    /// Discards what is unmapped: what every vCPU has seen first; the rest too, under hard pressure, after
    /// those that are behind were brought out once.
    fn unmapped(&mut self) {
        let (lazy, gate) = (&self.reclaimer.lazy, &self.reclaimer.gate);
        let quiescent = gate.quiescent_generation();
        self.unmapped_up_to(quiescent);
        let now = lazy.generation().min(self.order.newest);
        let worth_it = self.order.reach >= Reach::Fragments && quiescent < now;
        if worth_it
            && self.left() > 0
            && lazy.peek(&mut Sweep::unmapped(Pieces::Any, now), self.left())
            && gate.catch_up(now, PATIENCE)
        {
            self.unmapped_up_to(now);
        }
    }

    fn unmapped_up_to(&mut self, quiescent: u64) {
        let newest = quiescent.min(self.order.newest);
        self.blocks(Sweep::unmapped(Pieces::Blocks, newest));
        self.slices(Sweep::unmapped(Pieces::Fragments, newest));
    }

    /// One sweep over whole blocks, with the vCPUs running.
    fn blocks(&mut self, sweep: Sweep) {
        if self.left() < BLOCK_SIZE {
            return;
        }
        let pass = BlockPass::new(
            &self.reclaimer.lazy,
            &*self.reclaimer.pages,
            self.how,
            sweep,
            self.left(),
        );
        self.round.chunk = pass.run(self.round.chunk);
        let done = pass.outcome();
        self.outcome.bytes += done.bytes;
        self.outcome.calls += done.calls;
        self.outcome.failures += done.failures;
    }

    /// One sweep over the granules that were freed at `newest` or before, with the vCPUs running.
    fn arenas(&mut self, newest: u64) {
        for arena in self.reclaimer.arenas.iter() {
            let pass = GranulePass {
                arena,
                pages: &*self.reclaimer.pages,
                newest,
                bytes: self.left(),
            };
            let done = pass.run(&mut self.round.chunk);
            self.outcome.bytes += done.bytes;
            self.outcome.calls += done.calls;
            self.outcome.failures += done.failures;
        }
    }

    /// One sweep over what is smaller, in slices with the vCPUs out.
    fn slices(&mut self, sweep: Sweep) {
        let reclaimer = self.reclaimer;
        let slicer = reclaimer.slicer();
        let mut request = SliceRequest {
            sweep,
            how: self.how,
            limits: Limits {
                ranges: reclaimer.tuning.slice,
                bytes: self.left(),
                pause: reclaimer.tuning.pause,
            },
        };
        let mut misses = 0;
        while self.left() > 0 {
            request.limits.bytes = self.left();
            let slice = if misses < MAX_MISSES {
                self.offered(&mut request)
                    .unwrap_or_else(|| slicer.held(&mut request))
            } else {
                slicer.open(&mut request)
            };
            let kind = if misses < MAX_MISSES {
                &reclaimer.counters.held_slices_total
            } else {
                &reclaimer.counters.open_slices_total
            };
            kind.add(u64::from(slice.calls > 0));
            reclaimer.counters.slice_ranges_total.add(slice.ranges);
            self.outcome.bytes += slice.bytes;
            self.outcome.calls += slice.calls;
            self.outcome.failures += slice.failures;
            misses = if slice.missed { misses + 1 } else { 0 };
            let more = !slice.done && self.left() > 0;
            if !more
                || !reclaimer.lazy.peek(&mut request.sweep, self.left())
                || !reclaimer.rest(&slice, self.order.urgent)
            {
                return;
            }
        }
    }
}

impl Job<'_> {
    /// Offers a slice to the vCPUs that come by; `None` when nobody took it up, or it was not worth a try.
    fn offered(&mut self, request: &mut SliceRequest) -> Option<SliceOutcome> {
        let reclaimer = self.reclaimer;
        let (left, of) = &mut self.round.reluctance;
        if *left > 0 {
            *left -= 1;
            return None;
        }
        // With every vCPU out there is nobody to ask, nor to interrupt.
        if reclaimer.gate.is_empty()
            || !reclaimer
                .lazy
                .peek(&mut request.sweep, request.limits.bytes)
        {
            return None;
        }
        reclaimer.offer.post(request.clone());
        reclaimer.offer.wait(OFFER_TIME);
        let offered = reclaimer.offer.take_back()?;
        *request = offered.request;
        let Some(slice) = offered.outcome else {
            (*left, *of) = (*of, (*of * 2).min(MAX_RELUCTANCE));
            return None;
        };
        *of = 1;
        reclaimer.counters.passing_slices_total.increment();
        Some(slice)
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::generation::{NoKick, VmGeneration};
    use ebb_core::range::PAGE_SIZE;
    use ebb_core::release::Released;

    use super::*;
    use crate::memory::{Backing, GuestRam};

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start, end).unwrap()
    }

    fn reclaimer(mib: u64) -> Reclaimer {
        let ram = GuestRam::allocate(Backing::default(), &[range(0, mib * MIB)]).unwrap();
        over(Arc::new(ram), 0, Tuning::default())
    }

    fn over(pages: Arc<dyn ReleasePages>, vcpus: usize, tuning: Tuning) -> Reclaimer {
        let generation = Arc::new(VmGeneration::default());
        let gate = Gate::new(vcpus, Arc::clone(&generation), Box::new(NoKick));
        let lazy = LazyMemory::new(1000, generation);
        Reclaimer::new(Arc::new(lazy), pages, Arc::new(gate), tuning)
    }

    const fn order(bytes: u64, reach: Reach) -> Order {
        Order {
            bytes,
            reach,
            newest: u64::MAX,
            urgent: true,
        }
    }

    #[test]
    fn blocks_go_first_then_fragments_then_a_piece_of_a_block() {
        let reclaimer = reclaimer(32);
        reclaimer
            .lazy
            .free(&[range(MIB, 7 * MIB), range(9 * MIB, 10 * MIB)]);
        let reclaim = |bytes, reach| reclaimer.discard(order(bytes, reach)).bytes;
        assert_eq!(reclaim(3 * MIB, Reach::Blocks), 2 * MIB);
        assert_eq!(reclaim(9 * MIB, Reach::Blocks), 2 * MIB, "the other block");
        assert_eq!(reclaim(9 * MIB, Reach::Blocks), 0);
        assert_eq!(reclaim(MIB + PAGE_SIZE, Reach::Fragments), MIB + PAGE_SIZE);
        assert_eq!(reclaim(9 * MIB, Reach::Fragments), 2 * MIB - PAGE_SIZE);
        reclaimer.lazy.free(&[range(16 * MIB, 20 * MIB)]);
        assert_eq!(reclaim(MIB, Reach::Fragments), 0);
        assert_eq!(reclaimer.reclaim(MIB).bytes, MIB);
        assert_eq!(reclaimer.reclaim(u64::MAX).bytes, 3 * MIB);
        let stats = reclaimer.lazy.snapshot();
        assert_eq!((stats.lazy_bytes, stats.discarded_bytes), (0, 11 * MIB));
        assert_eq!(stats.reclaimed_bytes_total, 11 * MIB);
    }

    #[test]
    fn what_survived_the_last_reclaim_goes_before_what_is_new() {
        let reclaimer = reclaimer(32);
        reclaimer.lazy.free(&[range(16 * MIB, 20 * MIB)]);
        assert_eq!(reclaimer.reclaim(2 * MIB).bytes, 2 * MIB);
        reclaimer.lazy.free(&[range(0, 4 * MIB)]);
        assert_eq!(reclaimer.reclaim(2 * MIB).bytes, 2 * MIB);
        reclaimer.lazy.reuse(&[range(0, 4 * MIB)]);
        assert_eq!(
            reclaimer.lazy.snapshot().lazy_bytes,
            0,
            "the old range went first"
        );
    }

    /// Memory whose first page the host will not take, with a log of what it was asked.
    #[derive(Default)]
    struct Stubborn(Mutex<Vec<(GpaRange, Release)>>);

    impl ReleasePages for Stubborn {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            7
        }

        fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
            let bytes = ranges.iter().map(|range| {
                self.0.lock().unwrap().push((*range, how));
                if range.start() == 0 { 0 } else { range.len() }
            });
            let bytes: Vec<_> = bytes.collect();
            let failures = bytes.iter().filter(|bytes| **bytes == 0).count() as u64;
            Released {
                bytes,
                calls: 1,
                failures,
                error: None,
            }
        }
    }

    #[test]
    fn chunks_that_fail_stay_lazy_and_the_others_go() {
        let reclaimer = over(Arc::new(Stubborn::default()), 0, Tuning::default());
        reclaimer.lazy.free(&[range(0, 32 * MIB)]);
        let outcome = reclaimer.reclaim(u64::MAX);
        assert_eq!(outcome.bytes + BLOCK_SIZE, 32 * MIB);
        assert!(outcome.calls > 1, "{outcome:?}");
        let lazy = reclaimer.lazy.snapshot();
        assert_eq!((lazy.lazy_bytes, lazy.unmapped_bytes), (BLOCK_SIZE, 0));
        let invalidated = reclaimer.invalidate(order(u64::MAX, Reach::Fragments));
        assert_eq!(invalidated.bytes, 0, "its first block is refused again");
        let stats = reclaimer.snapshot();
        assert_eq!(stats.discard_failures_total, outcome.failures);
        assert_eq!(stats.invalidate_failures_total, 1);
    }

    #[test]
    fn scattered_ranges_go_in_slices_and_unmapped_ones_first() {
        let pages = Arc::new(Stubborn::default());
        let tuning = Tuning {
            slice: 20,
            ..Tuning::default()
        };
        let reclaimer = over(Arc::clone(&pages) as _, 1, tuning);
        let scattered = |index: u64| range(index * MIB, index * MIB + (64 << 10));
        let ranges: Vec<_> = (1..101).map(scattered).collect();
        reclaimer.lazy.free(&ranges);
        let limited = order(30 * (64 << 10), Reach::Fragments);
        assert_eq!(reclaimer.invalidate(limited).bytes, 30 * (64 << 10));
        assert_eq!(reclaimer.lazy.snapshot().unmapped_bytes, 30 * (64 << 10));
        assert_eq!(
            reclaimer.discard(order(u64::MAX, Reach::Blocks)).bytes,
            30 * (64 << 10)
        );
        assert_eq!(reclaimer.reclaim(u64::MAX).bytes, 70 * (64 << 10));
        let stats = reclaimer.snapshot();
        assert_eq!(
            (stats.slice_ranges_total, stats.open_slices_total),
            (130, 0)
        );
        assert!(stats.held_slices_total >= 2 + 2 + 4, "{stats:?}");
        assert_eq!(
            reclaimer.gate.stats().closings_total,
            stats.held_slices_total
        );
        assert_eq!(pages.0.lock().unwrap()[30].1, Release::Discard);
    }

    #[test]
    fn a_vcpu_that_will_not_come_out_costs_interrupts_but_not_progress() {
        let tuning = Tuning {
            pause: Duration::from_micros(50),
            ..Tuning::default()
        };
        let reclaimer = over(Arc::new(Stubborn::default()), 1, tuning);
        let ranges: Vec<_> = (1..9)
            .map(|i| range(i * MIB, i * MIB + PAGE_SIZE))
            .collect();
        reclaimer.lazy.free(&ranges);
        let inside = reclaimer.gate.enter(0);
        let outcome = reclaimer.invalidate(order(u64::MAX, Reach::Fragments));
        assert_eq!(outcome.bytes, 8 * PAGE_SIZE);
        let stats = reclaimer.snapshot();
        assert_eq!((stats.held_slices_total, stats.open_slices_total), (0, 1));
        assert_eq!(reclaimer.gate.stats().missed_total, u64::from(MAX_MISSES));
        let discard = |reach| reclaimer.discard(order(u64::MAX, reach)).bytes;
        assert_eq!(discard(Reach::Blocks), 0, "it may still have translations");
        drop(inside);
        assert_eq!(discard(Reach::Blocks), 8 * PAGE_SIZE);
    }

    #[test]
    fn stopping_ends_a_rest() {
        let reclaimer = reclaimer(4);
        let slice = SliceOutcome {
            disturbed: 1,
            held: MAX_REST,
            ..SliceOutcome::default()
        };
        std::thread::scope(|scope| {
            let rest = scope.spawn(|| reclaimer.rest(&slice, false));
            reclaimer.stop();
            assert!(!rest.join().unwrap());
        });
    }

    #[test]
    fn eager_discards_are_counted_and_not_tracked() {
        let reclaimer = reclaimer(4);
        let outcome = reclaimer.discard_now(&[range(0, MIB), range(3 * MIB, 5 * MIB)]);
        assert_eq!((outcome.bytes, outcome.failures), (MIB, 1));
        let stats = reclaimer.snapshot();
        assert_eq!(
            (stats.eager_bytes_total, stats.discard_failures_total),
            (MIB, 1)
        );
        assert_eq!(reclaimer.lazy.snapshot().ranges, 0);
    }
}
