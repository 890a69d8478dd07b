//! One pass over the free lists of the guest's kernel.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, Hold};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::{Release, ReleasePages};

use super::cost::Cost;
use super::{BLOCKS, Bits, KernelLists, Look, Piece, ReadLists, STEP, Walk};
use crate::reclaim::held::parts;
use crate::reclaim::outcome::Pause;
use crate::reclaim::turns::Turn;
use crate::reclaim::{Outcome, ReclaimTuning};

/// Maximum bytes of a piece of a block in pages of 4 KiB. The guest may get a part of a block back while another is still
/// to be taken: each piece is read again when it is taken.
const MAX_PIECE: u64 = 512 << 10;

/// So many candidates are enough to close the gate. One step finds as many at most, so there are never twice as many.
const ENOUGH: usize = 256;

/// Bytes of RAM that are looked at in one step for pieces smaller than a block.
const SMALL_STEP: u64 = 16 << 20;

/// One pass: candidates are collected and taken in turns, until all RAM was looked at once.
pub(in crate::reclaim) struct FreePass {
    lists: Arc<dyn KernelLists>,
    pages: Arc<dyn ReleasePages>,
    order: u32,
    /// No other blocks are taken.
    only: Option<Arc<Bits>>,
    walk: Walk,
    candidates: VecDeque<Piece>,
}

/// What was taken in one pause.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::reclaim) struct Taken {
    /// Its bytes are those that the host has got back.
    pub outcome: Outcome,
    pub pause: Pause,
    /// Candidates that were not free any more.
    pub stale: u64,
}

impl FreePass {
    /// A pass over `walk`, which takes free pieces of 2^`order` pages and more.
    pub const fn new(
        lists: Arc<dyn KernelLists>,
        pages: Arc<dyn ReleasePages>,
        order: u32,
        walk: Walk,
    ) -> Self {
        Self {
            lists,
            pages,
            order,
            only: None,
            walk,
            candidates: VecDeque::new(),
        }
    }

    /// Takes no other blocks than `blocks`.
    pub fn only(self, blocks: Option<Arc<Bits>>) -> Self {
        Self {
            only: blocks,
            ..self
        }
    }

    /// Where the walk goes on.
    pub fn position(&self) -> u64 {
        self.walk.position()
    }

    /// Number of candidates that were not taken yet.
    pub fn candidates(&self) -> usize {
        self.candidates.len()
    }

    /// Looks for candidates of up to `bytes` bytes together, until there are enough or all RAM was looked at. Returns false
    /// if `turn` does not go on before that.
    pub fn collect(&mut self, bytes: u64, turn: &Turn<'_>) -> bool {
        let step = if self.order < BLOCKS {
            SMALL_STEP
        } else {
            STEP
        };
        let mut found = Vec::new();
        let mut left = bytes.saturating_sub(self.candidates.iter().map(|piece| piece.held).sum());
        while left > 0
            && self.candidates.len() < ENOUGH
            && let Some(part) = self.walk.next(step)
        {
            if !turn.goes_on() {
                return false;
            }
            let end = self.lists.find(part, self.order, &mut found);
            let mut last: Option<GpaRange> = None;
            for range in found.drain(..).filter_map(|range| range.intersection(part)) {
                // Within a block of 2 MiB they are free blocks of their own, of which each is looked at by itself.
                let whole = range.start().is_multiple_of(BLOCK_SIZE);
                match last.filter(|_| whole).and_then(|last| joined(last, range)) {
                    Some(both) => last = Some(both),
                    None => self.add(last.replace(range), &mut left),
                }
            }
            self.add(last, &mut left);
            self.walk.advance(end.min(part.end()));
        }
        true
    }

    /// Adds what the host holds of `range`, at most `left` bytes.
    fn add(&mut self, range: Option<GpaRange>, left: &mut u64) {
        let Some(range) = range else {
            return;
        };
        // Two looks tell of a range without pages, and of what lies in huge pages.
        let held = self.held(range);
        if held == 0 {
            return;
        }
        let full = held == range.len();
        let in_huge_pages = self.pages.in_huge_pages(range);
        for block in parts(range, BLOCK_SIZE) {
            if *left == 0 {
                break;
            }
            if self.only.as_ref().is_some_and(|only| !only.has(block)) {
                continue;
            }
            let whole = block.len() == BLOCK_SIZE;
            let huge = whole && in_huge_pages.iter().any(|part| part.contains(block));
            let size = if huge { BLOCK_SIZE } else { MAX_PIECE };
            for range in parts(block, size) {
                let held = if full { range.len() } else { self.held(range) };
                if held > 0 && held <= *left {
                    *left -= held;
                    self.candidates.push_back(Piece { range, held, huge });
                }
            }
        }
    }

    /// Bytes that the host holds. What it cannot tell is left alone.
    fn held(&self, range: GpaRange) -> u64 {
        self.pages.held(range).unwrap_or(0)
    }

    /// Closes the gate, takes candidates that are still free, and opens the gate. Takes nothing if the vCPUs are not out in
    /// time.
    pub fn take(&mut self, gate: &Gate, tuning: &ReclaimTuning, cost: &mut Cost) -> Taken {
        let waits = gate.waits();
        let mut taken = match gate.hold(tuning.pause) {
            Ok(hold) => self.take_held(hold, tuning.slice, cost),
            Err(missed) => Taken {
                pause: Pause {
                    missed: true,
                    held: missed.cost,
                    disturbed: 0,
                },
                ..Taken::default()
            },
        };
        taken.pause.disturbed += gate.waits().saturating_sub(waits);
        taken
    }

    /// For a vCPU thread before it enters the guest: as [`FreePass::take`] if every vCPU is out already, else `None`.
    pub fn take_if_empty(
        &mut self,
        gate: &Gate,
        tuning: &ReclaimTuning,
        cost: &mut Cost,
    ) -> Option<Taken> {
        let waits = gate.waits();
        let hold = gate.hold_if_empty(tuning.pause)?;
        let mut taken = self.take_held(hold, tuning.slice, cost);
        // The vCPU whose thread this is, and those that came to the gate meanwhile.
        taken.pause.disturbed = 1 + gate.waits().saturating_sub(waits);
        Some(taken)
    }

    fn take_held(&mut self, hold: Hold<'_>, ranges: usize, cost: &mut Cost) -> Taken {
        let mut taken = Taken::default();
        if self.lists.is_current(&hold) {
            self.take_ranges(&hold, ranges, cost, &mut taken);
        } else {
            self.end();
        }
        taken.pause.disturbed = hold.kicked();
        taken.pause.held = hold.open();
        taken
    }

    fn take_ranges(&mut self, hold: &Hold<'_>, ranges: usize, cost: &mut Cost, taken: &mut Taken) {
        let mut left = ranges.max(1);
        let lists = Arc::clone(&self.lists);
        let mut reader = lists.reader(hold);
        while left > 0 {
            let start = Instant::now();
            let batch = self.batch((hold, &mut *reader), left, cost, taken);
            if batch.is_empty() {
                break;
            }
            left -= self.release(&batch, taken).min(left);
            cost.learn(&batch, start.elapsed());
        }
    }

    /// The next candidates that are free, all of one kind, in up to `ranges` ranges: as many as should fit into what is left
    /// of the pause, and one if it is the first.
    fn batch(
        &mut self,
        (hold, reader): (&Hold<'_>, &mut dyn ReadLists),
        ranges: usize,
        cost: &Cost,
        taken: &mut Taken,
    ) -> Vec<Piece> {
        let (max, room) = (self.pages.max_batch().clamp(1, ranges), hold.left());
        let mut batch: Vec<Piece> = Vec::new();
        let mut sum = (0, Duration::ZERO);
        while let Some(&piece) = self.candidates.front() {
            let last = batch.last();
            let joins = last.is_some_and(|last| last.range.end() == piece.range.start());
            let differs = last.is_some_and(|last| last.huge != piece.huge);
            let first = last.is_none() && taken.outcome.calls == 0;
            let next = (sum.0 + usize::from(!joins), sum.1 + cost.of(&piece));
            let fits = next.0 <= max && next.1 <= room;
            // One candidate is looked at whatever the time, so that each pause comes on.
            let begun = !first || taken.stale > 0;
            if differs || !(fits || first) || (begun && hold.expired()) {
                break;
            }
            self.candidates.pop_front();
            match reader.look(piece.range) {
                Look::Free => {
                    batch.push(piece);
                    sum = next;
                }
                Look::InUse => taken.stale += 1,
                Look::Poisoned => {
                    self.end();
                    batch.clear();
                }
            }
        }
        batch
    }

    /// Releases `batch`, neighbours as one range. Returns the number of ranges.
    fn release(&self, batch: &[Piece], taken: &mut Taken) -> usize {
        let mut ranges: Vec<(GpaRange, u64)> = Vec::with_capacity(batch.len());
        for piece in batch {
            let last = ranges.last_mut();
            let both = last.and_then(|(range, held)| {
                *range = joined(*range, piece.range)?;
                *held += piece.held;
                Some(())
            });
            if both.is_none() {
                ranges.push((piece.range, piece.held));
            }
        }
        let asked: Vec<GpaRange> = ranges.iter().map(|(range, _)| *range).collect();
        let released = self.pages.release(&asked, Release::Discard);
        let gone = ranges.iter().zip(&released.bytes);
        let whole = gone.filter(|((range, _), bytes)| range.len() == **bytes);
        taken.outcome += Outcome {
            bytes: whole.map(|((_, held), _)| held).sum(),
            calls: released.calls,
            failures: released.failures,
            ..Outcome::default()
        };
        asked.len()
    }

    /// Forgets all candidates and ends the walk.
    fn end(&mut self) {
        self.candidates.clear();
        self.walk.end();
    }
}

/// Both ranges, if `second` follows `first`.
fn joined(first: GpaRange, second: GpaRange) -> Option<GpaRange> {
    let both = GpaRange::new(first.start(), second.end());
    both.filter(|_| first.end() == second.start())
}
