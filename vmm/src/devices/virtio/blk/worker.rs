//! The disk's thread: executes requests one after the other.

use std::io::{self, Seek, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::Disk;
use super::wire::{
    HEADER_BYTES, ID_BYTES, Operation, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, position,
};
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{
    Chain, Cursor, GuestFaults, Limiter, Poller, QueueFailure, ReadError, ServedQueue, StopSignal,
    Work,
};

/// Bytes that are moved between two checks of the stop signal.
const CHUNK: usize = 1 << 20;

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
    }
}

/// A request failed.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("request header: {0}")]
    Header(ReadError),
    #[error("request type {0} was not offered")]
    Unknown(u32),
    #[error("{bytes} bytes at sector {sector}: no whole sectors of a disk of {sectors}")]
    Bounds {
        sector: u64,
        bytes: u64,
        sectors: u64,
    },
    #[error("write to a read-only disk at sector {0}")]
    ReadOnly(u64),
    #[error("{operation:?}: {error}")]
    Data {
        operation: Operation,
        error: ReadError,
    },
    #[error("the host failed to flush: {0}")]
    Flush(io::Error),
    #[error("stopped in the middle of a request")]
    Stopped,
}

impl RequestError {
    const fn status(&self) -> u8 {
        match self {
            Self::Unknown(_) => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// What is needed to execute requests.
pub(super) struct Context {
    pub memory: Arc<GuestMemoryMmap>,
    pub disk: Arc<Disk>,
    pub id: [u8; ID_BYTES],
    pub counters: Arc<DiskCounters>,
    pub faults: Arc<GuestFaults>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// The queue and the buffer for a chain.
pub(super) struct BlockWorker {
    context: Context,
    queue: ServedQueue,
    chain: Chain,
    /// Locked for as long as the thread works: a reset does not fill it up.
    limiter: Arc<Mutex<Limiter>>,
}

impl BlockWorker {
    pub fn new(
        context: Context,
        queue: ServedQueue,
        longest: u16,
        limiter: Arc<Mutex<Limiter>>,
    ) -> Self {
        Self {
            context,
            queue,
            chain: Chain::with_capacity(longest),
            limiter,
        }
    }

    /// Executes what there is. Returns how long the next request has to wait for the limits, if there may be one that has to.
    fn serve(
        &mut self,
        stop: &StopSignal,
        limiter: &mut Limiter,
    ) -> Result<Option<Duration>, QueueFailure> {
        let Self {
            context,
            queue,
            chain,
            ..
        } = self;
        queue.begin(&context.memory);
        for _ in 0..queue.size() {
            if stop.is_stopped() {
                return Ok(None);
            }
            if let Some(delay) = limiter.delay() {
                context.counters.throttled_total.increment();
                // Until then new requests are of no interest.
                queue.tell(&context.memory, &*context.interrupt, &context.faults);
                return Ok(Some(delay));
            }
            let Some(loaded) = queue.next(&context.memory, chain)? else {
                break;
            };
            let written = match loaded {
                Ok(()) => context.answer(chain, stop),
                Err(fault) => {
                    context.faults.report(fault);
                    context.refuse(chain)
                }
            };
            limiter.take(context.bytes(chain));
            queue.give_back(&context.memory, chain.head(), written)?;
        }
        queue.end(&context.memory, &*context.interrupt, &context.faults)?;
        Ok(None)
    }
}

impl Work for BlockWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.queue.notified(), 0)
    }

    fn run(mut self, poller: &Poller) {
        // What the driver made available before it was ready is not notified again.
        let limiter = Arc::clone(&self.limiter);
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let served = self.serve(poller.stop(), &mut limiter);
            let delay = served.unwrap_or_else(|failure| {
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
    /// What a request counts for the limit of bytes: its data, header and status included.
    fn bytes(&self, chain: &Chain) -> u64 {
        chain.readable(&self.memory).remaining() + chain.writable(&self.memory).remaining()
    }

    /// Executes a request and writes its status. Returns the number of contiguous bytes written from the start of its buffers.
    fn answer(&self, chain: &Chain, stop: &StopSignal) -> u32 {
        let mut answer = chain.writable(&self.memory);
        let Some(mut status) = answer.split_tail(1) else {
            self.counters.errors_total.increment();
            self.faults.report("a request without room for its status");
            return 0;
        };
        let data_bytes = answer.remaining();
        let (value, data_written) = match self.execute(chain, answer, stop) {
            Ok(written) => (STATUS_OK, written),
            Err(error) => {
                self.counters.errors_total.increment();
                let value = error.status();
                self.faults.report(error);
                (value, 0)
            }
        };
        if let Err(error) = status.write_all(&[value]) {
            self.faults.report(format_args!("status: {error}"));
            return 0;
        }
        // The status counts only if everything before it was written.
        let written = data_written.saturating_add(u64::from(data_written == data_bytes));
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Reports an error for a request that could not be parsed, if its status byte can be found.
    fn refuse(&self, chain: &Chain) -> u32 {
        self.counters.errors_total.increment();
        if let Some(mut status) = chain.writable(&self.memory).split_tail(1) {
            let written = status.write_all(&[STATUS_IOERR]);
            written.unwrap_or_else(|error| self.faults.report(format_args!("status: {error}")));
        }
        0
    }

    /// Executes a request. Returns the number of bytes of `answer` that were written.
    fn execute(
        &self,
        chain: &Chain,
        mut answer: Cursor<'_>,
        stop: &StopSignal,
    ) -> Result<u64, RequestError> {
        let mut request = chain.readable(&self.memory);
        let mut header = [0; HEADER_BYTES];
        request
            .read_exact(&mut header)
            .map_err(RequestError::Header)?;
        let operation = Operation::parse(header);
        let failed = |error| RequestError::Data { operation, error };
        match operation {
            Operation::Read(sector) => {
                let bytes = answer.remaining();
                let mut file = self.seek(operation, sector, bytes)?;
                transfer(stop, || answer.fill_from(&mut file, CHUNK).map_err(failed))?;
                self.counters.reads_total.increment();
                self.counters.read_bytes_total.add(bytes);
                Ok(bytes)
            }
            Operation::Write(sector) if self.disk.is_readonly() => {
                Err(RequestError::ReadOnly(sector))
            }
            Operation::Write(sector) => {
                let bytes = request.remaining();
                let mut file = self.seek(operation, sector, bytes)?;
                transfer(stop, || {
                    request.drain_into(&mut file, CHUNK).map_err(failed)
                })?;
                self.counters.writes_total.increment();
                self.counters.written_bytes_total.add(bytes);
                Ok(0)
            }
            Operation::Flush => {
                if !self.disk.is_readonly() {
                    self.disk.file().sync_data().map_err(RequestError::Flush)?;
                }
                self.counters.flushes_total.increment();
                Ok(0)
            }
            Operation::Id => {
                let room = usize::try_from(answer.remaining()).unwrap_or(usize::MAX);
                let id = self.id.get(..room).unwrap_or(&self.id);
                answer.write_all(id).map_err(failed)?;
                Ok(id.len() as u64)
            }
            Operation::Unknown(number) => Err(RequestError::Unknown(number)),
        }
    }

    /// The file, positioned at `sector`, where `bytes` are to be moved. Only this thread changes the position.
    fn seek(
        &self,
        operation: Operation,
        sector: u64,
        bytes: u64,
    ) -> Result<&std::fs::File, RequestError> {
        let sectors = self.disk.sectors();
        let at = position(sector, bytes, sectors).ok_or(RequestError::Bounds {
            sector,
            bytes,
            sectors,
        })?;
        let mut file = self.disk.file();
        file.seek(SeekFrom::Start(at))
            .map_err(|error| RequestError::Data {
                operation,
                error: ReadError::Host(error),
            })?;
        Ok(file)
    }
}

/// Moves piece after piece until nothing is left.
fn transfer(
    stop: &StopSignal,
    mut piece: impl FnMut() -> Result<usize, RequestError>,
) -> Result<(), RequestError> {
    while piece()? > 0 {
        if stop.is_stopped() {
            return Err(RequestError::Stopped);
        }
    }
    Ok(())
}
