//! Slices: many small ranges invalidated or discarded in one go, with every vCPU out of the guest.
//!
//! Each madvise interrupts every vCPU that runs: once for KVM's flush of the second-level table, and once
//! more for the host's flush of the monitor's own address space, even where KVM has nothing to flush. For
//! fragments these interrupts cost more than the work. With the vCPUs out there are none, and their next
//! entry flushes once for the whole slice.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::generation::{Gate, Hold};
use crate::lazy::{Chunk, LazyMemory, Sweep};
use crate::memory::GpaRange;

/// A piece of a slice is never bigger: 40 us at 12 GiB/s, so that a pause ends near its budget.
const MAX_PIECE: u64 = 512 << 10;

/// Most ranges in one call: a reuse may have to wait for it.
const MAX_BATCH: usize = 128;

/// What a piece is taken to cost until one was measured, in nanoseconds.
const FIRST_COST: u64 = 10_000;

/// What is done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Lazy ranges become unmapped.
    Invalidate,
    /// Lazy or unmapped ranges become discarded.
    Discard,
}

/// What became of some ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Treated {
    /// For each range, how many of its bytes were treated for sure.
    pub bytes: Vec<u64>,
    /// System calls made.
    pub calls: u64,
    /// Parts that the host would not take.
    pub failures: u64,
}

/// The memory behind the ranges: the system calls.
pub trait Pages: Send + Sync {
    /// Whether there is a stage between lazy and discarded.
    fn can_invalidate(&self) -> bool;

    /// Most ranges that one call should be given.
    fn batch(&self) -> usize;

    /// Brings `ranges` to `stage`.
    fn treat(&self, ranges: &[GpaRange], stage: Stage) -> Treated;
}

/// Bounds of one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most ranges.
    pub ranges: usize,
    /// Most bytes.
    pub bytes: u64,
    /// The longest pause of a vCPU, less one call.
    pub pause: Duration,
}

/// What one slice did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// Bytes treated.
    pub bytes: u64,
    /// Ranges treated.
    pub ranges: u64,
    /// System calls made.
    pub calls: u64,
    /// Parts that the host would not take.
    pub failures: u64,
    /// vCPUs that were kept out or brought out for it.
    pub disturbed: u64,
    /// How long the gate was closed.
    pub held: Duration,
    /// The sweep is at its end.
    pub done: bool,
    /// The vCPUs were not out in time: nothing has happened.
    pub missed: bool,
}

/// Runs slices.
pub struct Slicer<'a> {
    /// Whose ranges.
    pub lazy: &'a LazyMemory,
    /// Where the vCPUs wait.
    pub gate: &'a Gate,
    /// The memory behind the ranges.
    pub pages: &'a dyn Pages,
    /// What a range costs, in nanoseconds: a moving average over slices; 0: not known yet.
    pub cost: &'a AtomicU64,
}

impl Slicer<'_> {
    /// Closes the gate, treats the next ranges of `sweep`, and opens it. The gate stays open when there is
    /// nothing to do.
    pub fn held(&self, sweep: &mut Sweep, stage: Stage, limits: Limits) -> Slice {
        if !self.lazy.peek(sweep, limits.bytes.min(MAX_PIECE)) {
            return Slice {
                done: true,
                ..Slice::default()
            };
        }
        let waits = self.gate.waits();
        let start = Instant::now();
        let Some(hold) = self.gate.hold(limits.pause) else {
            return Slice {
                missed: true,
                held: start.elapsed(),
                ..Slice::default()
            };
        };
        let mut slice = self.treat(sweep, stage, limits, Some(&hold));
        slice.disturbed = hold.kicked();
        drop(hold);
        slice.held = start.elapsed();
        slice.disturbed += self.gate.waits().saturating_sub(waits);
        slice
    }

    /// The same for a vCPU thread on its way in: only if every vCPU is out already, else `None`.
    pub fn in_passing(&self, sweep: &mut Sweep, stage: Stage, limits: Limits) -> Option<Slice> {
        let (waits, start) = (self.gate.waits(), Instant::now());
        let hold = self.gate.hold_if_empty(limits.pause)?;
        let mut slice = self.treat(sweep, stage, limits, Some(&hold));
        drop(hold);
        slice.held = start.elapsed();
        // The vCPU whose thread this is, and those that came to the gate meanwhile.
        slice.disturbed = 1 + self.gate.waits().saturating_sub(waits);
        Some(slice)
    }

    /// The same with the gate open: the calls interrupt the vCPUs that run.
    pub fn open(&self, sweep: &mut Sweep, stage: Stage, limits: Limits) -> Slice {
        self.treat(sweep, stage, limits, None)
    }

    fn treat(
        &self,
        sweep: &mut Sweep,
        stage: Stage,
        limits: Limits,
        hold: Option<&Hold<'_>>,
    ) -> Slice {
        let mut slice = Slice::default();
        let mut left = limits.ranges.max(1);
        while left > 0 && slice.bytes < limits.bytes {
            let room = hold.map_or(limits.pause, Hold::left);
            let batch = self.batch(room).min(left);
            let chunks = self.take(sweep, batch, limits.bytes - slice.bytes);
            if chunks.is_empty() {
                slice.done = true;
                break;
            }
            left -= chunks.len();
            self.treat_chunks(chunks, stage, &mut slice);
            if hold.is_some_and(Hold::expired) {
                break;
            }
        }
        slice
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

    fn treat_chunks(&self, chunks: Vec<Chunk<'_>>, stage: Stage, slice: &mut Slice) {
        let ranges: Vec<GpaRange> = chunks.iter().map(Chunk::range).collect();
        let start = Instant::now();
        let treated = self.pages.treat(&ranges, stage);
        self.learn(start.elapsed(), ranges.len());
        // Begun after the invalidation: who has seen it has none of these ranges in its translations.
        let generation = match stage {
            Stage::Invalidate => self.lazy.begin_generation(),
            Stage::Discard => 0,
        };
        for (chunk, bytes) in chunks.into_iter().zip(treated.bytes) {
            // With hugetlb less may be gone than was asked for.
            if bytes != chunk.range().len() {
                continue;
            }
            slice.bytes += bytes;
            slice.ranges += 1;
            match stage {
                Stage::Invalidate => chunk.unmapped(generation),
                Stage::Discard => chunk.discarded(),
            }
        }
        slice.calls += treated.calls;
        slice.failures += treated.failures;
    }

    /// How many ranges fit in `room`, going by what they have cost so far.
    fn batch(&self, room: Duration) -> usize {
        let cost = match self.cost.load(Ordering::Relaxed) {
            0 => FIRST_COST,
            cost => cost,
        };
        let fit = room.as_nanos() / u128::from(cost);
        let most = self.pages.batch().clamp(1, MAX_BATCH);
        usize::try_from(fit).unwrap_or(most).clamp(1, most)
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
