//! The balloon's thread: one for all queues, so that an inflate and a deflate never overtake each other.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::handle::Shared;
use super::wire::{ARRAY_PFNS, Batch, PFN_BYTES, STATISTICS_BYTES, Statistics};
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{
    Chain, ChainFault, GuestFaults, Poller, QueueFailure, ServedQueue, StopSignal, Work,
};
use crate::guest_memory::RangeSink;

/// Maximum number of pages that are given to the sink in one call: 32 full messages of Linux, 32 MiB.
const BATCH_PFNS: usize = 32 * ARRAY_PFNS;

/// The poller's tokens of what may wake the worker.
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATISTICS: u32 = 2;
const INTERVAL: u32 = 3;

/// What has woken the worker since it last looked.
#[derive(Default)]
struct Woken {
    inflate: bool,
    deflate: bool,
    statistics: bool,
    /// Somebody changed the interval of the statistics.
    interval: bool,
}

impl Woken {
    /// For the first pass: what the driver made available before it was ready is not notified again.
    const ALL: Self = Self {
        inflate: true,
        deflate: true,
        statistics: true,
        interval: true,
    };

    fn note(&mut self, token: u32) {
        match token {
            INFLATE => self.inflate = true,
            DEFLATE => self.deflate = true,
            STATISTICS => self.statistics = true,
            INTERVAL => self.interval = true,
            _ => {}
        }
    }
}

/// The sink's method that a queue's pages go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinkCall {
    /// For pages that were inflated by a driver that tells before it uses them again.
    LazyFree,
    /// For pages that were inflated by a driver that does not.
    Discard,
    /// For pages that were deflated.
    Reuse,
}

/// What every queue of the balloon needs to be served.
#[derive(Clone)]
pub(super) struct Context {
    pub memory: Arc<GuestMemoryMmap>,
    pub shared: Arc<Shared>,
    pub sink: Arc<dyn RangeSink>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

impl Context {
    pub fn faults(&self) -> &GuestFaults {
        &self.shared.faults
    }

    /// Takes the device out of service if one of its queues failed.
    pub fn settle(&self, result: Result<(), QueueFailure>) {
        if let Err(failure) = result {
            self.faults().report(failure);
            let told = self.interrupt.needs_reset();
            told.unwrap_or_else(|error| self.faults().report(format_args!("interrupt: {error}")));
        }
    }
}

/// The queues and the buffers, all allocated at activation.
pub(super) struct BalloonWorker {
    context: Context,
    inflate: PageQueue,
    deflate: PageQueue,
    statistics: Option<StatisticsQueue>,
    buffers: Buffers,
}

/// The message that is being read, and the pages that were read so far.
struct Buffers {
    chain: Chain,
    batch: Batch,
}

impl BalloonWorker {
    /// Takes over the queues; `must_tell_host` is what the driver negotiated.
    pub fn new(
        context: Context,
        must_tell_host: bool,
        [inflate, deflate]: [ServedQueue; 2],
        statistics: Option<ServedQueue>,
    ) -> Self {
        let longest = inflate.size().max(deflate.size());
        let inflated = if must_tell_host {
            SinkCall::LazyFree
        } else {
            SinkCall::Discard
        };
        Self {
            context,
            inflate: PageQueue::new("inflate", inflate, inflated),
            deflate: PageQueue::new("deflate", deflate, SinkCall::Reuse),
            statistics: statistics.map(StatisticsQueue::new),
            buffers: Buffers {
                chain: Chain::with_capacity(longest),
                batch: Batch::with_capacity(BATCH_PFNS),
            },
        }
    }

    fn next_deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.context.shared.interval().max(1).into())
    }

    fn serve(&mut self, woken: &Woken, stop: &StopSignal, deadline: &mut Option<Instant>) {
        // Inflate first: a page that is in both queues at once ends in use, and the guest may write to it.
        let queues = [
            (woken.inflate, &mut self.inflate),
            (woken.deflate, &mut self.deflate),
        ];
        for (woken, queue) in queues {
            if woken {
                let served = queue.serve(&self.context, &mut self.buffers, stop);
                self.context.settle(served);
            }
        }
        if woken.interval && deadline.is_some() {
            // It does not matter if there is nothing to read.
            let _ = self.context.shared.wake.read();
            *deadline = Some(self.next_deadline());
        }
        let due = deadline.is_some_and(|at| at <= Instant::now());
        if due {
            *deadline = Some(self.next_deadline());
        }
        if let Some(queue) = &mut self.statistics
            && (woken.statistics || due)
        {
            let served = queue.serve(&self.context, &mut self.buffers.chain, due);
            self.context.settle(served);
        }
    }
}

impl Work for BalloonWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.inflate.queue.notified(), INFLATE)?;
        poller.watch(self.deflate.queue.notified(), DEFLATE)?;
        if let Some(statistics) = &self.statistics {
            poller.watch(statistics.queue.notified(), STATISTICS)?;
            poller.watch(&self.context.shared.wake, INTERVAL)?;
        }
        Ok(())
    }

    fn run(mut self, poller: &Poller) {
        let mut deadline = self.statistics.is_some().then(|| self.next_deadline());
        let mut woken = Woken::ALL;
        while !poller.stop().is_stopped() {
            self.serve(&woken, poller.stop(), &mut deadline);
            let rest = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            woken = Woken::default();
            if !poller.wait(rest, |token| woken.note(token)) {
                return;
            }
        }
    }
}

/// The inflate queue or the deflate queue.
struct PageQueue {
    name: &'static str,
    queue: ServedQueue,
    call: SinkCall,
    /// Chains that are returned when the sink has their pages.
    heads: Vec<u16>,
}

impl PageQueue {
    fn new(name: &'static str, queue: ServedQueue, call: SinkCall) -> Self {
        let heads = Vec::with_capacity(queue.size().into());
        Self {
            name,
            queue,
            call,
            heads,
        }
    }

    /// Reads all messages in the queue, gives their pages to the sink, and only then returns the messages.
    fn serve(
        &mut self,
        context: &Context,
        buffers: &mut Buffers,
        stop: &StopSignal,
    ) -> Result<(), QueueFailure> {
        self.queue.begin(&context.memory);
        let mut outcome = Ok(());
        while self.heads.len() < usize::from(self.queue.size()) {
            match self.queue.next(&context.memory, &mut buffers.chain) {
                Ok(None) => break,
                Ok(Some(loaded)) => self.collect(context, loaded, buffers, stop),
                Err(failure) => {
                    outcome = Err(failure);
                    break;
                }
            }
            self.heads.push(buffers.chain.head());
        }
        if stop.is_stopped() {
            // The reset gives all pages back; no more messages are acknowledged.
            return outcome;
        }
        self.hand_over(context, &mut buffers.batch);
        for head in self.heads.drain(..) {
            outcome = outcome.and(self.queue.give_back(&context.memory, head, 0));
        }
        let interrupt = &*context.interrupt;
        outcome.and(self.queue.end(&context.memory, interrupt, context.faults()))
    }

    /// Adds the pages of one message to the batch, which is given to the sink whenever it is full. Arrays of any length are
    /// read: drivers other than Linux's send more than 256 numbers, and if only a part of a deflate were read, the guest
    /// would lose data that it writes to the other pages, because the host still regards them as free.
    fn collect(
        &self,
        context: &Context,
        loaded: Result<(), ChainFault>,
        Buffers { chain, batch }: &mut Buffers,
        stop: &StopSignal,
    ) {
        let (faults, name) = (context.faults(), self.name);
        let mut array = chain.readable(&context.memory);
        let bytes = array.remaining();
        if let Err(fault) = loaded {
            faults.report(fault);
            if self.call != SinkCall::Reuse {
                return;
            }
        } else if bytes == 0 {
            faults.report(format_args!("{name}: a message without page numbers"));
        } else if bytes > (ARRAY_PFNS * PFN_BYTES) as u64 {
            faults.report(format_args!("{name}: {bytes} bytes in one message"));
        } else if !bytes.is_multiple_of(PFN_BYTES as u64) {
            faults.report(format_args!(
                "{name}: {bytes} bytes are no whole page numbers"
            ));
        }
        let mut part = [0; ARRAY_PFNS * PFN_BYTES];
        while !stop.is_stopped() {
            if batch.room() < ARRAY_PFNS {
                self.hand_over(context, batch);
            }
            match array.read(&mut part) {
                Ok(0) => return,
                Ok(count) => batch.push(part.get(..count).unwrap_or_default()),
                Err(error) => return faults.report(format_args!("{name}: {error}")),
            }
        }
    }

    fn hand_over(&self, context: &Context, batch: &mut Batch) {
        if batch.is_empty() {
            return;
        }
        let (ranges, refused) = batch.merge(|range| context.sink.is_ram(range));
        if refused > 0 {
            let (faults, name) = (context.faults(), self.name);
            faults.report(format_args!("{name}: {refused} pages are not RAM"));
        }
        if ranges.is_empty() {
            return;
        }
        match self.call {
            SinkCall::LazyFree => context.sink.lazy_free(ranges),
            SinkCall::Discard => context.sink.discard(ranges),
            SinkCall::Reuse => context.sink.reuse(ranges),
        }
    }
}

/// The statistics queue: the device keeps the driver's buffer, and returns it to request new statistics.
struct StatisticsQueue {
    queue: ServedQueue,
    held: Option<u16>,
}

impl StatisticsQueue {
    const fn new(queue: ServedQueue) -> Self {
        Self { queue, held: None }
    }

    fn serve(
        &mut self,
        context: &Context,
        chain: &mut Chain,
        due: bool,
    ) -> Result<(), QueueFailure> {
        self.queue.begin(&context.memory);
        if due && let Some(head) = self.held.take() {
            self.queue.give_back(&context.memory, head, 0)?;
        }
        for _ in 0..self.queue.size() {
            let Some(loaded) = self.queue.next(&context.memory, chain)? else {
                break;
            };
            match loaded {
                Ok(()) => Self::read(context, chain),
                Err(fault) => context.faults().report(fault),
            }
            if let Some(surplus) = self.held.replace(chain.head()) {
                context
                    .faults()
                    .report("more than one statistics buffer at a time");
                self.queue.give_back(&context.memory, surplus, 0)?;
            }
        }
        let interrupt = &*context.interrupt;
        self.queue.end(&context.memory, interrupt, context.faults())
    }

    fn read(context: &Context, chain: &Chain) {
        let mut raw = [0; STATISTICS_BYTES];
        let mut buffer = chain.readable(&context.memory);
        let bytes = buffer.remaining();
        if bytes == 0 || bytes > raw.len() as u64 {
            context
                .faults()
                .report(format_args!("a statistics buffer of {bytes} bytes"));
        }
        match buffer.read(&mut raw) {
            Ok(count) => {
                let mut statistics = Statistics::default();
                statistics.update(raw.get(..count).unwrap_or_default());
                context.shared.set_statistics(statistics);
            }
            Err(error) => context.faults().report(format_args!("statistics: {error}")),
        }
    }
}
