//! From the tap to the guest.
//!
//! A frame is read straight into the guest's buffers. How long it will be is not known before: what does not fit goes to a buffer
//! of our own, and from there into further buffers of the guest, if it has any.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::VolatileSlice;

use super::QUEUE_SIZE;
use super::wire::{self, FRAME_BYTES, HEADER_BYTES, NUM_BUFFERS};
use super::worker::{Context, Next};
use crate::devices::virtio::queue::{Chain, QueueFailure, ServedQueue, SharedLimiter, StopSignal};
use crate::sys::vectors::{self, Vectors};

/// Header and frame at their largest.
const LARGEST: usize = HEADER_BYTES + FRAME_BYTES;

/// Frames that are received in one pass.
const FRAMES: usize = 256;

/// Frames that are thrown away at the start: no more wait in a tap (`TUN_READQ_SIZE` is 500).
const OLD_FRAMES: usize = 1024;

/// Pieces of guest memory from which on no further chain is taken: one adds at most two for each of its descriptors, and the
/// last piece of a call is our own buffer.
const PIECES: usize = vectors::MOST - 1 - 2 * QUEUE_SIZE as usize;

/// The queue of what the guest receives.
pub(super) struct Receiver<'m> {
    context: &'m Context,
    queue: ServedQueue,
    chain: Chain,
    buffers: Buffers<'m>,
    vectors: Vectors,
    spill: Box<[u8]>,
    /// A frame whose end is in `spill`.
    frame: Option<Frame>,
    /// A frame may take several chains.
    mergeable: bool,
    /// Bytes for which there should be buffers before a frame is read.
    wanted: usize,
    /// The tap may have frames.
    readable: bool,
    limiter: &'m SharedLimiter,
}

/// A frame that has been read.
struct Frame {
    /// Its length, header included.
    bytes: usize,
    /// What of it is still in the spill buffer.
    spilled: Range<usize>,
}

/// What came of trying to receive a frame.
enum Step {
    /// Go on.
    Received,
    /// The tap has no more.
    Empty,
    /// The guest has no buffers.
    Starved,
    /// The next frame has to wait for the limit.
    Throttled(Duration),
}

impl<'m> Receiver<'m> {
    pub fn new(context: &'m Context, queue: ServedQueue, limiter: &'m SharedLimiter) -> Self {
        let mergeable = context.has(VIRTIO_NET_F_MRG_RXBUF);
        let large = wire::is_large(wire::offloads_of(context.features));
        // Without mergeable buffers, or with frames of common size, the first chain should do.
        let wanted = if mergeable && large { LARGEST } else { 1 };
        Self {
            context,
            queue,
            chain: Chain::with_capacity(QUEUE_SIZE),
            buffers: Buffers::new(),
            vectors: Vectors::new(),
            spill: vec![0; LARGEST].into(),
            frame: None,
            mergeable,
            wanted,
            readable: true,
            limiter,
        }
    }

    /// Throws away what came before the driver was there: nobody says which offloads it was made for.
    pub fn forget_old_frames(&mut self, stop: &StopSignal) {
        for _ in 0..OLD_FRAMES {
            if stop.is_stopped() || self.read(true).is_err() {
                return;
            }
            self.context.counters.rx_dropped_total.increment();
        }
    }

    /// The tap has become readable.
    pub fn expect_frames(&mut self) {
        self.readable = true;
    }

    /// Receives what there is, at most [`FRAMES`].
    pub fn serve(&mut self, stop: &StopSignal) -> Result<Next, QueueFailure> {
        let context = self.context;
        self.queue.begin(&context.memory);
        let mut last = Step::Received;
        for _ in 0..FRAMES {
            if stop.is_stopped() {
                return Ok(Next::Event);
            }
            last = self.step()?;
            if !matches!(last, Step::Received) {
                break;
            }
        }
        let (interrupt, faults) = (&*context.interrupt, &*context.faults);
        match last {
            // Only now is it of interest that the driver adds buffers.
            Step::Starved => self.queue.end(&context.memory, interrupt, faults)?,
            _ => self.queue.tell(&context.memory, interrupt, faults),
        }
        Ok(match last {
            Step::Received => Next::Now,
            Step::Throttled(delay) => Next::After(delay),
            Step::Empty | Step::Starved => Next::Event,
        })
    }

    fn step(&mut self) -> Result<Step, QueueFailure> {
        if self.frame.is_none() {
            if !self.readable {
                return Ok(Step::Empty);
            }
            if let Some(delay) = self.limiter.delay() {
                self.context.counters.throttled_total.increment();
                return Ok(Step::Throttled(delay));
            }
            while self.buffers.bytes < self.wanted && self.take_chain()? {}
            if self.buffers.chains.is_empty() {
                return Ok(Step::Starved);
            }
            match self.read(false) {
                Ok(bytes) => self.frame = Some(self.frame(bytes)),
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // Such as a tap that has been removed. If frames come again, the thread hears of it.
                        self.context.faults.report(format_args!("tap: {error}"));
                    }
                    self.readable = false;
                    return Ok(Step::Empty);
                }
            }
        }
        self.finish()
    }

    fn frame(&self, bytes: usize) -> Frame {
        let room = self.room();
        Frame {
            bytes,
            spilled: 0..bytes.saturating_sub(room),
        }
    }

    /// Bytes that the guest's buffers have for the next frame.
    fn room(&self) -> usize {
        match self.buffers.chains.front() {
            Some(first) if !self.mergeable => first.bytes,
            _ => self.buffers.bytes,
        }
    }

    /// Reads a frame into the guest's buffers, or all of it into our own.
    fn read(&mut self, aside: bool) -> io::Result<usize> {
        let pieces = match self.buffers.chains.front() {
            _ if aside => 0,
            Some(first) if !self.mergeable => first.pieces,
            _ => self.buffers.slices.len(),
        };
        let slices = self.buffers.slices.iter().take(pieces);
        let tap = self.context.tap.as_fd();
        self.vectors.read(tap, slices, &mut self.spill)
    }

    /// Gives the guest the frame, once there are buffers for all of it.
    fn finish(&mut self) -> Result<Step, QueueFailure> {
        while let Some(frame) = &self.frame
            && !frame.spilled.is_empty()
        {
            if !self.mergeable || self.buffers.is_full(self.queue.size()) {
                self.frame = None;
                self.context.counters.rx_dropped_total.increment();
                return Ok(Step::Received);
            }
            if !self.take_chain()? {
                return Ok(Step::Starved);
            }
        }
        let Some(frame) = self.frame.take() else {
            return Ok(Step::Received);
        };
        self.limiter.take(frame.bytes as u64);
        let used = self.buffers.take(frame.bytes);
        self.queue.give_back_all(&self.context.memory, used)?;
        let counters = &self.context.counters;
        counters.rx_packets_total.increment();
        let bytes = frame.bytes.saturating_sub(HEADER_BYTES);
        counters.rx_bytes_total.add(bytes as u64);
        Ok(Step::Received)
    }

    /// Takes the next chain that is good for a frame; what is left of a frame goes there at once. Returns false if the driver has
    /// no more, or there are enough.
    fn take_chain(&mut self) -> Result<bool, QueueFailure> {
        let context = self.context;
        for _ in 0..self.queue.size() {
            if self.buffers.is_full(self.queue.size()) {
                return Ok(false);
            }
            let Some(loaded) = self.queue.next(&context.memory, &mut self.chain)? else {
                return Ok(false);
            };
            let added = match loaded {
                Ok(()) => self.buffers.add(context, &self.chain),
                Err(fault) => Err(fault.to_string()),
            };
            match added {
                Ok(pieces) => {
                    if let Some(frame) = &mut self.frame {
                        self.buffers
                            .fill_last(pieces, &self.spill, &mut frame.spilled);
                    }
                    return Ok(true);
                }
                Err(fault) => {
                    context.faults.report(fault);
                    let head = self.chain.head();
                    self.queue.give_back(&context.memory, head, 0)?;
                }
            }
        }
        Ok(false)
    }
}

/// Chains for the frames to come, in the order in which they are used.
struct Buffers<'m> {
    chains: VecDeque<Room>,
    slices: VecDeque<VolatileSlice<'m>>,
    bytes: usize,
    /// What the last frame took.
    used: Vec<(u16, u32)>,
}

/// A chain.
struct Room {
    head: u16,
    pieces: usize,
    bytes: usize,
}

impl<'m> Buffers<'m> {
    fn new() -> Self {
        Self {
            chains: VecDeque::with_capacity(QUEUE_SIZE.into()),
            slices: VecDeque::with_capacity(vectors::MOST),
            bytes: 0,
            used: Vec::with_capacity(QUEUE_SIZE.into()),
        }
    }

    /// Returns true if no further chain is to be added.
    fn is_full(&self, size: u16) -> bool {
        self.chains.len() >= size.into() || self.slices.len() >= PIECES
    }

    /// Adds a chain and returns the number of its pieces.
    fn add(&mut self, context: &'m Context, chain: &Chain) -> Result<usize, String> {
        let before = self.slices.len();
        let mut bytes = 0;
        for buffer in chain.writable_buffers() {
            if let Err(error) = context.add_buffer(buffer, &mut self.slices) {
                self.slices.truncate(before);
                return Err(format!("a buffer for frames: {error}"));
            }
            bytes += buffer.1 as usize;
        }
        if bytes < HEADER_BYTES {
            self.slices.truncate(before);
            return Err(format!(
                "a buffer for frames has {bytes} bytes: too few for a header"
            ));
        }
        let pieces = self.slices.len() - before;
        self.chains.push_back(Room {
            head: chain.head(),
            pieces,
            bytes,
        });
        self.bytes = self.bytes.saturating_add(bytes);
        Ok(pieces)
    }

    /// Moves what `range` of `spill` holds into the last chain, which has so many pieces.
    fn fill_last(&self, pieces: usize, spill: &[u8], range: &mut Range<usize>) {
        let first = self.slices.len().saturating_sub(pieces);
        for slice in self.slices.range(first..) {
            let end = range.end.min(range.start.saturating_add(slice.len()));
            let Some(piece) = spill.get(range.start..end) else {
                return;
            };
            slice.copy_from(piece);
            range.start = end;
        }
    }

    /// Takes the chains out that a frame of so many bytes is in: their heads, and how much of each it fills. Writes their number
    /// into the frame's header.
    fn take(&mut self, bytes: usize) -> &[(u16, u32)] {
        self.used.clear();
        let (mut left, mut pieces) = (bytes, 0);
        while let Some(chain) = self.chains.pop_front() {
            let filled = left.min(chain.bytes);
            self.used.push((chain.head, filled as u32));
            pieces += chain.pieces;
            self.bytes = self.bytes.saturating_sub(chain.bytes);
            left -= filled;
            if left == 0 {
                break;
            }
        }
        // No more than the queue has entries.
        let count = (self.used.len() as u16).to_le_bytes();
        self.write(NUM_BUFFERS, &count);
        self.slices.drain(..pieces.min(self.slices.len()));
        &self.used
    }

    /// Writes into the first buffers, at `offset` from their start.
    fn write(&self, mut offset: usize, mut data: &[u8]) {
        for slice in &self.slices {
            if data.is_empty() {
                return;
            }
            let Ok(rest) = slice.offset(offset) else {
                offset -= slice.len();
                continue;
            };
            let (now, later) = data.split_at(data.len().min(rest.len()));
            rest.copy_from(now);
            (offset, data) = (0, later);
        }
    }
}
