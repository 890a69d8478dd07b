//! The thread of a queue: takes requests, has them carried out several at a time, and gives them back.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::flight::{Context, Flight};
use super::handle::Shared;
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{Poller, QueueFailure, ServedQueue, StopSignal, Work};
use crate::sys::transfer::{Done, Transfers};

/// How long the host has no memory for a request, at least.
const RETRY: Duration = Duration::from_millis(1);

/// How long the thread waits for the limits, at most: an operator may have set others meanwhile.
const LOOK: Duration = Duration::from_millis(500);

/// Tokens of what wakes the thread.
const NOTIFIED: u32 = 0;
const DONE: u32 = 1;

ebb_core::metrics! {
    /// What a disk has done since the machine started.
    pub struct DiskStats from pub struct DiskCounters {
        /// Read requests that succeeded.
        reads_total: Counter,
        /// Write requests that succeeded.
        writes_total: Counter,
        /// Flush requests that succeeded.
        flushes_total: Counter,
        /// Requests that failed, for any reason.
        errors_total: Counter,
        /// Times that requests had to wait for the disk's limits.
        throttled_total: Counter,
        /// Data that the guest has read.
        read_bytes_total: Counter of Bytes,
        /// Data that the guest has written.
        written_bytes_total: Counter of Bytes,
        /// Data that the guest has said it does not need.
        discarded_bytes_total: Counter of Bytes,
        /// Zeroes that the guest has asked for without sending them.
        zeroed_bytes_total: Counter of Bytes,
    }
}

/// A queue, and the requests of it that are under way.
pub(super) struct BlockWorker {
    shared: Arc<Shared>,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Arc<dyn VirtioInterrupt>,
    queue: ServedQueue,
    flight: Flight,
    /// Locked for as long as the thread works.
    transfers: Arc<Mutex<Transfers>>,
}

impl BlockWorker {
    pub fn new(
        shared: Arc<Shared>,
        memory: Arc<GuestMemoryMmap>,
        interrupt: Arc<dyn VirtioInterrupt>,
        queue: ServedQueue,
        transfers: Arc<Mutex<Transfers>>,
    ) -> Self {
        Self {
            flight: Flight::new(super::QUEUE_SIZE),
            shared,
            memory,
            interrupt,
            queue,
            transfers,
        }
    }

    /// Does what can be done without waiting. Returns after which time there may be more, if not only after an event.
    fn serve(
        &mut self,
        transfers: &mut Transfers,
        stop: &StopSignal,
    ) -> Result<Option<Duration>, QueueFailure> {
        self.queue.begin(&self.memory);
        loop {
            let delay = self.take(transfers, stop)?;
            let submitted = transfers.submit();
            // What has come to its end or to its next part makes room, or has to be submitted.
            let collected = self.collect(transfers);
            self.give_back()?;
            if stop.is_stopped() {
                return Ok(None);
            }
            if delay.is_some() || !submitted {
                // Until then new requests are of no interest.
                return Ok(Some(delay.map_or(RETRY, |delay| {
                    if submitted { delay } else { delay.min(RETRY) }
                })));
            }
            if !collected {
                break;
            }
        }
        // With no room left, the end of a request comes first.
        if !self.flight.is_full() {
            let faults = &self.shared.faults;
            self.queue.end(&self.memory, &*self.interrupt, faults)?;
        }
        Ok(None)
    }

    /// Takes on requests for as long as there is room. Returns how long the next one has to wait for the limits, if there may be
    /// one that has to.
    fn take(
        &mut self,
        transfers: &mut Transfers,
        stop: &StopSignal,
    ) -> Result<Option<Duration>, QueueFailure> {
        let mut context = Context {
            memory: &self.memory,
            shared: &self.shared,
            transfers,
            stopped: false,
        };
        // Those that are done at once take no room.
        for _ in 0..self.queue.size() {
            if self.flight.is_full() || stop.is_stopped() {
                break;
            }
            let delay = self.shared.limiter().delay();
            if delay.is_some() {
                self.shared.counters.throttled_total.increment();
                return Ok(delay.map(|delay| delay.min(LOOK)));
            }
            let mut chain = self.flight.chain();
            let Some(loaded) = self.queue.next(&self.memory, &mut chain)? else {
                self.flight.put_back(chain);
                break;
            };
            // What a request counts for the limit of bytes: its data, header and status included.
            let readable = chain.readable(&self.memory).remaining();
            let bytes = readable + chain.writable(&self.memory).remaining();
            self.shared.limiter().take(bytes);
            self.flight.begin(&mut context, chain, loaded);
        }
        Ok(None)
    }

    /// Goes on with the requests whose jobs are done. Returns true if there were any.
    fn collect(&mut self, transfers: &mut Transfers) -> bool {
        let before = transfers.in_flight();
        let mut collected = false;
        // No more than were under way: those that follow on them come after the next submission.
        for _ in 0..before {
            let Some(done) = transfers.next_done() else {
                break;
            };
            collected = true;
            self.complete(transfers, done, false);
        }
        collected
    }

    fn complete(&mut self, transfers: &mut Transfers, done: Done, stopped: bool) {
        let mut context = Context {
            memory: &self.memory,
            shared: &self.shared,
            transfers,
            stopped,
        };
        self.flight.complete(&mut context, done);
    }

    /// Gives back the chains that are done, all at once, and tells the driver if it wants to hear of it.
    fn give_back(&mut self) -> Result<(), QueueFailure> {
        if self.flight.used.is_empty() {
            return Ok(());
        }
        // A head that is no index of the queue has no entry in the used ring.
        let size = self.queue.size();
        self.flight.used.retain(|(head, _)| *head < size);
        let given = self.queue.give_back_all(&self.memory, &self.flight.used);
        self.flight.used.clear();
        given?;
        let faults = &self.shared.faults;
        self.queue.tell(&self.memory, &*self.interrupt, faults);
        Ok(())
    }

    /// Waits for all that is under way, and gives it back. Once the worker has to stop, requests in several parts end after the
    /// one that is under way.
    fn settle(&mut self, transfers: &mut Transfers, stop: &StopSignal) {
        while let Some(done) = transfers.wait() {
            self.complete(transfers, done, stop.is_stopped());
        }
        if let Err(failure) = self.give_back() {
            self.shared.faults.report(failure);
        }
        debug_assert!(self.flight.is_empty(), "a request is left behind");
    }

    fn out_of_service(&self, failure: QueueFailure) {
        let faults = &self.shared.faults;
        faults.report(failure);
        let told = self.interrupt.needs_reset();
        told.unwrap_or_else(|error| faults.report(format_args!("interrupt: {error}")));
    }
}

impl Work for BlockWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        let transfers = self.transfers.lock();
        let transfers = transfers.unwrap_or_else(PoisonError::into_inner);
        poller.watch(&*transfers, DONE)?;
        poller.watch(self.queue.notified(), NOTIFIED)
    }

    fn run(mut self, poller: &Poller) {
        let transfers = Arc::clone(&self.transfers);
        let mut transfers = transfers.lock().unwrap_or_else(PoisonError::into_inner);
        // What the driver made available before it was ready is not notified again.
        loop {
            let served = self.serve(&mut transfers, poller.stop());
            let delay = served.unwrap_or_else(|failure| {
                self.out_of_service(failure);
                None
            });
            let settle = || self.settle(&mut transfers, poller.stop());
            if !poller.wait_and_settle(delay, settle) {
                break;
            }
        }
        self.settle(&mut transfers, poller.stop());
    }
}
