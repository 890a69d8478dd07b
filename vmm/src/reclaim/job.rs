//! One reclaim under way: its passes over unmapped memory, blocks, granules and fragments.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use ebb_core::lazy::{Pieces, Sweep};
use ebb_core::offer::{OfferSlot, Offered};
use ebb_core::range::BLOCK_SIZE;
use ebb_core::release::Release;
use ebb_core::slice::{Limits, SliceOutcome, SliceRequest};

use super::blocks::BlockPass;
use super::free;
use super::granules::GranulePass;
use super::outcome::Pause;
use super::reclaimer::Reclaimer;
use super::turns::{Ended, Ticket, Turn, Work};
use super::{Mode, Order, Outcome, Reach};
use crate::arena::Arena;

/// How long a reclaim waits for vCPUs that have not seen the latest generation, before it looks at other orders.
const CATCH_UP_TIMEOUT: Duration = Duration::from_millis(2);

/// How often it waits for them.
const CATCH_UP_ATTEMPTS: u32 = 5;

/// After this many pauses in a row that vCPUs missed, slices run with the gate open, and more of them after each further
/// miss. So a pause budget that is too short for this host costs interrupts, but reclaim goes on.
pub(super) const MAX_MISSES: u32 = 3;

/// How long a slice is offered to the vCPU threads before the vCPUs are brought out for it.
const OFFER_TIMEOUT: Duration = Duration::from_millis(1);

/// Cost of a pause for the guest, in lengths of the pause: it runs slower afterwards, with cold caches and translations.
/// `bench reclaim` measures 1.7.
const PAUSE_COST: u32 = 2;

/// Maximum time between two slices.
pub(super) const MAX_REST: Duration = Duration::from_secs(1);

/// One reclaim under way.
pub(super) struct Job<'a> {
    pub reclaimer: &'a Reclaimer,
    pub order: Order,
    pub how: Release,
    pub ticket: Ticket<'a>,
    pub outcome: Outcome,
}

impl Job<'_> {
    /// Discards, in this order: what is unmapped; blocks and granules that have survived the previous reclaim, whose last
    /// generation is `old`; all lazy blocks and granules; blocks that are free by the guest's free lists; fragments; free
    /// pieces; a piece of a block. `now` is the machine's generation. Each of these passes is one sweep, and a sweep finds
    /// nothing twice, so this ends whatever fails.
    pub fn discard(&mut self, old: u64, now: u64) -> Result<(), Ended> {
        self.unmapped()?;
        let newest = now.min(self.order.newest);
        self.blocks(Sweep::new(Pieces::Blocks, old.min(newest)))?;
        self.arenas(old.min(self.order.newest))?;
        self.blocks(Sweep::new(Pieces::Blocks, newest))?;
        self.arenas(self.order.newest)?;
        self.free_pages(free::BLOCKS, Work::Blocks)?;
        self.fragments(newest)?;
        if self.order.reach >= Reach::Fragments && self.refilled()? {
            self.lazy_ram()?;
        }
        self.free_pieces()?;
        // A block is broken up only for less than a block.
        if self.order.reach >= Reach::Everything && self.left() < BLOCK_SIZE {
            self.slices(Sweep::new(Pieces::Any, newest))?;
        }
        Ok(())
    }

    /// Discards granules that are old enough, and with `ram` blocks and fragments before: what cannot be marked free.
    pub fn discard_aged(&mut self, ram: bool) -> Result<(), Ended> {
        if ram {
            self.lazy_ram()?;
        }
        self.arenas(self.order.newest)
    }

    /// Takes lazy blocks, then fragments, whenever they were freed, as far as the order goes. An invalidation makes what is
    /// lazy in the same block younger, which must not end it.
    pub fn lazy_ram(&mut self) -> Result<(), Ended> {
        self.blocks(Sweep::new(Pieces::Blocks, self.order.newest))?;
        self.fragments(self.order.newest)
    }

    /// Takes free memory in pieces smaller than a block, if memory is really short: the guest needs new pages soon.
    fn free_pieces(&mut self) -> Result<(), Ended> {
        let Reclaimer { tuning, pages, .. } = self.reclaimer;
        let short = self.order.urgent || tuning.mode != Mode::Eager;
        if self.order.reach < Reach::Fragments || !short || pages.unit() >= BLOCK_SIZE {
            return Ok(());
        }
        self.free_pages(free::PIECES, Work::Fragments)
    }

    /// Takes lazy fragments, if the order reaches so far.
    fn fragments(&mut self, newest: u64) -> Result<(), Ended> {
        if self.order.reach < Reach::Fragments {
            return Ok(());
        }
        self.slices(Sweep::new(Pieces::Fragments, newest))
    }

    /// Bytes that are still to be taken.
    pub const fn left(&self) -> u64 {
        self.order.bytes.saturating_sub(self.outcome.bytes)
    }

    /// Discards unmapped memory: first what is quiescent. Under hard pressure then the rest, after the vCPUs that have not
    /// seen its generation were brought out once.
    fn unmapped(&mut self) -> Result<(), Ended> {
        let quiescent = self.reclaimer.gate.quiescent_generation();
        self.unmapped_up_to(quiescent)?;
        let now = self.reclaimer.lazy.generation().min(self.order.newest);
        let worth_it = self.order.reach >= Reach::Fragments && quiescent < now;
        let mut rest = Sweep::unmapped(Pieces::Any, now);
        if worth_it
            && self.left() > 0
            && self.reclaimer.lazy.peek(&mut rest, self.left())
            && self.catch_up(now)?
        {
            self.unmapped_up_to(now)?;
        }
        Ok(())
    }

    /// Waits until `generation` is quiescent. Returns false if that takes too long.
    fn catch_up(&self, generation: u64) -> Result<bool, Ended> {
        for _ in 0..CATCH_UP_ATTEMPTS {
            let _turn = self.turn(Work::Blocks)?;
            if self.reclaimer.gate.catch_up(generation, CATCH_UP_TIMEOUT) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn unmapped_up_to(&mut self, quiescent: u64) -> Result<(), Ended> {
        let newest = quiescent.min(self.order.newest);
        self.blocks(Sweep::unmapped(Pieces::Blocks, newest))?;
        self.slices(Sweep::unmapped(Pieces::Fragments, newest))
    }

    fn turn(&self, work: Work) -> Result<Turn<'_>, Ended> {
        self.reclaimer.turns.take(&self.ticket, work, None)
    }

    /// One sweep over whole blocks, with the vCPUs running.
    fn blocks(&mut self, sweep: Sweep) -> Result<(), Ended> {
        if self.left() < BLOCK_SIZE {
            return Ok(());
        }
        let Reclaimer { lazy, pages, .. } = self.reclaimer;
        let chunks = &self.reclaimer.counters.chunks;
        let pass = BlockPass::new((lazy, &**pages), self.how, sweep, self.left(), chunks);
        let mut pace = self.reclaimer.round().pace;
        let result = self.until_done(Work::Blocks, |turn| pass.run(turn, &mut pace));
        self.reclaimer.round().pace = pace;
        self.outcome += pass.outcome();
        result
    }

    /// One sweep over the granules that were freed at `newest` or before, with the vCPUs running.
    fn arenas(&mut self, newest: u64) -> Result<(), Ended> {
        for arena in self.reclaimer.arenas.iter() {
            self.granules(arena, 0..=newest, 0).1?;
        }
        Ok(())
    }

    /// Marks granules free that were freed up to `now`, each one once.
    pub fn mark_arenas(&mut self, now: u64) -> Result<(), Ended> {
        for (arena, index) in self.reclaimer.arenas.iter().zip(0..) {
            let mut marked = self.reclaimer.round().marked[index];
            let (generations, cursor) = marked.next(now);
            let (cursor, result) = self.granules(arena, generations, cursor);
            marked.seen(cursor, arena.place().layout.granules());
            self.reclaimer.round().marked[index] = marked;
            result?;
        }
        Ok(())
    }

    /// Takes granules that were freed in one of `generations`, from number `cursor` on. Returns the first that it has not
    /// looked at.
    fn granules(
        &mut self,
        arena: &Arena,
        generations: RangeInclusive<u64>,
        cursor: usize,
    ) -> (usize, Result<(), Ended>) {
        let mut pass = GranulePass {
            arena,
            pages: &*self.reclaimer.pages,
            how: self.how,
            generations,
            cursor,
            chunks: &self.reclaimer.counters.chunks,
        };
        let (mut pace, mut left) = (self.reclaimer.round().pace, self.left());
        let mut sum = Outcome::default();
        let result = self.until_done(Work::Blocks, |turn| {
            let (outcome, done) = pass.run(left, turn, &mut pace);
            left -= outcome.bytes.min(left);
            sum += outcome;
            done
        });
        self.reclaimer.round().pace = pace;
        self.outcome += sum;
        (pass.cursor, result)
    }

    /// Looks for discarded memory that came back, as much as is still to be taken. Returns true if there is some.
    fn refilled(&self) -> Result<bool, Ended> {
        let (reclaimer, urgent) = (self.reclaimer, self.order.urgent);
        let go_on = || reclaimer.round().look.begin(Instant::now());
        let sweep = if urgent {
            Some(Sweep::discarded())
        } else {
            go_on()
        };
        let Some(mut sweep) = sweep.filter(|_| self.order.newest == u64::MAX && self.left() > 0)
        else {
            return Ok(false);
        };
        let (held, mut found) = (reclaimer.held(), 0);
        let result = self.until_done(Work::Fragments, |turn| {
            held.refill(&mut sweep, &mut found, self.left(), turn)
        });
        if !urgent {
            let mut round = reclaimer.round();
            round.look.end(&reclaimer.lazy, sweep, Instant::now());
        }
        reclaimer.counters.refilled_bytes_total.add(found);
        result.map(|()| found > 0)
    }

    /// Gives `pass` one turn after the other until it returns true: it is done.
    pub fn until_done(
        &self,
        work: Work,
        mut pass: impl FnMut(&Turn<'_>) -> bool,
    ) -> Result<(), Ended> {
        let mut turn = self.turn(work)?;
        while !pass(&turn) {
            drop(turn);
            turn = self.turn(work)?;
            self.reclaimer.counters.interruptions_total.increment();
        }
        Ok(())
    }

    /// One sweep over smaller pieces, in slices with the vCPUs out of the guest. Nothing if the host keeps all pieces.
    fn slices(&mut self, sweep: Sweep) -> Result<(), Ended> {
        let reclaimer = self.reclaimer;
        if reclaimer.pages.unit() >= BLOCK_SIZE {
            return Ok(());
        }
        let mut request = SliceRequest {
            sweep,
            how: self.how,
            limits: Limits {
                ranges: reclaimer.tuning.slice,
                bytes: self.left(),
                pause: reclaimer.tuning.pause,
            },
        };
        // What has nothing to do is no attempt.
        while self.left() > 0 && reclaimer.lazy.peek(&mut request.sweep, self.left()) {
            let turn = self.turn(Work::Fragments)?;
            let held = reclaimer.held();
            let (skipped, all) = held.skip_empty(&request.sweep, self.left(), &turn);
            drop(turn);
            self.outcome.bytes += skipped;
            if all || self.left() == 0 {
                continue;
            }
            request.limits.bytes = self.left();
            let slice = {
                let _turn = self.turn_after_rest(Work::Fragments)?;
                let slice = self.slice(&mut request);
                reclaimer.round().last_pause = Some((Instant::now(), Pause::from(&slice)));
                slice
            };
            self.outcome += &slice;
            if slice.done {
                break;
            }
        }
        Ok(())
    }

    /// A turn for a pause, after the rest that is due after the last one, whoever has made it.
    pub fn turn_after_rest(&self, work: Work) -> Result<Turn<'_>, Ended> {
        let reclaimer = self.reclaimer;
        let share = share_of_time(reclaimer.tuning.share, self.order.urgent);
        let rested = || {
            let (end, pause) = reclaimer.round().last_pause?;
            end.checked_add(rest_after(&pause, share))
        };
        loop {
            let at = rested();
            let turn = reclaimer.turns.take(&self.ticket, work, at)?;
            if rested() <= at {
                return Ok(turn);
            }
        }
    }

    /// One slice: with the vCPUs out of the guest, or with the gate open after they have missed too many pauses.
    fn slice(&self, request: &mut SliceRequest) -> SliceOutcome {
        let Reclaimer { counters, .. } = self.reclaimer;
        let slicer = self.reclaimer.slicer();
        let (back, passing) = self.offer(&self.reclaimer.offer, request.clone());
        *request = back;
        let (slice, count) = if let Some(slice) = passing {
            counters.passing_slices_total.increment();
            (slice, &counters.held_slices_total)
        } else if self.reclaimer.round().holds.is_due() {
            let slice = slicer.held(request);
            let holds = &mut self.reclaimer.round().holds;
            if slice.missed {
                holds.failed();
            } else if slice.calls > 0 {
                holds.succeeded();
            }
            (slice, &counters.held_slices_total)
        } else {
            (slicer.open(request), &counters.open_slices_total)
        };
        count.add(u64::from(slice.calls > 0));
        counters.slice_ranges_total.add(slice.ranges);
        slice
    }

    /// Offers `request` to the vCPU threads. Returns it, with an outcome if one of them did it.
    pub fn offer<R, O>(&self, slot: &OfferSlot<R, O>, request: R) -> (R, Option<O>) {
        let reclaimer = self.reclaimer;
        // If every vCPU is out there is nobody to offer it to, and nobody to interrupt.
        if !reclaimer.round().offers.is_due() || reclaimer.gate.is_empty() {
            return (request, None);
        }
        slot.post(request);
        slot.wait(OFFER_TIMEOUT);
        let offered = slot.take_back();
        let Offered { request, outcome } = offered.expect("only who has the turn takes it back");
        let mut round = reclaimer.round();
        if outcome.is_some() {
            round.offers.succeeded();
        } else {
            round.offers.failed();
        }
        (request, outcome)
    }
}

/// Percentage of their time that the vCPUs may lose, given the configured one.
fn share_of_time(configured: u32, urgent: bool) -> u32 {
    let factor = if urgent { 10 } else { 1 };
    (configured * factor).clamp(1, 50)
}

/// How long the vCPUs must run after `pause`, so that what it cost them is at most `share` percent of their time.
fn rest_after(pause: &Pause, share: u32) -> Duration {
    if pause.disturbed == 0 && !pause.missed {
        return Duration::ZERO;
    }
    let rest = pause.held * (100 * PAUSE_COST / share - 1);
    rest.min(MAX_REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(disturbed: u64, missed: bool) -> Pause {
        Pause {
            disturbed,
            missed,
            held: Duration::from_micros(100),
        }
    }

    #[test]
    fn only_who_waits_may_take_ten_times_the_share() {
        for (configured, background, urgent) in [(1, 1, 10), (3, 3, 30), (9, 9, 50), (50, 50, 50)] {
            assert_eq!(share_of_time(configured, false), background);
            assert_eq!(share_of_time(configured, true), urgent);
        }
        assert_eq!(share_of_time(0, false), 1);
    }

    #[test]
    fn the_vcpus_lose_their_share_of_time_and_no_more() {
        for (share, rest) in [(1, 19_900), (10, 1_900), (50, 300)] {
            for (disturbed, missed) in [(1, false), (0, true)] {
                let rest_us = rest_after(&pause(disturbed, missed), share).as_micros();
                assert_eq!(rest_us, rest, "{share} {disturbed} {missed}");
            }
        }
        assert_eq!(rest_after(&pause(0, false), 1), Duration::ZERO);
        let long = Pause {
            held: Duration::from_secs(1),
            ..pause(1, false)
        };
        assert_eq!(rest_after(&long, 1), MAX_REST);
    }
}
