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
use crate::range::GpaRange;
use crate::release::{Release, ReleasePages};

/// A piece of a slice is never bigger: 40 us at 12 GiB/s, so that a pause ends near its budget.
const MAX_PIECE: u64 = 512 << 10;

/// Maximum number of ranges in one call: a reuse may have to wait for it.
const MAX_BATCH: usize = 128;

/// What a piece is taken to cost until one was measured, in nanoseconds.
const FIRST_COST: u64 = 10_000;

/// Bounds of one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of ranges.
    pub ranges: usize,
    /// Maximum number of bytes.
    pub bytes: u64,
    /// How long the gate may be closed; the system call that is under way then is added to that.
    pub pause: Duration,
}

/// What a slice is to do.
#[derive(Clone, Debug)]
pub struct SliceRequest {
    /// Where to go on; a slice moves it.
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
    /// The tracker of the ranges.
    pub lazy: &'a LazyMemory,
    /// Where the vCPUs wait.
    pub gate: &'a Gate,
    /// The memory behind the ranges.
    pub pages: &'a dyn ReleasePages,
    /// Cost of a range in nanoseconds: a moving average over slices; 0: not known yet.
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
        let start = Instant::now();
        let Some(hold) = self.gate.hold(limits.pause) else {
            return SliceOutcome {
                missed: true,
                held: start.elapsed(),
                ..SliceOutcome::default()
            };
        };
        let mut outcome = self.run(request, Some(&hold));
        outcome.disturbed = hold.kicked();
        drop(hold);
        outcome.held = start.elapsed();
        outcome.disturbed += self.gate.waits().saturating_sub(waits);
        outcome
    }

    /// For a vCPU thread before it enters the guest: as [`Slicer::held`] if every vCPU is out already, else `None`.
    pub fn held_if_empty(&self, request: &mut SliceRequest) -> Option<SliceOutcome> {
        let (waits, start) = (self.gate.waits(), Instant::now());
        let hold = self.gate.hold_if_empty(request.limits.pause)?;
        let mut outcome = self.run(request, Some(&hold));
        drop(hold);
        outcome.held = start.elapsed();
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
            let chunks = self.take(sweep, batch, limits.bytes - outcome.bytes);
            if chunks.is_empty() {
                outcome.done = true;
                break;
            }
            left -= chunks.len();
            self.release(chunks, *how, &mut outcome);
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
        let start = Instant::now();
        let released = self.pages.release(&ranges, how);
        self.learn(start.elapsed(), ranges.len());
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
