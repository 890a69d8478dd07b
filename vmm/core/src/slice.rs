//! A slice releases many small ranges while every vCPU is out of the guest.
//!
//! Each madvise call interrupts every vCPU that runs: once for KVM's flush of the second-level table, and once for
//! the flush of the monitor's own address space, even where KVM has nothing to flush. For fragments these interrupts
//! cost more than the work. While the vCPUs are out there are none, and the next entry of each flushes once for the
//! whole slice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::generation::{Gate, Hold};
use crate::lazy::{Chunk, LazyMemory, Sweep};
use crate::range::GpaRange;
use crate::release::{Release, ReleasePages};

/// Maximum bytes of one range of a slice: 40 us at 12 GiB/s, so that a pause ends near its budget.
const MAX_PIECE: u64 = 512 << 10;

/// Maximum number of ranges in one call: a reuse may have to wait for it.
const MAX_BATCH: usize = 128;

/// Assumed cost of a range until one was measured, in nanoseconds.
const FIRST_COST: u64 = 10_000;

/// Bounds of one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of ranges.
    pub ranges: usize,
    /// Maximum number of bytes.
    pub bytes: u64,
    /// How long the gate may be closed. A system call that has begun by then is finished first.
    pub pause: Duration,
}

/// What a slice is to do.
#[derive(Clone, Debug)]
pub struct SliceRequest {
    /// Where to go on. Each slice moves it.
    pub sweep: Sweep,
    /// What to do with the ranges.
    pub how: Release,
    /// How much to do.
    pub limits: Limits,
}

/// What one slice did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SliceOutcome {
    /// Bytes released.
    pub bytes: u64,
    /// Ranges released.
    pub ranges: u64,
    /// System calls made.
    pub calls: u64,
    /// Parts that the kernel refused.
    pub failures: u64,
    /// Number of vCPUs that had to wait for it or were kicked.
    pub disturbed: u64,
    /// How long vCPUs were kept out for it.
    pub held: Duration,
    /// The sweep is at its end.
    pub done: bool,
    /// The vCPUs were not out in time: nothing has happened.
    pub missed: bool,
}

/// Runs slices.
pub struct Slicer<'a> {
    /// The tracker of the ranges.
    pub lazy: &'a LazyMemory,
    /// Where the vCPUs wait.
    pub gate: &'a Gate,
    /// The memory behind the ranges.
    pub pages: &'a dyn ReleasePages,
    /// Cost of a range in nanoseconds, from taking it to noting what became of it: a moving average over slices; 0: not known yet.
    pub cost: &'a AtomicU64,
}

impl Slicer<'_> {
    /// Closes the gate, releases the next ranges of the request's sweep, and opens the gate. The gate stays open
    /// when there is nothing to do.
    pub fn held(&self, request: &mut SliceRequest) -> SliceOutcome {
        let limits = request.limits;
        if !self
            .lazy
            .peek(&mut request.sweep, limits.bytes.min(MAX_PIECE))
        {
            return SliceOutcome {
                done: true,
                ..SliceOutcome::default()
            };
        }
        let waits = self.gate.waits();
        let hold = match self.gate.hold(limits.pause) {
            Ok(hold) => hold,
            Err(missed) => {
                return SliceOutcome {
                    missed: true,
                    held: missed.cost,
                    ..SliceOutcome::default()
                };
            }
        };
        let mut outcome = self.run(request, Some(&hold));
        outcome.disturbed = hold.kicked();
        outcome.held = hold.open();
        outcome.disturbed += self.gate.waits().saturating_sub(waits);
        outcome
    }

    /// For a vCPU thread before it enters the guest: as [`Slicer::held`] if every vCPU is out already, else `None`.
    pub fn held_if_empty(&self, request: &mut SliceRequest) -> Option<SliceOutcome> {
        let waits = self.gate.waits();
        let hold = self.gate.hold_if_empty(request.limits.pause)?;
        let mut outcome = self.run(request, Some(&hold));
        outcome.held = hold.open();
        // The vCPU whose thread this is, and those that came to the gate meanwhile.
        outcome.disturbed = 1 + self.gate.waits().saturating_sub(waits);
        Some(outcome)
    }

    /// Releases the next ranges with the gate open: the calls interrupt the vCPUs that run.
    pub fn open(&self, request: &mut SliceRequest) -> SliceOutcome {
        self.run(request, None)
    }

    fn run(&self, request: &mut SliceRequest, hold: Option<&Hold<'_>>) -> SliceOutcome {
        let SliceRequest { sweep, how, limits } = request;
        let mut outcome = SliceOutcome::default();
        let mut left = limits.ranges.max(1);
        while left > 0 && outcome.bytes < limits.bytes {
            let room = hold.map_or(limits.pause, Hold::left);
            let batch = self.batch(room).min(left);
            let start = Instant::now();
            let chunks = self.take(sweep, batch, limits.bytes - outcome.bytes);
            if chunks.is_empty() {
                outcome.done = true;
                break;
            }
            let ranges = chunks.len();
            left -= ranges;
            self.release(chunks, *how, &mut outcome);
            // The tracker's work is a part of the pause, too.
            self.learn(start.elapsed(), ranges);
            if hold.is_some_and(Hold::expired) {
                break;
            }
        }
        outcome
    }

    fn take(&self, sweep: &mut Sweep, batch: usize, bytes: u64) -> Vec<Chunk<'_>> {
        let mut left = bytes;
        let mut chunks = Vec::with_capacity(batch);
        while chunks.len() < batch
            && left > 0
            && let Some(chunk) = self.lazy.take_chunk(sweep, left.min(MAX_PIECE))
        {
            left = left.saturating_sub(chunk.range().len());
            chunks.push(chunk);
        }
        chunks
    }

    fn release(&self, chunks: Vec<Chunk<'_>>, how: Release, outcome: &mut SliceOutcome) {
        let ranges: Vec<GpaRange> = chunks.iter().map(Chunk::range).collect();
        let released = self.pages.release(&ranges, how);
        // Begun after the invalidation: a vCPU that has seen it has none of these ranges in its translations.
        let generation = match how {
            Release::MarkFree => self.lazy.begin_generation(),
            Release::Discard => 0,
        };
        for (chunk, bytes) in chunks.into_iter().zip(released.bytes) {
            // With hugetlb less may be gone than was asked for.
            if bytes != chunk.range().len() {
                continue;
            }
            outcome.bytes += bytes;
            outcome.ranges += 1;
            match how {
                Release::MarkFree => chunk.unmapped(generation),
                Release::Discard => chunk.discarded(),
            }
        }
        outcome.calls += released.calls;
        outcome.failures += released.failures;
    }

    /// The number of ranges that fit in `room`, by what they have cost so far.
    fn batch(&self, room: Duration) -> usize {
        let cost = match self.cost.load(Ordering::Relaxed) {
            0 => FIRST_COST,
            cost => cost,
        };
        let fit = room.as_nanos() / u128::from(cost);
        let max = self.pages.max_batch().clamp(1, MAX_BATCH);
        usize::try_from(fit).unwrap_or(max).clamp(1, max)
    }

    fn learn(&self, took: Duration, ranges: usize) {
        let each = took.as_nanos() / ranges.max(1) as u128;
        let each = u64::try_from(each).unwrap_or(u64::MAX).max(1);
        let before = match self.cost.load(Ordering::Relaxed) {
            0 => each,
            before => before,
        };
        let cost = before - before / 4 + each / 4;
        self.cost.store(cost.max(1), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::thread;

    use super::*;
    use crate::generation::{NoKick, VmGeneration};
    use crate::lazy::Pieces;
    use crate::range::PAGE_SIZE;
    use crate::release::Released;

    const LONG: Duration = Duration::from_secs(60);

    /// Memory that notes what it is asked to release. A call takes `takes` at least, and until a vCPU waits at
    /// `gate`; `refused` is released by half.
    struct Memory {
        takes: Duration,
        gate: Option<Arc<Gate>>,
        max_batch: usize,
        refused: Option<GpaRange>,
        calls: Mutex<Vec<(Vec<GpaRange>, Release)>>,
    }

    impl ReleasePages for Memory {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            self.max_batch
        }

        fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
            thread::sleep(self.takes);
            while self.gate.as_ref().is_some_and(|gate| gate.waits() == 0) {
                thread::yield_now();
            }
            self.calls.lock().unwrap().push((ranges.to_vec(), how));
            let bytes = ranges.iter().map(|range| {
                let whole = Some(*range) != self.refused;
                range.len() / if whole { 1 } else { 2 }
            });
            Released {
                bytes: bytes.collect(),
                calls: 1,
                failures: ranges
                    .iter()
                    .filter(|range| Some(**range) == self.refused)
                    .count() as u64,
                error: None,
            }
        }
    }

    struct World {
        lazy: LazyMemory,
        gate: Arc<Gate>,
        memory: Memory,
        cost: AtomicU64,
    }

    /// Page number `2 * index` is lazy for each of `fragments`.
    fn world(fragments: u64) -> World {
        let generation = Arc::new(VmGeneration::default());
        let lazy = LazyMemory::new(Arc::clone(&generation));
        lazy.free(&(0..fragments).map(fragment).collect::<Vec<_>>());
        World {
            lazy,
            gate: Arc::new(Gate::new(2, generation, Box::new(NoKick))),
            memory: Memory {
                takes: Duration::ZERO,
                gate: None,
                max_batch: 4,
                refused: None,
                calls: Mutex::default(),
            },
            cost: AtomicU64::new(0),
        }
    }

    fn fragment(index: u64) -> GpaRange {
        GpaRange::new(2 * index * PAGE_SIZE, (2 * index + 1) * PAGE_SIZE).unwrap()
    }

    impl World {
        fn slicer(&self) -> Slicer<'_> {
            Slicer {
                lazy: &self.lazy,
                gate: &self.gate,
                pages: &self.memory,
                cost: &self.cost,
            }
        }

        /// Numbers of ranges of the calls so far.
        fn batches(&self) -> Vec<usize> {
            let calls = self.memory.calls.lock().unwrap();
            calls.iter().map(|(ranges, _)| ranges.len()).collect()
        }
    }

    fn request(ranges: usize, pause: Duration) -> SliceRequest {
        SliceRequest {
            sweep: Sweep::new(Pieces::Any, u64::MAX),
            how: Release::Discard,
            limits: Limits {
                ranges,
                bytes: u64::MAX,
                pause,
            },
        }
    }

    #[test]
    fn a_slice_ends_with_its_pause_and_the_next_goes_on() {
        let mut world = world(10);
        let pause = Duration::from_millis(20);
        (world.memory.takes, world.memory.max_batch) = (pause, 1);
        let mut request = request(100, pause);
        let first = world.slicer().held(&mut request);
        assert_eq!((first.ranges, first.disturbed), (1, 0));
        assert!(first.held >= pause && !first.done && !first.missed);
        let passing = world.slicer().held_if_empty(&mut request).unwrap();
        assert_eq!((passing.ranges, passing.disturbed), (1, 1));
        assert!(passing.held >= pause);
        let calls = world.memory.calls.lock().unwrap();
        assert_eq!(calls[1].0, [fragment(1)]);
    }

    #[test]
    fn with_the_gate_open_no_pause_ends_it() {
        let mut world = world(10);
        world.memory.takes = Duration::from_millis(2);
        let open = world
            .slicer()
            .open(&mut request(100, Duration::from_millis(1)));
        assert_eq!((open.ranges, open.done), (10, true));
        assert_eq!(
            (open.held, world.gate.stats().closings_total),
            (Duration::ZERO, 0)
        );
    }

    #[test]
    fn a_slice_keeps_to_its_ranges_and_bytes() {
        let world = world(10);
        let mut request = request(6, LONG);
        let outcome = world.slicer().held(&mut request);
        assert_eq!((outcome.ranges, outcome.done), (6, false));
        assert_eq!(world.batches(), [4, 2]);
        request.limits.bytes = 3 * PAGE_SIZE;
        let outcome = world.slicer().held(&mut request);
        assert_eq!((outcome.bytes, outcome.done), (3 * PAGE_SIZE, false));
        assert_eq!(world.slicer().held(&mut request).ranges, 1, "the last one");
    }

    #[test]
    fn big_ranges_go_in_pieces() {
        let world = world(0);
        let all = GpaRange::new(0, 2 * MAX_PIECE + PAGE_SIZE).unwrap();
        world.lazy.free(&[all]);
        let outcome = world.slicer().held(&mut request(100, LONG));
        assert_eq!((outcome.bytes, outcome.ranges), (all.len(), 3));
        let calls = world.memory.calls.lock().unwrap();
        assert!(calls[0].0.iter().all(|range| range.len() <= MAX_PIECE));
    }

    #[test]
    fn a_batch_is_what_fits_in_the_pause() {
        let mut world = world(10);
        world.memory.max_batch = usize::MAX;
        assert_eq!(world.slicer().batch(LONG), MAX_BATCH);
        world.memory.max_batch = 4;
        world.cost.store(1_000_000, Ordering::Relaxed);
        let slicer = world.slicer();
        let batch = |micros| slicer.batch(Duration::from_micros(micros));
        assert_eq!([0, 999, 2_999, 3_000, 9_000].map(batch), [1, 1, 2, 3, 4]);
        world.cost.store(0, Ordering::Relaxed);
        assert_eq!([29, 30].map(batch), [2, 3], "an unknown cost is 10 us");
        slicer.open(&mut request(5, Duration::from_micros(20)));
        assert_eq!(world.batches()[0], 2);
    }

    #[test]
    fn the_cost_of_a_range_is_a_moving_average() {
        let world = world(0);
        let slicer = world.slicer();
        let learn = |micros, ranges| {
            slicer.learn(Duration::from_micros(micros), ranges);
            world.cost.load(Ordering::Relaxed)
        };
        assert_eq!(learn(40, 4), 10_000);
        assert_eq!(learn(80, 4), 12_500);
        assert_eq!(learn(0, 0), 9_375);
        (0..100).for_each(|_| assert!(learn(0, 9) > 0));
    }

    #[test]
    fn what_the_tracker_does_for_a_range_is_a_part_of_its_cost() {
        // Releases take next to no time here: the tracker takes the most of it.
        let attempt = || {
            let mut world = world(512);
            world.memory.max_batch = usize::MAX;
            let start = Instant::now();
            assert_eq!(world.slicer().open(&mut request(128, LONG)).ranges, 128);
            let took = start.elapsed().as_nanos();
            (took, u128::from(world.cost.load(Ordering::Relaxed)) * 128)
        };
        // The attempt that others have disturbed least.
        let (took, learned) = (0..300).map(|_| attempt()).min().unwrap();
        assert!(learned > took * 2 / 3, "{learned} of {took} ns");
    }

    #[test]
    fn a_vcpu_that_stays_inside_is_missed_and_nothing_happens() {
        let world = world(3);
        let inside = world.gate.enter(1);
        let mut request = request(9, Duration::from_millis(2));
        let outcome = world.slicer().held(&mut request);
        assert_eq!((outcome.missed, outcome.ranges), (true, 0));
        assert!(outcome.held >= Duration::from_millis(2));
        assert!(world.slicer().held_if_empty(&mut request).is_none());
        assert!(world.batches().is_empty());
        drop(inside);
        assert_eq!(world.slicer().held(&mut request).ranges, 3);
    }

    #[test]
    fn a_vcpu_that_waits_at_the_gate_is_counted() {
        for passing in [false, true] {
            let mut world = world(1);
            world.memory.gate = Some(Arc::clone(&world.gate));
            let mut request = request(9, LONG);
            let outcome = thread::scope(|scope| {
                scope.spawn(|| {
                    while world.gate.stats().closings_total == 0 {
                        thread::yield_now();
                    }
                    drop(world.gate.enter(0));
                });
                let slicer = world.slicer();
                if passing {
                    slicer.held_if_empty(&mut request).unwrap()
                } else {
                    slicer.held(&mut request)
                }
            });
            assert_eq!(outcome.disturbed, 1 + u64::from(passing));
        }
    }

    #[test]
    fn the_gate_stays_open_when_there_is_nothing_to_do() {
        let world = world(0);
        let outcome = world.slicer().held(&mut request(9, LONG));
        assert_eq!((outcome.done, outcome.missed), (true, false));
        assert_eq!(world.gate.stats().closings_total, 0);
    }

    #[test]
    fn marked_ranges_are_unmapped_in_a_generation_of_their_own() {
        let mut world = world(3);
        world.memory.refused = Some(fragment(1));
        let before = world.lazy.generation();
        let mut request = request(9, LONG);
        request.how = Release::MarkFree;
        let outcome = world.slicer().held(&mut request);
        assert_eq!((outcome.ranges, outcome.bytes), (2, 2 * PAGE_SIZE));
        assert_eq!((outcome.calls, outcome.failures), (1, 1));
        let stats = world.lazy.snapshot();
        assert_eq!(stats.unmapped_bytes, 2 * PAGE_SIZE);
        assert_eq!(
            (stats.lazy_bytes, stats.generation),
            (PAGE_SIZE, before + 1)
        );
        let calls = world.memory.calls.lock().unwrap();
        assert_eq!(calls[0].1, Release::MarkFree);
        let mut older = Sweep::unmapped(Pieces::Any, before);
        assert!(!world.lazy.peek(&mut older, u64::MAX));
    }
}
