//! The thread that answers requests for random bytes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{
    Chain, GuestFaults, Poller, QueueFailure, ReadError, ServedQueue, SharedLimiter, StopSignal,
    Work,
};
use crate::sys::random::random_block;

/// Bytes that one request gets at most. A driver has to be content with fewer than it asked for (virtio 1.3, 5.4.6).
pub(super) const MOST: u64 = 4096;

ebb_core::metrics! {
    /// What the source of random bytes has done since the machine started.
    pub struct RngStats from pub struct RngCounters {
        /// Requests that got bytes.
        requests_total: Counter,
        /// Requests that failed, for any reason.
        errors_total: Counter,
        /// Random bytes that the guest got.
        random_bytes_total: Counter of Bytes,
        /// Times that requests had to wait for the limits.
        throttled_total: Counter,
    }
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("a request without room for random bytes")]
    NoRoom,
    #[error("random bytes: {0}")]
    Write(#[from] ReadError),
    #[error("the host has no random bytes: {0}")]
    Host(#[from] io::Error),
}

/// What is needed to answer requests.
pub(super) struct Context {
    pub memory: Arc<GuestMemoryMmap>,
    pub counters: Arc<RngCounters>,
    pub faults: Arc<GuestFaults>,
    pub limiter: SharedLimiter,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// The queue and the buffer for a chain.
pub(super) struct RngWorker {
    context: Context,
    queue: ServedQueue,
    chain: Chain,
}

impl RngWorker {
    pub fn new(context: Context, queue: ServedQueue, longest: u16) -> Self {
        Self {
            context,
            queue,
            chain: Chain::with_capacity(longest),
        }
    }

    /// Answers what is there. Returns how long the next request has to wait for the limits, if there may be one that has to.
    fn serve(&mut self, stop: &StopSignal) -> Result<Option<Duration>, QueueFailure> {
        let Self {
            context,
            queue,
            chain,
        } = self;
        queue.begin(&context.memory);
        for _ in 0..queue.size() {
            if stop.is_stopped() {
                return Ok(None);
            }
            if let Some(delay) = context.limiter.delay() {
                context.counters.throttled_total.increment();
                queue.end(&context.memory, &*context.interrupt, &context.faults)?;
                return Ok(Some(delay));
            }
            let Some(loaded) = queue.next(&context.memory, chain)? else {
                break;
            };
            let written = match loaded {
                Ok(()) => context.answer(chain),
                Err(fault) => {
                    context.counters.errors_total.increment();
                    context.faults.report(fault);
                    0
                }
            };
            context.limiter.take(written.into());
            queue.give_back(&context.memory, chain.head(), written)?;
        }
        queue.end(&context.memory, &*context.interrupt, &context.faults)?;
        Ok(None)
    }
}

impl Work for RngWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.queue.notified(), 0)
    }

    fn run(mut self, poller: &Poller) {
        // What the driver made available before it was ready is not notified again.
        loop {
            let delay = self.serve(poller.stop()).unwrap_or_else(|failure| {
                let faults = &self.context.faults;
                faults.report(failure);
                let told = self.context.interrupt.needs_reset();
                told.unwrap_or_else(|error| faults.report(format_args!("interrupt: {error}")));
                None
            });
            if !poller.wait(delay, |_| {}) {
                return;
            }
        }
    }
}

impl Context {
    /// Fills a chain. Returns the number of bytes written.
    fn answer(&self, chain: &Chain) -> u32 {
        match self.fill(chain) {
            Ok(written) => {
                self.counters.requests_total.increment();
                self.counters.random_bytes_total.add(written.into());
                written
            }
            Err(error) => {
                self.counters.errors_total.increment();
                self.faults.report(error);
                0
            }
        }
    }

    fn fill(&self, chain: &Chain) -> Result<u32, RequestError> {
        let mut buffers = chain.writable(&self.memory);
        let wanted = buffers.remaining().min(MOST);
        if wanted == 0 {
            return Err(RequestError::NoRoom);
        }
        let mut left = wanted as usize;
        while left > 0 {
            let block = random_block()?;
            let piece = block.get(..left).unwrap_or(&block);
            buffers.write_all(piece)?;
            left -= piece.len();
        }
        Ok(wanted as u32)
    }
}
