//! The reporting queue (virtio 1.3, 5.5.6.7): each writable buffer is itself a range of free memory.
//!
//! A report is only an offer, so a message with any error can be returned without doing anything.

use std::io;
use std::sync::Arc;

use ebb_core::range::GpaRange;

use super::handle::ReportStats;
use super::worker::Context;
use crate::devices::virtio::queue::{Chain, ChainFault, Poller, QueueFailure, ServedQueue, Work};

/// Maximum number of ranges that are given to the sink in one call: 128 full messages of Linux, a whole queue.
const BATCH_RANGES: usize = 4096;

/// The thread that handles reports.
pub(super) struct ReportWorker {
    context: Context,
    features: u64,
    queue: ServedQueue,
    chain: Chain,
    batch: Vec<GpaRange>,
    /// Messages that are returned when the sink has finished with their ranges.
    heads: Vec<u16>,
    found: ReportStats,
}

impl ReportWorker {
    /// Takes over the queue; `features` are the negotiated ones.
    pub fn new(context: Context, features: u64, queue: ServedQueue) -> Self {
        Self {
            context,
            features,
            chain: Chain::with_capacity(queue.size()),
            batch: Vec::with_capacity(BATCH_RANGES),
            heads: Vec::with_capacity(queue.size().into()),
            found: ReportStats::default(),
            queue,
        }
    }

    /// Reads all messages in the queue, gives their ranges to the sink, and only then returns the messages.
    fn serve(&mut self, poller: &Poller) -> Result<(), QueueFailure> {
        let memory = Arc::clone(&self.context.memory);
        self.queue.begin(&memory);
        let mut outcome = Ok(());
        while self.heads.len() < usize::from(self.queue.size()) && !poller.stop().is_stopped() {
            match self.queue.next(&memory, &mut self.chain) {
                Ok(None) => break,
                Ok(Some(loaded)) => self.collect(loaded),
                Err(failure) => {
                    outcome = Err(failure);
                    break;
                }
            }
            self.heads.push(self.chain.head());
        }
        if poller.stop().is_stopped() {
            // A reset gives the driver its pages back.
            return outcome;
        }
        self.hand_over();
        self.context
            .shared
            .count_reports(std::mem::take(&mut self.found));
        for head in self.heads.drain(..) {
            outcome = outcome.and(self.queue.give_back(&memory, head, 0));
        }
        let (interrupt, faults) = (&*self.context.interrupt, self.context.faults());
        outcome.and(self.queue.end(&memory, interrupt, faults))
    }

    /// Adds the ranges of one message to the batch, which is given to the sink whenever it is full.
    fn collect(&mut self, loaded: Result<(), ChainFault>) {
        self.found.messages_total += 1;
        let faults = self.context.faults();
        if let Err(fault) = loaded {
            return faults.report(fault);
        }
        let readable = self.chain.readable(&self.context.memory).remaining();
        if readable > 0 {
            return faults.report(format_args!("reporting: {readable} bytes to be read"));
        }
        let chain = std::mem::take(&mut self.chain);
        for (start, len) in chain.writable_buffers() {
            if self.batch.len() == BATCH_RANGES {
                self.hand_over();
            }
            match self.check(start, len) {
                Some(range) => self.batch.push(range),
                None => self.context.faults().report(format_args!(
                    "reporting: {start:#x}+{len:#x} is not a range of RAM pages"
                )),
            }
        }
        self.chain = chain;
    }

    /// The range, if it consists of whole pages of RAM.
    fn check(&self, start: u64, len: u32) -> Option<GpaRange> {
        let range = GpaRange::new(start, start.checked_add(len.into())?)?;
        self.context.sink.is_ram(range).then_some(range)
    }

    fn hand_over(&mut self) {
        let bytes: u64 = self.batch.iter().map(|range| range.len()).sum();
        self.found.ranges_total += self.batch.len() as u64;
        self.found.bytes_total += bytes;
        merge(&mut self.batch);
        if self.context.shared.keeps_reported(self.features) {
            self.found.poisoned_bytes_total += bytes;
        } else if !self.batch.is_empty() {
            self.context.sink.report(&self.batch);
        }
        self.batch.clear();
    }
}

impl Work for ReportWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.queue.notified(), 0)
    }

    fn run(mut self, poller: &Poller) {
        // What the driver made available before it was ready is not notified again.
        while !poller.stop().is_stopped() {
            let served = self.serve(poller);
            self.context.settle(served);
            if !poller.wait(None, |_| {}) {
                return;
            }
        }
    }
}

/// Sorts `ranges` and merges those that touch or overlap.
fn merge(ranges: &mut Vec<GpaRange>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let grown = (next.start() <= last.end())
            .then(|| GpaRange::new(last.start(), last.end().max(next.end())))
            .flatten();
        grown.map(|grown| *last = grown).is_some()
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ebb_core::range::PAGE_SIZE;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn merging_keeps_exactly_the_pages(pages in prop::collection::vec((0..64_u64, 1..8_u64), 0..40)) {
            let mut ranges: Vec<_> = pages.iter()
                .filter_map(|&(first, count)| GpaRange::new(first * PAGE_SIZE, (first + count) * PAGE_SIZE))
                .collect();
            merge(&mut ranges);
            prop_assert!(ranges.is_sorted_by(|a, b| a.end() < b.start()));
            let wanted: BTreeSet<_> = pages.iter().flat_map(|&(first, count)| first..first + count).collect();
            let kept: Vec<_> = ranges.iter()
                .flat_map(|range| range.start() / PAGE_SIZE..range.end() / PAGE_SIZE).collect();
            prop_assert_eq!(kept, wanted.into_iter().collect::<Vec<_>>());
        }
    }
}
