//! The tracker, shared by the threads of a machine.

use std::sync::Arc;

use super::Sweep;
use super::tracker::{Fate, Freed, Reused, Step, Surveyed, Tracker};
use crate::fault::fault_point;
use crate::generation::VmGeneration;
use crate::range::GpaRange;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};

/// Maximum number of ranges that reuses may want from one chunk. Above that they get the whole chunk, so that a
/// hostile guest cannot make the list long.
const MAX_WANTED: usize = 64;

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
    /// `freed = lazy + unmapped + reclaiming + discarded + reused + given_up + forgotten`.
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
        /// Ranges that the tracker holds.
        ranges: Gauge,
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
        /// Frees that were not tracked because the tracker was full. That memory stays in use by the guest.
        untracked_bytes_total: Counter of Bytes,
        /// The part of the untracked memory that had been tracked before.
        given_up_bytes_total: Counter of Bytes,
        /// Discarded memory that the tracker has forgotten because it was full.
        forgotten_bytes_total: Counter of Bytes,
        /// Unmapped memory that became lazy again because the tracker was full.
        coalesced_bytes_total: Counter of Bytes,
        /// Reuses that waited for a chunk that was being invalidated or discarded.
        reuse_waits_total: Counter,
    }
}

impl LazyStats {
    fn count_reused(&mut self, reused: Reused) {
        self.reused_bytes_total += reused.bytes();
        self.reused_unmapped_bytes_total += reused.unmapped;
        self.reused_discarded_bytes_total += reused.discarded;
    }
}

/// A chunk that is being invalidated or discarded, and the parts of it that reuses wait for.
struct InFlight {
    id: u64,
    range: GpaRange,
    wanted: Vec<GpaRange>,
}

struct State {
    tracker: Tracker,
    in_flight: Vec<InFlight>,
    next_id: u64,
    /// Bytes whose free was refused because the tracker was full.
    refused: u64,
    /// The counters that are not in `tracker` or `refused`.
    stats: LazyStats,
}

/// Lazily freed memory, shared by vCPUs, devices and reclaim.
///
/// One lock, which is never held across a system call on memory. A reuse waits only for the chunks in flight that it
/// meets. What it wants of a chunk becomes in use in the step that ends the chunk, so that no later chunk can take it
/// first.
pub struct LazyMemory {
    state: Mutex<State>,
    /// Signalled when a chunk ends that a reuse or a reset waits for.
    finished: Condvar,
    generation: Arc<VmGeneration>,
}

impl LazyMemory {
    /// A tracker of at most `max_ranges` ranges, with nothing lazily free yet.
    #[must_use]
    pub fn new(max_ranges: usize, generation: Arc<VmGeneration>) -> Self {
        let state = State {
            tracker: Tracker::new(max_ranges),
            in_flight: Vec::new(),
            next_id: 0,
            refused: 0,
            stats: LazyStats::default(),
        };
        Self {
            state: Mutex::new(state),
            finished: Condvar::new(),
            generation,
        }
    }

    /// The guest frees `ranges`, which it promises not to touch before it reuses them. They get one generation. What
    /// is not in use stays as it is, and what does not fit in the tracker stays in use.
    pub fn free(&self, ranges: &[GpaRange]) -> Freed {
        let mut state = self.lock();
        let generation = self.generation.advance();
        let mut all = Freed::default();
        for &range in ranges {
            let freed = state.tracker.free(range, generation);
            all.lazy += freed.lazy;
            all.refused += freed.refused;
        }
        state.stats.freed_bytes_total += all.lazy;
        state.refused += all.refused;
        all
    }

    /// Adds up the states in `range`, from its start on. Looks at a limited number of ranges and says where it stopped.
    #[must_use]
    pub fn survey(&self, range: GpaRange) -> Surveyed {
        self.lock().tracker.survey(range)
    }

    /// The guest takes `ranges` back. They are in use when this returns: what the guest writes from then on is kept.
    pub fn reuse(&self, ranges: &[GpaRange]) -> ReuseOutcome {
        let mut state = self.lock();
        let mut awaited = Vec::new();
        for &range in ranges {
            let reused = state.tracker.reuse(range);
            state.stats.count_reused(reused);
            if reused.busy && !fault_point!("a reuse does not wait for the chunk") {
                awaited.extend(state.want(range));
            }
        }
        let waited = !awaited.is_empty();
        if waited {
            state.stats.reuse_waits_total += 1;
            state = self.wait_for(state, &awaited);
        }
        ReuseOutcome {
            last: state.tracker.totals().ranges == 0,
            waited,
        }
    }

    /// Makes everything in use, as the guest or its driver was reset. Waits for the chunks in flight.
    pub fn reset(&self) {
        let mut state = self.lock();
        let reused = state.tracker.clear();
        state.stats.count_reused(reused);
        let mut awaited = Vec::new();
        for chunk in &mut state.in_flight {
            chunk.wanted = vec![chunk.range];
            awaited.push(chunk.id);
        }
        drop(self.wait_for(state, &awaited));
    }

    /// Takes the next chunk of at most `limit` bytes for `sweep`; `None` at its end.
    pub fn take_chunk(&self, sweep: &mut Sweep, limit: u64) -> Option<Chunk<'_>> {
        loop {
            // The lock is free between two steps, so that reuses need not wait for all of them.
            let mut state = self.lock();
            let candidate = match state.tracker.find(sweep, limit) {
                Step::Found(candidate) => candidate,
                Step::More => continue,
                Step::Done => return None,
            };
            if fault_point!("the lock is released before the claim") {
                drop(state);
                state = self.lock();
            }
            let range = state.tracker.claim(candidate);
            let id = state.next_id;
            state.next_id += 1;
            state.in_flight.push(InFlight {
                id,
                range,
                wanted: Vec::new(),
            });
            return Some(Chunk {
                memory: self,
                id,
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
            match state.tracker.find(&mut ahead, limit) {
                Step::Found(_) => return true,
                Step::More => *sweep = ahead,
                Step::Done => return false,
            }
        }
    }

    /// Starts a generation for what was just invalidated, and returns it.
    pub fn begin_generation(&self) -> u64 {
        self.generation.advance()
    }

    /// Bytes by state, and counters, all as of one moment.
    #[must_use]
    pub fn snapshot(&self) -> LazyStats {
        let state = self.lock();
        let (totals, squeezed) = (state.tracker.totals(), state.tracker.squeezed());
        LazyStats {
            generation: self.generation.current(),
            lazy_bytes: totals.lazy,
            unmapped_bytes: totals.unmapped,
            reclaiming_bytes: totals.reclaiming,
            discarded_bytes: totals.discarded,
            ranges: totals.ranges as u64,
            untracked_bytes_total: state.refused + squeezed.given_up,
            given_up_bytes_total: squeezed.given_up,
            forgotten_bytes_total: squeezed.forgotten,
            coalesced_bytes_total: squeezed.coalesced,
            ..state.stats
        }
    }

    /// The machine's generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.current()
    }

    fn finish(&self, id: u64, fate: Fate) {
        let mut state = self.lock();
        let Some(index) = state.in_flight.iter().position(|chunk| chunk.id == id) else {
            return;
        };
        let InFlight { range, wanted, .. } = state.in_flight.swap_remove(index);
        state.tracker.finish(range, fate);
        *match fate {
            Fate::Kept => &mut state.stats.kept_bytes_total,
            Fate::Unmapped(_) => &mut state.stats.unmapped_bytes_total,
            Fate::Discarded => &mut state.stats.reclaimed_bytes_total,
        } += range.len();
        for &range in &wanted {
            let reused = state.tracker.reuse(range);
            state.stats.count_reused(reused);
        }
        drop(state);
        if !wanted.is_empty() {
            self.finished.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wait_for<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ids: &[u64],
    ) -> MutexGuard<'a, State> {
        while state.in_flight.iter().any(|chunk| ids.contains(&chunk.id)) {
            state = wait(&self.finished, state);
        }
        state
    }
}

impl State {
    /// Notes that a reuse wants `range` from the chunks that it meets, and returns their ids.
    fn want(&mut self, range: GpaRange) -> Vec<u64> {
        let mut ids = Vec::new();
        for chunk in &mut self.in_flight {
            let Some(part) = chunk.range.intersection(range) else {
                continue;
            };
            chunk.wanted.push(part);
            if chunk.wanted.len() > MAX_WANTED {
                chunk.wanted = vec![chunk.range];
            }
            ids.push(chunk.id);
        }
        ids
    }
}

/// A chunk that its holder may invalidate or discard. A reuse of it returns only after this is dropped. If it is
/// dropped as it is, its range stays what it was.
#[must_use = "a reuse waits for as long as the chunk is held"]
pub struct Chunk<'a> {
    memory: &'a LazyMemory,
    id: u64,
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
        self.memory.finish(self.id, self.fate);
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, ScopedJoinHandle};
    use std::time::Duration;

    use super::*;
    use crate::lazy::Pieces;
    use crate::range::PAGE_SIZE;

    const ALL: u64 = u64::MAX;

    fn pages(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    fn memory() -> LazyMemory {
        LazyMemory::new(100, Arc::new(VmGeneration::default()))
    }

    /// Returns once a thread waits for the chunk in flight.
    fn until_it_waits<T>(memory: &LazyMemory, thread: &ScopedJoinHandle<'_, T>) {
        while memory.lock().in_flight[0].wanted.is_empty() {
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
            ranges: 5,
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
    fn what_a_full_tracker_costs_is_counted() {
        let threes = |from: u64, count: u64| {
            (from..from + count)
                .map(|n| pages(4 * n, 4 * n + 3))
                .collect::<Vec<_>>()
        };
        let memory = LazyMemory::new(8, Arc::new(VmGeneration::default()));
        let freed = memory.free(&threes(0, 9));
        assert_eq!(freed.lazy, 7 * 3 * PAGE_SIZE);
        assert_eq!(freed.refused, 2 * 3 * PAGE_SIZE);
        // Each leaves two ranges; there is room for one more range, and so for one of them.
        memory.reuse(&[pages(1, 2), pages(5, 6)]);
        let stats = memory.snapshot();
        assert_eq!(stats.given_up_bytes_total, PAGE_SIZE);
        assert_eq!(stats.untracked_bytes_total, 7 * PAGE_SIZE);

        let memory = LazyMemory::new(8, Arc::new(VmGeneration::default()));
        memory.free(&threes(0, 7));
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let mut take = || memory.take_chunk(&mut sweep, 3 * PAGE_SIZE).unwrap();
        (0..2).for_each(|_| take().discarded());
        memory.free(&[pages(100, 101)]);
        assert_eq!(memory.snapshot().forgotten_bytes_total, 6 * PAGE_SIZE);

        let memory = LazyMemory::new(8, Arc::new(VmGeneration::default()));
        memory.free(&[pages(0, 6)]);
        let mut sweep = Sweep::new(Pieces::Any, ALL);
        let mut take = || memory.take_chunk(&mut sweep, PAGE_SIZE).unwrap();
        for _ in 0..3 {
            take().unmapped(2);
            drop(take());
        }
        memory.free(&[pages(100, 101), pages(110, 111)]);
        assert_eq!(memory.snapshot().coalesced_bytes_total, 3 * PAGE_SIZE);
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
            until_it_waits(&memory, &reuse);
            assert!(memory.lock().in_flight[0].wanted.len() <= MAX_WANTED);
            chunk.discarded();
            reuse.join().unwrap();
        });
        assert_eq!(memory.snapshot().ranges, 0);
    }
}
