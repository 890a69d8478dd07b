//! The part of a reclaim that takes free pages.

use std::sync::Arc;
use std::time::Instant;

use super::pass::{FreePass, Taken};
use super::{BLOCKS, Bits, Cost, Walk};
use crate::reclaim::job::{Job, MAX_MISSES};
use crate::reclaim::turns::{Ended, Work};

/// So many pauses in a row may the vCPUs miss before an order for someone who waits takes no more free pages.
const URGENT_MISSES: u32 = 32;

/// A pass that is offered to the vCPU threads, for one pause.
pub(in crate::reclaim) struct FreeOffer {
    pub pass: FreePass,
    pub cost: Cost,
}

impl Job<'_> {
    /// Takes what is free by the free lists of the guest's kernel, in pieces of 2^`order` pages and more. Nothing in an order
    /// by age.
    pub fn free_pages(&mut self, order: u32, work: Work) -> Result<(), Ended> {
        if self.order.newest < u64::MAX {
            return Ok(());
        }
        self.free_pages_of(order, work, None)
    }

    /// Takes blocks that have been free for some time.
    pub fn old_free_blocks(&mut self) -> Result<(), Ended> {
        let old = self.reclaimer.round().free.ages.old();
        self.free_pages_of(BLOCKS, Work::Blocks, Some(old))?;
        self.reclaimer.round().free.ages.taken();
        Ok(())
    }

    fn free_pages_of(
        &mut self,
        order: u32,
        work: Work,
        only: Option<Arc<Bits>>,
    ) -> Result<(), Ended> {
        let reclaimer = self.reclaimer;
        let source = reclaimer.free.as_ref();
        let source = source.filter(|_| self.left() > 0);
        let Some((source, lists)) = source.and_then(|source| Some((source, source.current()?)))
        else {
            return Ok(());
        };
        let walk = Walk::new(source.ram(), reclaimer.round().free.cursor);
        let pages = Arc::clone(&reclaimer.pages);
        self.free_pass(FreePass::new(lists, pages, order, walk).only(only), work)
    }

    fn free_pass(&mut self, mut pass: FreePass, work: Work) -> Result<(), Ended> {
        let reclaimer = self.reclaimer;
        let (mut misses, urgent) = (0, self.order.urgent);
        let enough = if urgent { URGENT_MISSES } else { MAX_MISSES };
        loop {
            let left = self.left();
            let collected = self.until_done(work, |turn| pass.collect(left, turn));
            reclaimer.round().free.cursor = pass.position();
            collected?;
            let found = pass.candidates() as u64;
            reclaimer.free_counters.candidates_total.add(found);
            if found == 0 {
                return Ok(());
            }
            while pass.candidates() > 0 {
                // There is no form with the gate open: vCPUs that miss too many pauses are left alone for a while.
                let due = urgent || reclaimer.round().free.holds.is_due();
                if misses == enough || !due {
                    return Ok(());
                }
                let turn = self.turn_after_rest(work)?;
                let (back, taken) = self.take_free(pass);
                drop(turn);
                pass = back;
                self.outcome += taken.outcome;
                misses = if taken.pause.missed { misses + 1 } else { 0 };
            }
        }
    }

    /// Takes candidates of `pass` in one pause. The caller has a turn.
    fn take_free(&self, pass: FreePass) -> (FreePass, Taken) {
        let (reclaimer, counters) = (self.reclaimer, &self.reclaimer.free_counters);
        let cost = reclaimer.round().free.cost;
        let (mut offer, passing) = self.offer(&reclaimer.free_offer, FreeOffer { pass, cost });
        if passing.is_some() {
            counters.passing_total.increment();
        }
        let FreeOffer { pass, cost } = &mut offer;
        let taken = passing.unwrap_or_else(|| pass.take(&reclaimer.gate, &reclaimer.tuning, cost));
        let mut round = reclaimer.round();
        round.free.cost = offer.cost;
        round.last_pause = Some((Instant::now(), taken.pause));
        if taken.pause.missed {
            round.free.holds.failed();
            counters.missed_total.increment();
        } else {
            round.free.holds.succeeded();
            counters.pauses_total.increment();
        }
        if let Some((_, _, bytes)) = &mut round.free.estimate {
            *bytes = bytes.saturating_sub(taken.outcome.bytes);
        }
        drop(round);
        counters.stale_total.add(taken.stale);
        counters.taken_bytes_total.add(taken.outcome.bytes);
        counters.failures_total.add(taken.outcome.failures);
        (offer.pass, taken)
    }
}
