//! The tracker, shared by the threads of a machine.

use std::sync::Arc;

use super::flights::Flights;
use super::map::Counts;
use super::tracker::{Fate, Step, Totals, Tracker, parts};
use super::{Pieces, Sweep};
use crate::fault::fault_point;
use crate::generation::VmGeneration;
use crate::range::{GpaRange, PAGE_SIZE};
use crate::sync::{Condvar, Mutex, MutexGuard, give_way, lock, wait};

/// Maximum bytes that one survey looks at.
const SURVEY_LIMIT: u64 = 64 << 30;

/// The result of a reuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReuseOutcome {
    /// No range is lazily free any more, as `ENOMEM` of `MADV_REUSE` says.
    pub last: bool,
    /// It had to wait for a chunk that was being invalidated or discarded.
    pub waited: bool,
}

crate::metrics! {
    /// Bytes by state, and counters since the machine started. At every moment
    /// `freed = lazy + unmapped + reclaiming + discarded + reused`.
    pub struct LazyStats {
        /// The machine's generation.
        generation: Gauge,
        /// Lazily free memory that still has the guest's pages.
        lazy_bytes: Gauge of Bytes,
        /// Lazily free memory that the host may take at any time.
        unmapped_bytes: Gauge of Bytes,
        /// Memory that is being invalidated or discarded.
        reclaiming_bytes: Gauge of Bytes,
        /// Lazily free memory whose pages are returned to the host.
        discarded_bytes: Gauge of Bytes,
        /// Ranges: neighbouring pages in one state. A range ends where 128 MiB of guest memory do.
        ranges: Gauge,
        /// The monitor's memory that the tracker takes.
        tracker_bytes: Gauge of Bytes,
        /// Memory that the guest has freed lazily.
        freed_bytes_total: Counter of Bytes,
        /// Memory that went from lazy to unmapped.
        unmapped_bytes_total: Counter of Bytes,
        /// Memory that reclaim has returned to the host.
        reclaimed_bytes_total: Counter of Bytes,
        /// Memory that stayed what it was because the host would not take it.
        kept_bytes_total: Counter of Bytes,
        /// Memory that the guest has taken back, by reuse or by a reset.
        reused_bytes_total: Counter of Bytes,
        /// The part of the reused memory that had been unmapped.
        reused_unmapped_bytes_total: Counter of Bytes,
        /// The part of the reused memory that had been discarded.
        reused_discarded_bytes_total: Counter of Bytes,
        /// Reuses that waited for a chunk that was being invalidated or discarded.
        reuse_waits_total: Counter,
    }
}

impl LazyStats {
    fn count_reused(&mut self, pages: Counts) {
        let [_, lazy, unmapped, discarded] = pages.map(|pages| pages * PAGE_SIZE);
        self.reused_bytes_total += lazy + unmapped + discarded;
        self.reused_unmapped_bytes_total += unmapped;
        self.reused_discarded_bytes_total += discarded;
    }
}

/// The states in a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Surveyed {
    /// Bytes by state.
    pub totals: Totals,
    /// First address that was not looked at.
    pub end: u64,
}

struct State {
    tracker: Tracker,
    flights: Flights,
    /// The counters. Its gauges are not used.
    stats: LazyStats,
    /// Number of times that a long operation has offered the lock to others.
    #[cfg(test)]
    offers: u64,
}

/// Lazily freed memory, shared by vCPUs, devices and reclaim.
///
/// One lock, which is never held across a system call on memory. An operation on many ranges, or on a large one, is done
/// in steps of at most one range and one region of the tracker. Between two steps, a thread that waits for the lock gets
/// it: so no guest can keep the others away.
///
/// A reuse waits only for the chunks in flight that it meets. What it wants of a chunk becomes in use in the step that
/// ends the chunk, so that no later chunk can take it first.
pub struct LazyMemory {
    state: Mutex<State>,
    /// Signalled when a chunk ends that a reuse or a reset waits for.
    finished: Condvar,
    generation: Arc<VmGeneration>,
}

impl LazyMemory {
    /// A tracker with nothing lazily free yet.
    #[must_use]
    pub fn new(generation: Arc<VmGeneration>) -> Self {
        Self::with(Tracker::default(), generation)
    }

    /// A tracker for memory in which the host uses huge pages: a guest that touches one page of a discarded block gets
    /// the other ones back, too. So a reuse of a part of such a block makes the rest lazy again.
    #[must_use]
    pub fn with_huge_pages(generation: Arc<VmGeneration>) -> Self {
        Self::with(Tracker::new(true), generation)
    }

    fn with(tracker: Tracker, generation: Arc<VmGeneration>) -> Self {
        let state = State {
            tracker,
            flights: Flights::default(),
            stats: LazyStats::default(),
            #[cfg(test)]
            offers: 0,
        };
        Self {
            state: Mutex::new(state),
            finished: Condvar::new(),
            generation,
        }
    }

    /// The guest frees `ranges`, which it promises not to touch before it reuses them. They get one generation. What
    /// is not in use stays as it is. Returns the number of bytes that were in use.
    pub fn free(&self, ranges: &[GpaRange]) -> u64 {
        let mut state = self.lock();
        let generation = self.generation.advance();
        let mut freed = 0;
        for (step, part) in steps(ranges) {
            state = self.next_step(state, step);
            let bytes = state.tracker.free(part, generation);
            state.stats.freed_bytes_total += bytes;
            freed += bytes;
        }
        freed
    }

    /// Adds up the states in `range`, from its start on. Looks at a limited part of it and says where it stopped.
    #[must_use]
    pub fn survey(&self, range: GpaRange) -> Surveyed {
        let end = range.end().min(range.start().saturating_add(SURVEY_LIMIT));
        let (mut pages, mut flights) = (Counts::default(), Counts::default());
        let mut state = self.lock();
        for (step, part) in steps(GpaRange::new(range.start(), end).as_slice()) {
            state = self.next_step(state, step);
            add(&mut pages, state.tracker.survey(part));
            add(&mut flights, state.flights.survey(part));
        }
        Surveyed {
            totals: Totals::new(pages, flights),
            end,
        }
    }

    /// The guest takes `ranges` back. They are in use when this returns: what the guest writes from then on is kept.
    pub fn reuse(&self, ranges: &[GpaRange]) -> ReuseOutcome {
        let mut reuse = self.begin_reuse();
        let mut state = self.lock();
        for (step, part) in steps(ranges) {
            state = self.next_step(state, step);
            reuse.take(&mut state, part);
        }
        let waited = !reuse.awaited.is_empty();
        if waited {
            state.stats.reuse_waits_total += 1;
            state = self.wait_for(state, &reuse.awaited);
        }
        ReuseOutcome {
            last: state.totals().tracked() == 0,
            waited,
        }
    }

    /// Makes everything in use that is not when this begins, as the guest or its driver was reset. Waits for the chunks in
    /// flight.
    pub fn reset(&self) {
        let mut reuse = self.begin_reuse();
        let mut state = self.lock();
        let mut at = 0;
        while let Some(part) = state.tracker.next_region(at) {
            reuse.take(&mut state, part);
            at = part.end();
            state = self.next_step(state, 1);
        }
        drop(self.wait_for(state, &reuse.awaited));
    }

    /// Takes the next chunk of at most `limit` bytes for `sweep`; `None` at its end.
    pub fn take_chunk(&self, sweep: &mut Sweep, limit: u64) -> Option<Chunk<'_>> {
        loop {
            // The lock is free between two steps, so that reuses need not wait for all of them.
            let mut state = self.lock();
            let range = match state.find(sweep, limit) {
                Step::Found(range) => range,
                Step::More => continue,
                Step::Done => return None,
            };
            if fault_point!("the lock is released before the claim") {
                drop(state);
                state = self.lock();
            }
            state.flights.add(range, sweep.from);
            return Some(Chunk {
                memory: self,
                range,
                fate: Fate::Kept,
            });
        }
    }

    /// Returns true if [`LazyMemory::take_chunk`] would find something, and moves the sweep up to it.
    pub fn peek(&self, sweep: &mut Sweep, limit: u64) -> bool {
        loop {
            let state = self.lock();
            let mut ahead = sweep.clone();
            match state.find(&mut ahead, limit) {
                Step::Found(_) => return true,
                Step::More => *sweep = ahead,
                Step::Done => return false,
            }
        }
    }

    /// What [`LazyMemory::take_chunk`] would take. Moves the sweep behind it.
    pub fn next_range(&self, sweep: &mut Sweep, limit: u64) -> Option<GpaRange> {
        loop {
            match self.lock().find(sweep, limit) {
                Step::Found(range) => return Some(range),
                Step::More => {}
                Step::Done => return None,
            }
        }
    }

    /// Replaces `found` by what is lazy, unmapped or discarded in `block`, which lies in one block, in ascending order. What is in a
    /// chunk is left out. That is one step: it takes the lock once.
    pub fn ranges_in(&self, block: GpaRange, found: &mut Vec<GpaRange>) {
        found.clear();
        let sweeps = [
            Sweep::new(Pieces::Any, u64::MAX),
            Sweep::unmapped(Pieces::Any, u64::MAX),
            Sweep::discarded(),
        ];
        let state = self.lock();
        for sweep in sweeps {
            let mut sweep = sweep.within(block);
            while let Step::Found(range) = state.find(&mut sweep, block.len()) {
                found.push(range);
            }
        }
        drop(state);
        found.sort_unstable_by_key(|range| range.start());
    }

    /// Makes what is discarded in `range` lazy, as the host was found to hold pages for it again. Returns the number of
    /// bytes.
    pub fn refilled(&self, range: GpaRange) -> u64 {
        let generation = self.generation();
        let mut state = self.lock();
        let mut bytes = 0;
        for (step, part) in steps(&[range]) {
            state = self.next_step(state, step);
            bytes += state.tracker.refilled(part, generation);
        }
        bytes
    }

    /// Starts a generation for what was just invalidated, and returns it.
    pub fn begin_generation(&self) -> u64 {
        self.generation.advance()
    }

    /// Bytes by state, and counters, all as of one moment.
    #[must_use]
    pub fn snapshot(&self) -> LazyStats {
        let state = self.lock();
        let totals = state.totals();
        LazyStats {
            generation: self.generation.current(),
            lazy_bytes: totals.lazy,
            unmapped_bytes: totals.unmapped,
            reclaiming_bytes: totals.reclaiming,
            discarded_bytes: totals.discarded,
            ranges: state.tracker.ranges(),
            tracker_bytes: state.tracker.bytes(),
            ..state.stats
        }
    }

    /// The machine's generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.current()
    }

    fn finish(&self, chunk: GpaRange, fate: Fate) {
        let mut reuse = self.begin_reuse();
        let mut state = self.lock();
        let wanted = state.flights.remove(chunk);
        state.tracker.finish(chunk, fate);
        *match fate {
            Fate::Kept => &mut state.stats.kept_bytes_total,
            Fate::Unmapped(_) => &mut state.stats.unmapped_bytes_total,
            Fate::Discarded => &mut state.stats.reclaimed_bytes_total,
        } += chunk.len();
        for &part in &wanted {
            reuse.take(&mut state, part);
        }
        drop(state);
        if !wanted.is_empty() {
            self.finished.notify_all();
        }
    }

    fn begin_reuse(&self) -> Reuse<'_> {
        Reuse {
            generation: &self.generation,
            fresh: None,
            awaited: Vec::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Lets another thread have the lock before step number `step` of an operation, unless it is the first.
    #[cfg_attr(not(test), expect(unused_mut, reason = "for the tests' count"))]
    fn next_step<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        step: usize,
    ) -> MutexGuard<'a, State> {
        if step == 0 {
            return state;
        }
        #[cfg(test)]
        {
            state.offers += 1;
        }
        give_way(&self.state, state)
    }

    fn wait_for<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ids: &[u64],
    ) -> MutexGuard<'a, State> {
        while state.flights.any(ids) {
            state = wait(&self.finished, state);
        }
        state
    }
}

impl State {
    fn totals(&self) -> Totals {
        Totals::new(self.tracker.pages(), self.flights.pages())
    }

    fn find(&self, sweep: &mut Sweep, limit: u64) -> Step {
        self.tracker.find(sweep, limit, &self.flights)
    }
}

/// A reuse under way.
struct Reuse<'a> {
    generation: &'a VmGeneration,
    /// The generation of what becomes lazy again.
    fresh: Option<u64>,
    /// The chunks that it must wait for.
    awaited: Vec<u64>,
}

impl Reuse<'_> {
    /// Makes `part`, which lies in one region, in use, and notes which chunks it must wait for.
    fn take(&mut self, state: &mut State, part: GpaRange) {
        let mut rest = Some(part);
        while let Some(free) = rest.and_then(|rest| state.flights.first_gap(rest)) {
            let mut fresh = || *self.fresh.get_or_insert_with(|| self.generation.advance());
            let pages = state.tracker.reuse(free, &mut fresh);
            state.stats.count_reused(pages);
            rest = GpaRange::new(free.end(), part.end());
        }
        if !fault_point!("a reuse does not wait for the chunk") {
            state.flights.want(part, &mut self.awaited);
        }
    }
}

/// The steps of an operation on `ranges`, numbered.
fn steps(ranges: &[GpaRange]) -> impl Iterator<Item = (usize, GpaRange)> {
    ranges.iter().copied().flat_map(parts).enumerate()
}

fn add(counts: &mut Counts, more: Counts) {
    counts
        .iter_mut()
        .zip(more)
        .for_each(|(count, more)| *count += more);
}

/// A chunk that its holder may invalidate or discard. A reuse of it returns only after this is dropped. If it is
/// dropped as it is, its range stays what it was.
#[must_use = "a reuse waits for as long as the chunk is held"]
pub struct Chunk<'a> {
    memory: &'a LazyMemory,
    range: GpaRange,
    fate: Fate,
}

impl Chunk<'_> {
    /// Its addresses in the guest.
    #[must_use]
    pub const fn range(&self) -> GpaRange {
        self.range
    }

    /// The range is unmapped: the guest's translations are gone and the host may take its pages. `generation` began
    /// after that.
    pub fn unmapped(mut self, generation: u64) {
        self.fate = Fate::Unmapped(generation);
    }

    /// The range is discarded: its pages are returned to the host.
    pub fn discarded(mut self) {
        self.fate = Fate::Discarded;
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        self.memory.finish(self.range, self.fate);
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, ScopedJoinHandle};
    use std::time::Duration;

    use super::*;
    use crate::lazy::flights::MAX_WANTED;
    use crate::range::BLOCK_SIZE;

    const ALL: u64 = u64::MAX;

    fn pages(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    fn memory() -> LazyMemory {
        LazyMemory::new(Arc::new(VmGeneration::default()))
    }

    /// Returns once a thread waits for the chunk in flight.
    fn until_it_waits<T>(memory: &LazyMemory, thread: &ScopedJoinHandle<'_, T>) {
        while memory.lock().flights.wanted_of_first() == 0 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(10));
        assert!(!thread.is_finished());
    }

    #[test]
    fn a_batch_is_one_generation_and_the_last_reuse_says_so() {
        let memory = memory();
        memory.free(&[pages(0, 2), pages(4, 6)]);
        memory.free(&[pages(8, 9)]);
        let stats = memory.snapshot();
        assert_eq!((stats.generation, stats.ranges), (2, 3));
        assert_eq!(stats.lazy_bytes, 5 * PAGE_SIZE);
        assert!(!memory.reuse(&[pages(0, 6)]).last);
        assert!(memory.reuse(&[pages(0, 9)]).last);
        let stats = memory.snapshot();
        assert_eq!((stats.ranges, stats.reused_bytes_total), (0, 5 * PAGE_SIZE));
    }

    #[test]
    fn what_the_host_has_refilled_is_lazy_and_nothing_else_is() {
        let memory = memory();
        memory.free(&[pages(0, 10), pages(20, 30)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        memory.take_chunk(&mut sweep, ALL).unwrap().discarded();
        memory.reuse(&[pages(4, 6)]);
        let mut sweep = Sweep::discarded();
        let mut next = || memory.next_range(&mut sweep, 3 * PAGE_SIZE);
        let found = [next(), next(), next(), next(), next()];
        let expected =
            [(0, 3), (3, 4), (6, 9), (9, 10)].map(|(start, end)| Some(pages(start, end)));
        assert_eq!((&found[..4], found[4]), (&expected[..], None));
        assert_eq!(memory.refilled(pages(3, 25)), 5 * PAGE_SIZE);
        let stats = memory.snapshot();
        let left = (stats.lazy_bytes, stats.discarded_bytes);
        assert_eq!(left, (15 * PAGE_SIZE, 3 * PAGE_SIZE));
        let all = stats.lazy_bytes + stats.discarded_bytes + stats.reused_bytes_total;
        assert_eq!(stats.freed_bytes_total, all);
        assert_eq!(memory.survey(pages(4, 6)).totals.tracked(), 0);
    }

    #[test]
    fn the_ranges_of_a_block_are_those_of_all_states_in_order() {
        let memory = memory();
        memory.free(&[pages(500, 530), pages(540, 560), pages(1000, 1030)]);
        let take = |sweep: &mut Sweep| memory.take_chunk(sweep, 5 * PAGE_SIZE).unwrap();
        let mut sweep = Sweep::new(Pieces::Any, ALL).within(pages(520, 1024));
        take(&mut sweep).discarded();
        let in_flight = take(&mut sweep);
        let generation = memory.begin_generation();
        take(&mut sweep).unmapped(generation);
        let mut found = vec![pages(0, 1)];
        let block = pages(512, 1024);
        memory.ranges_in(block, &mut found);
        let expected = [(512, 520), (520, 525), (540, 545), (545, 560), (1000, 1024)];
        assert_eq!(found, expected.map(|(start, end)| pages(start, end)));
        drop(in_flight);
        memory.ranges_in(block, &mut found);
        assert_eq!(found.get(2), Some(&pages(525, 530)));
    }

    #[test]
    fn a_snapshot_accounts_for_every_byte() {
        let memory = memory();
        memory.free(&[pages(0, 10), pages(20, 30)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let take = |sweep: &mut Sweep, pages| memory.take_chunk(sweep, pages * PAGE_SIZE).unwrap();
        let generation = memory.begin_generation();
        assert_eq!((generation, memory.generation()), (2, 2));
        take(&mut sweep, 4).unmapped(generation);
        take(&mut sweep, 3).discarded();
        let kept = take(&mut sweep, 2);
        let half_way = LazyStats {
            generation,
            ranges: 4,
            tracker_bytes: memory.lock().tracker.bytes(),
            lazy_bytes: 11 * PAGE_SIZE,
            unmapped_bytes: 4 * PAGE_SIZE,
            reclaiming_bytes: 2 * PAGE_SIZE,
            discarded_bytes: 3 * PAGE_SIZE,
            freed_bytes_total: 20 * PAGE_SIZE,
            unmapped_bytes_total: 4 * PAGE_SIZE,
            reclaimed_bytes_total: 3 * PAGE_SIZE,
            ..LazyStats::default()
        };
        assert_eq!(memory.snapshot(), half_way);
        drop(kept);
        memory.reuse(&[pages(0, 2), pages(3, 8)]);
        let at_the_end = LazyStats {
            ranges: 3,
            lazy_bytes: 12 * PAGE_SIZE,
            unmapped_bytes: PAGE_SIZE,
            reclaiming_bytes: 0,
            discarded_bytes: 0,
            kept_bytes_total: 2 * PAGE_SIZE,
            reused_bytes_total: 7 * PAGE_SIZE,
            reused_unmapped_bytes_total: 3 * PAGE_SIZE,
            reused_discarded_bytes_total: 3 * PAGE_SIZE,
            ..half_way
        };
        assert_eq!(memory.snapshot(), at_the_end);
        assert_eq!(memory.survey(pages(0, 25)).totals.lazy, 7 * PAGE_SIZE);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn other_threads_may_have_the_lock_between_two_steps() {
        let memory = memory();
        let offers = || memory.lock().offers;
        let page = pages(1, 2);
        memory.free(&[page; 1023]);
        assert_eq!(offers(), 1022);
        memory.reuse(&[page; 1023]);
        assert_eq!(offers(), 2 * 1022);
        let all = GpaRange::new(0, 1 << 40).unwrap();
        assert_eq!(memory.free(&[all]), 1 << 40);
        let regions = (1 << 40) / (128 << 20);
        assert_eq!(offers(), 2 * 1022 + regions - 1);
        memory.reset();
        assert_eq!(offers(), 2 * 1022 + 2 * regions - 1);
        assert_eq!(memory.snapshot().tracker_bytes, 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn nothing_is_refused_or_given_up() {
        let memory = memory();
        let all = GpaRange::new(0, 128 << 30).unwrap();
        memory.free(&[all]);
        let page = |index: u64| pages(1000 * index, 1000 * index + 1);
        let some: Vec<_> = (0..20_000).map(page).collect();
        memory.reuse(&some);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        while let Some(chunk) = memory.take_chunk(&mut sweep, 8 << 20) {
            chunk.discarded();
        }
        let stats = memory.snapshot();
        assert_eq!(stats.discarded_bytes, all.len() - 20_000 * PAGE_SIZE);
        assert_eq!(stats.reused_bytes_total, 20_000 * PAGE_SIZE);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn a_survey_is_of_a_limited_part() {
        let memory = memory();
        let all = GpaRange::new(PAGE_SIZE, 1 << 40).unwrap();
        memory.free(&[all]);
        let survey = memory.survey(all);
        assert_eq!(survey.totals.lazy, SURVEY_LIMIT);
        assert_eq!(survey.end, PAGE_SIZE + SURVEY_LIMIT);
    }

    #[test]
    fn a_chunk_in_flight_is_surveyed_as_such() {
        let memory = memory();
        memory.free(&[pages(0, 10)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let chunk = memory.take_chunk(&mut sweep, 4 * PAGE_SIZE).unwrap();
        let totals = memory.survey(pages(2, 5)).totals;
        assert_eq!((totals.reclaiming, totals.lazy), (2 * PAGE_SIZE, PAGE_SIZE));
        drop(chunk);
    }

    /// A reuse brings the rest of a block back with a generation of its own, one for all of its blocks.
    #[test]
    fn what_a_reuse_brings_back_is_young() {
        let memory = LazyMemory::with_huge_pages(Arc::new(VmGeneration::default()));
        let block =
            |index: u64| GpaRange::new(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE).unwrap();
        memory.free(&[block(0), block(1), block(2)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        memory.take_chunk(&mut sweep, ALL).unwrap().discarded();
        memory.reuse(&[pages(0, 1), pages(600, 700), block(2)]);
        let stats = memory.snapshot();
        assert_eq!((stats.generation, stats.discarded_bytes), (2, 0));
        assert_eq!(stats.lazy_bytes, (511 + 412) * PAGE_SIZE);
        assert!(!memory.peek(&mut Sweep::new(Pieces::Any, 1), ALL));
        assert!(memory.peek(&mut Sweep::new(Pieces::Any, 2), ALL));
        assert_eq!(stats.freed_bytes_total, 3 * BLOCK_SIZE);
    }

    /// A chunk of which a reuse wants a part is discarded first, and then the rest is back.
    #[test]
    fn a_chunk_that_was_wanted_in_part_is_lazy_again() {
        let memory = LazyMemory::with_huge_pages(Arc::new(VmGeneration::default()));
        memory.free(&[pages(0, 512)]);
        let chunk = memory.take_chunk(&mut Sweep::new(Pieces::Any, ALL), ALL);
        thread::scope(|scope| {
            let reuse = scope.spawn(|| memory.reuse(&[pages(0, 1)]));
            until_it_waits(&memory, &reuse);
            chunk.unwrap().discarded();
            assert!(reuse.join().unwrap().waited);
        });
        assert_eq!(memory.snapshot().lazy_bytes, 511 * PAGE_SIZE);
        assert_eq!(memory.snapshot().discarded_bytes, 0);
    }

    #[test]
    fn peeking_finds_what_a_sweep_would_take_and_takes_nothing() {
        let memory = memory();
        let mut all = Sweep::new(Pieces::Any, ALL);
        assert!(!memory.peek(&mut all, ALL));
        memory.free(&[pages(0, 10), pages(20, 30)]);
        assert!(memory.peek(&mut all, ALL) && !memory.peek(&mut all, 0));
        assert!(!memory.peek(&mut Sweep::new(Pieces::Blocks, ALL), ALL));
        assert_eq!(memory.snapshot().reclaiming_bytes, 0);
        let mut inside = Sweep::new(Pieces::Any, ALL).within(pages(5, 25));
        let parts = std::iter::from_fn(|| Some(memory.take_chunk(&mut inside, ALL)?.range()));
        assert_eq!(parts.collect::<Vec<_>>(), [pages(5, 10), pages(20, 25)]);
    }

    #[test]
    fn a_sweep_finds_its_own_state_alone() {
        let memory = memory();
        memory.free(&[pages(0, 6)]);
        let generation = memory.begin_generation();
        let mut lazy = Sweep::new(Pieces::Any, ALL);
        let mut take = || memory.take_chunk(&mut lazy, 2 * PAGE_SIZE).unwrap();
        take().unmapped(generation);
        take().discarded();
        let found = |mut sweep| memory.next_range(&mut sweep, ALL);
        let unmapped = |newest| found(Sweep::unmapped(Pieces::Any, newest));
        assert_eq!(unmapped(generation), Some(pages(0, 2)));
        assert_eq!(unmapped(generation - 1), None);
        assert_eq!(found(Sweep::discarded()), Some(pages(2, 4)));
        assert_eq!(found(Sweep::new(Pieces::Any, ALL)), Some(pages(4, 6)));
    }

    #[test]
    fn a_reuse_waits_for_the_chunk_in_flight_and_for_no_other() {
        let memory = memory();
        memory.free(&[pages(0, 8)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let first = memory.take_chunk(&mut sweep, 4 * PAGE_SIZE).unwrap();
        assert_eq!(memory.reuse(&[pages(5, 6)]), ReuseOutcome::default());
        thread::scope(|scope| {
            let reuse = scope.spawn(|| memory.reuse(&[pages(2, 5)]));
            until_it_waits(&memory, &reuse);
            // Another chunk that it would meet, were what it wants not in use already.
            let second = memory.take_chunk(&mut sweep, 4 * PAGE_SIZE).unwrap();
            assert_eq!(second.range(), pages(6, 8));
            first.discarded();
            assert!(reuse.join().unwrap().waited);
            second.discarded();
        });
        let stats = memory.snapshot();
        assert_eq!(
            (stats.discarded_bytes, stats.lazy_bytes),
            (4 * PAGE_SIZE, 0)
        );
        assert_eq!(stats.reuse_waits_total, 1);
    }

    #[test]
    fn a_free_of_a_chunk_in_flight_changes_nothing() {
        let memory = memory();
        memory.free(&[pages(0, 8)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let chunk = memory.take_chunk(&mut sweep, ALL).unwrap();
        memory.free(&[pages(0, 9)]);
        assert_eq!(memory.snapshot().freed_bytes_total, 9 * PAGE_SIZE);
        drop(chunk);
        assert_eq!(memory.snapshot().lazy_bytes, 9 * PAGE_SIZE);
    }

    #[test]
    fn a_reset_waits_and_leaves_everything_in_use() {
        let memory = memory();
        memory.free(&[pages(0, 8), pages(10, 12)]);
        let chunk = memory
            .take_chunk(&mut Sweep::new(Pieces::Any, ALL), 4 * PAGE_SIZE)
            .unwrap();
        thread::scope(|scope| {
            let reset = scope.spawn(|| memory.reset());
            until_it_waits(&memory, &reset);
            assert_eq!(memory.snapshot().lazy_bytes, 0);
            chunk.discarded();
            reset.join().unwrap();
        });
        let stats = memory.snapshot();
        assert_eq!(
            (stats.ranges, stats.reused_bytes_total),
            (0, 10 * PAGE_SIZE)
        );
    }

    #[test]
    fn many_wishes_for_one_chunk_become_one() {
        let memory = memory();
        memory.free(&[pages(0, 512)]);
        let chunk = memory
            .take_chunk(&mut Sweep::new(Pieces::Any, ALL), ALL)
            .unwrap();
        let wishes: Vec<_> = (0..200).map(|page| pages(2 * page, 2 * page + 1)).collect();
        thread::scope(|scope| {
            let reuse = scope.spawn(|| memory.reuse(&wishes));
            // The lock is free between two wishes.
            while memory.lock().stats.reuse_waits_total == 0 {
                thread::yield_now();
            }
            assert!(memory.lock().flights.wanted_of_first() <= MAX_WANTED);
            chunk.discarded();
            reuse.join().unwrap();
        });
        assert_eq!(memory.snapshot().ranges, 0);
    }
}
