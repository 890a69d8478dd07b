//! From the guest to the tap.

use std::io;
use std::os::fd::AsFd;

use vm_memory::VolatileSlice;

use super::QUEUE_SIZE;
use super::wire::{ETHERNET_BYTES, FRAME_BYTES, HEADER_BYTES};
use super::worker::{Context, Next};
use crate::devices::virtio::queue::{
    Chain, QueueFailure, ReadError, ServedQueue, SharedLimiter, StopSignal,
};
use crate::sys::vectors::{self, Vectors};

/// A frame was not sent.
#[derive(Debug, thiserror::Error)]
enum FrameError {
    #[error("a frame to send: {0}")]
    Memory(#[from] ReadError),
    #[error("a frame of {0} bytes with its header: {min} to {max} are possible", min = HEADER_BYTES + ETHERNET_BYTES, max = HEADER_BYTES + FRAME_BYTES)]
    Length(u64),
    #[error("a frame in {0} pieces: {max} are possible", max = vectors::MOST)]
    Pieces(usize),
    #[error("the tap refuses a frame: {0}")]
    Tap(#[from] io::Error),
}

/// The queue of what the guest sends.
pub(super) struct Transmitter<'m> {
    context: &'m Context,
    queue: ServedQueue,
    chain: Chain,
    slices: Vec<VolatileSlice<'m>>,
    vectors: Vectors,
    limiter: &'m SharedLimiter,
}

impl<'m> Transmitter<'m> {
    pub fn new(context: &'m Context, queue: ServedQueue, limiter: &'m SharedLimiter) -> Self {
        Self {
            context,
            queue,
            chain: Chain::with_capacity(QUEUE_SIZE),
            slices: Vec::with_capacity(vectors::MOST),
            vectors: Vectors::new(),
            limiter,
        }
    }

    /// Sends what there is, at most as many frames as the queue has entries.
    pub fn serve(&mut self, stop: &StopSignal) -> Result<Next, QueueFailure> {
        let context = self.context;
        self.queue.begin(&context.memory);
        for _ in 0..self.queue.size() {
            if stop.is_stopped() {
                return Ok(Next::Event);
            }
            if let Some(delay) = self.limiter.delay() {
                context.counters.throttled_total.increment();
                // Until then new frames are of no interest.
                self.queue
                    .tell(&context.memory, &*context.interrupt, &context.faults);
                return Ok(Next::After(delay));
            }
            let Some(loaded) = self.queue.next(&context.memory, &mut self.chain)? else {
                break;
            };
            match loaded {
                Ok(()) => self.send(),
                Err(fault) => {
                    context.counters.tx_dropped_total.increment();
                    context.faults.report(fault);
                }
            }
            self.queue
                .give_back(&context.memory, self.chain.head(), 0)?;
        }
        self.queue
            .end(&context.memory, &*context.interrupt, &context.faults)?;
        Ok(Next::Event)
    }

    fn send(&mut self) {
        let counters = &self.context.counters;
        match self.try_send() {
            Ok(bytes) => {
                self.limiter.take(bytes as u64);
                counters.tx_packets_total.increment();
                counters.tx_bytes_total.add((bytes - HEADER_BYTES) as u64);
            }
            Err(error) => {
                counters.tx_dropped_total.increment();
                // Otherwise it is the host that does not take it now, such as an interface that is down (EIO).
                let by_guest = match &error {
                    FrameError::Tap(error) => error.raw_os_error() == Some(libc::EINVAL),
                    _ => true,
                };
                if by_guest {
                    self.context.faults.report(error);
                }
            }
        }
    }

    fn try_send(&mut self) -> Result<usize, FrameError> {
        self.slices.clear();
        let mut bytes = 0;
        for buffer in self.chain.readable_buffers() {
            bytes += u64::from(buffer.1);
            self.context.add_buffer(buffer, &mut self.slices)?;
        }
        let possible = (HEADER_BYTES + ETHERNET_BYTES)..=(HEADER_BYTES + FRAME_BYTES);
        let is_possible = |bytes: &usize| possible.contains(bytes);
        let Some(bytes) = usize::try_from(bytes).ok().filter(is_possible) else {
            return Err(FrameError::Length(bytes));
        };
        if self.slices.len() > vectors::MOST {
            return Err(FrameError::Pieces(self.slices.len()));
        }
        let tap = self.context.tap.as_fd();
        self.vectors.write(tap, self.slices.iter())?;
        Ok(bytes)
    }
}
