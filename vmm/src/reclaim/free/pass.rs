//! One pass over the free lists of the guest's kernel.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, Hold};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::{Release, ReleasePages};

use super::cost::Cost;
use super::{BLOCKS, Bits, KernelLists, Look, Piece, STEP, Walk};
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
pub(in crate::reclaim) struct FreePass<'a> {
    lists: Box<dyn KernelLists>,
    pages: &'a dyn ReleasePages,
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

impl<'a> FreePass<'a> {
    /// A pass over `walk`, which takes free pieces of 2^`order` pages and more.
    pub const fn new(
        lists: Box<dyn KernelLists>,
        pages: &'a dyn ReleasePages,
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
            for range in found.drain(..) {
                if let Some(range) = range.intersection(part) {
                    self.add(range, &mut left);
                }
            }
            self.walk.advance(end.min(part.end()));
        }
        true
    }

    /// Adds what the host holds of `range`, at most `left` bytes.
    fn add(&mut self, range: GpaRange, left: &mut u64) {
        // One look tells of a range without pages.
        if self.held(range) == 0 {
            return;
        }
        for block in parts(range, BLOCK_SIZE) {
            if self.only.as_ref().is_some_and(|only| !only.has(block)) {
                continue;
            }
            let whole = block.len() == BLOCK_SIZE;
            let huge = whole && self.pages.in_huge_pages(block);
            let size = if huge { BLOCK_SIZE } else { MAX_PIECE };
            for range in parts(block, size) {
                let held = self.held(range);
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
        let (waits, start) = (gate.waits(), Instant::now());
        let mut taken = Taken::default();
        if let Some(hold) = gate.hold(tuning.pause) {
            if self.lists.is_current(&hold) {
                self.take_held(&hold, tuning.slice, cost, &mut taken);
            } else {
                self.end();
            }
            taken.pause.disturbed = hold.kicked();
        } else {
            taken.pause.missed = true;
        }
        taken.pause.held = start.elapsed();
        taken.pause.disturbed += gate.waits().saturating_sub(waits);
        taken
    }

    fn take_held(&mut self, hold: &Hold<'_>, ranges: usize, cost: &mut Cost, taken: &mut Taken) {
        let mut left = ranges.max(1);
        while left > 0 {
            let start = Instant::now();
            let batch = self.batch(hold, left, cost, taken);
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
        hold: &Hold<'_>,
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
            match self.lists.look(hold, piece.range) {
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
            let joined = last.filter(|(range, _)| range.end() == piece.range.start());
            let joined = joined.and_then(|(range, held)| {
                *range = GpaRange::new(range.start(), piece.range.end())?;
                *held += piece.held;
                Some(())
            });
            if joined.is_none() {
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
