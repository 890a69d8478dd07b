//! The requests of one queue that are under way.

use std::io;
use std::mem;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::handle::Shared;
use super::request::{Request, RequestError};
use super::wire::{Operation, STATUS_IOERR, STATUS_OK};
use crate::devices::virtio::queue::{Chain, ChainFault, ReadError};
use crate::sys::transfer::{Action, Done, Job, Pieces, Transfers};

/// The most bytes of a request that are moved at a time: a stop waits for them.
const CHUNK: usize = 1 << 20;

/// The most bytes that are moved at a time where memory does not suit direct I/O.
const BOUNCE: usize = 128 << 10;

/// Where such memory is copied to begins at a multiple of this many bytes.
const BOUNCE_ALIGN: usize = 4096;

/// A request that is under way.
struct Entry {
    chain: Chain,
    request: Request,
    /// Requests are numbered as they come.
    number: u64,
    /// A flush that waits for requests before it.
    waits: bool,
}

/// The requests that are under way, at most as many as the queue has entries.
pub(super) struct Flight {
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    waiting: usize,
    next_number: u64,
    /// Kept so that requests allocate nothing.
    chains: Vec<Chain>,
    pieces: Vec<Pieces>,
    bounce: Vec<u8>,
    /// Chains that are done, and how many bytes of each were written.
    pub used: Vec<(u16, u32)>,
}

/// What a request needs on its way.
pub(super) struct Context<'a> {
    pub memory: &'a Arc<GuestMemoryMmap>,
    pub shared: &'a Shared,
    pub transfers: &'a mut Transfers,
    /// What is in several parts ends after the one that is under way.
    pub stopped: bool,
}

impl Flight {
    /// Room for `depth` requests.
    pub fn new(depth: u16) -> Self {
        Self {
            entries: (0..depth).map(|_| None).collect(),
            free: (0..depth.into()).rev().collect(),
            waiting: 0,
            next_number: 0,
            chains: Vec::new(),
            pieces: Vec::new(),
            bounce: Vec::new(),
            used: Vec::with_capacity(depth.into()),
        }
    }

    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }

    /// A chain to load the next request into.
    pub fn chain(&mut self) -> Chain {
        self.chains.pop().unwrap_or_default()
    }

    /// Puts a chain back that nothing was loaded into.
    pub fn put_back(&mut self, chain: Chain) {
        self.chains.push(chain);
    }

    /// Takes on the request in `chain`. There must be room.
    pub fn begin(
        &mut self,
        context: &mut Context<'_>,
        chain: Chain,
        fault: Result<(), ChainFault>,
    ) {
        let shared = context.shared;
        if let Err(fault) = fault {
            shared.faults.report(fault);
            return self.refuse(context, chain);
        }
        let disk = shared.disk();
        let parsed = Request::parse(&disk, shared.discards, &chain, context.memory);
        let (request, index) = match (parsed, self.free.pop()) {
            (Ok(request), Some(index)) => (request, index),
            (Err(error), index) => {
                self.free.extend(index);
                return self.fail(context, chain, error);
            }
            // Never: there is room.
            (Ok(_), None) => return self.refuse(context, chain),
        };
        let number = self.next_number;
        self.next_number += 1;
        let waits = request.operation == Operation::Flush && self.is_changing_before(number);
        self.waiting += usize::from(waits);
        self.entries[index as usize] = Some(Entry {
            chain,
            request,
            number,
            waits,
        });
        if !waits {
            self.advance(context, index);
        }
    }

    /// Goes on with the request whose job is done.
    pub fn complete(&mut self, context: &mut Context<'_>, (job, result): Done) {
        let (index, changed) = (job.token, job.action);
        let mut pieces = job.pieces;
        pieces.clear();
        self.pieces.push(pieces);
        if let Err(error) = self.moved(context, index, result) {
            self.end(context, index, Err(error));
        } else {
            self.advance(context, index);
        }
        if self.waiting > 0 && changed != Action::Read {
            self.wake_flushes(context);
        }
    }

    /// Returns true if a request before `number` that changes the disk is under way.
    fn is_changing_before(&self, number: u64) -> bool {
        let changes = |it: &Entry| it.request.operation.modifies() && it.number < number;
        self.entries.iter().flatten().any(changes)
    }

    fn wake_flushes(&mut self, context: &mut Context<'_>) {
        for index in 0..self.entries.len() {
            let waits = self.entries[index].as_ref().filter(|it| it.waits);
            if waits.is_some_and(|it| !self.is_changing_before(it.number)) {
                if let Some(entry) = &mut self.entries[index] {
                    entry.waits = false;
                }
                self.waiting -= 1;
                self.advance(context, index as u32);
            }
        }
    }

    /// Takes note of what a job has done.
    fn moved(
        &mut self,
        context: &Context<'_>,
        index: u32,
        result: io::Result<usize>,
    ) -> Result<(), RequestError> {
        let Some(entry) = &mut self.entries[index as usize] else {
            return Ok(());
        };
        let request = &mut entry.request;
        let is_data = matches!(request.action, Action::Read | Action::Write);
        match result {
            Ok(0) if is_data => {
                let error = match request.action {
                    Action::Read => io::ErrorKind::UnexpectedEof,
                    _ => io::ErrorKind::WriteZero,
                };
                return Err(request.failed(error.into()));
            }
            Ok(moved) if is_data => request.done += moved as u64,
            Ok(_) => request.done = request.bytes,
            Err(error) if is_unsupported(&error) && request.degrade() => {}
            // To free is a wish (virtio 1.3, 5.2.6.2).
            Err(error) if is_unsupported(&error) && request.operation == Operation::Discard => {
                request.done = request.bytes;
            }
            Err(error) => return Err(request.failed(error)),
        }
        if request.done < request.bytes && context.stopped {
            return Err(RequestError::Stopped);
        }
        Ok(())
    }

    /// Begins the next job of a request, or ends the request if there is none.
    fn advance(&mut self, context: &mut Context<'_>, index: u32) {
        if let Err(error) = self.try_advance(context, index) {
            self.end(context, index, Err(error));
        }
    }

    fn try_advance(&mut self, context: &mut Context<'_>, index: u32) -> Result<(), RequestError> {
        let Some(entry) = &mut self.entries[index as usize] else {
            return Ok(());
        };
        let request = &mut entry.request;
        let is_flush = request.operation == Operation::Flush && !request.disk.is_readonly();
        // A flush is done once it was made, everything else when all bytes are.
        if request.done == request.bytes && (!is_flush || request.started) {
            self.end(context, index, Ok(()));
            return Ok(());
        }
        request.started = true;
        let mut pieces = self.pieces.pop().unwrap_or_default();
        if request.writes_zeroes() {
            let left = usize::try_from(request.bytes - request.done).unwrap_or(usize::MAX);
            pieces.become_zeroes(left);
        } else if matches!(request.action, Action::Read | Action::Write) {
            let loaded = load(&mut pieces, &entry.chain, request, context.memory);
            loaded.map_err(|error| request.misplaced(error))?;
            let direct = request.disk.direct();
            if direct.is_some_and(|it| !pieces.is_aligned(it.memory, it.file as usize)) {
                self.pieces.push(pieces);
                return self.bounce(context, index);
            }
        }
        let job = Job {
            token: index,
            file: Arc::clone(request.disk.file()),
            action: request.action,
            at: request.at + request.done,
            pieces,
        };
        // There is room for as many jobs as requests.
        context
            .transfers
            .start(job)
            .map_err(|_| request.failed(io::ErrorKind::WouldBlock.into()))
    }

    /// Moves all that is left of a request by way of a buffer that suits direct I/O, on this thread: drivers hardly ever ask
    /// for it.
    fn bounce(&mut self, context: &mut Context<'_>, index: u32) -> Result<(), RequestError> {
        let mut bounce = mem::take(&mut self.bounce);
        bounce.resize(BOUNCE + BOUNCE_ALIGN, 0);
        let start = bounce.as_ptr().align_offset(BOUNCE_ALIGN);
        let moved = match &mut self.entries[index as usize] {
            Some(entry) => entry.bounce(context, &mut bounce[start..start + BOUNCE]),
            None => Ok(()),
        };
        self.bounce = bounce;
        moved?;
        self.end(context, index, Ok(()));
        Ok(())
    }

    /// Ends a request: writes its status, and notes what was written of its buffers.
    fn end(&mut self, context: &Context<'_>, index: u32, result: Result<(), RequestError>) {
        let Some(entry) = self.entries[index as usize].take() else {
            return;
        };
        self.free.push(index);
        let Entry { chain, request, .. } = entry;
        if let Err(error) = result {
            return self.fail(context, chain, error);
        }
        let written = match succeed(context, &chain, &request) {
            Ok(written) => written,
            Err(error) => return self.fail(context, chain, request.misplaced(error)),
        };
        let room = chain.writable(context.memory).remaining().saturating_sub(1);
        let told = write_status(context, &chain, STATUS_OK);
        // The status counts only if everything before it was written.
        let written = written.saturating_add(u64::from(written == room));
        let written = if told { written } else { 0 };
        self.give_back(chain, u32::try_from(written).unwrap_or(u32::MAX));
    }

    fn fail(&mut self, context: &Context<'_>, chain: Chain, error: RequestError) {
        let shared = context.shared;
        shared.counters.errors_total.increment();
        let room = chain.writable(context.memory).remaining().saturating_sub(1);
        let told = write_status(context, &chain, error.status());
        shared.faults.report(error);
        self.give_back(chain, u32::from(told && room == 0));
    }

    /// Reports an error for a request that could not be parsed, if its status byte can be found.
    fn refuse(&mut self, context: &Context<'_>, chain: Chain) {
        context.shared.counters.errors_total.increment();
        write_status(context, &chain, STATUS_IOERR);
        self.give_back(chain, 0);
    }

    fn give_back(&mut self, chain: Chain, written: u32) {
        self.used.push((chain.head(), written));
        self.chains.push(chain);
    }
}

impl Entry {
    fn bounce(&mut self, context: &Context<'_>, buffer: &mut [u8]) -> Result<(), RequestError> {
        let request = &mut self.request;
        while request.done < request.bytes {
            let left = usize::try_from(request.bytes - request.done).unwrap_or(usize::MAX);
            let len = left.min(buffer.len());
            let (part, at) = (&mut buffer[..len], request.at + request.done);
            let mut data = request.data(&self.chain, context.memory);
            if request.action == Action::Read {
                let read = request.disk.file().read_exact_at(part, at);
                read.map_err(|error| request.failed(error))?;
                data.write_all(part)
            } else {
                let read = data.read_exact(part);
                let file = request.disk.file();
                let written = read.is_ok().then(|| file.write_all_at(part, at));
                written.transpose().map_err(|error| request.failed(error))?;
                read
            }
            .map_err(|error| request.misplaced(error))?;
            request.done += len as u64;
        }
        Ok(())
    }
}

/// Fills `pieces` with the next part of a request's data.
fn load(
    pieces: &mut Pieces,
    chain: &Chain,
    request: &Request,
    memory: &Arc<GuestMemoryMmap>,
) -> Result<(), ReadError> {
    pieces.begin(memory);
    let mut data = request.data(chain, memory);
    while pieces.bytes() < CHUNK
        && let Some((addr, len)) = data.take_piece(CHUNK - pieces.bytes())
    {
        let pushed = pieces.push(addr, len);
        pushed.map_err(|_| ReadError::NotMemory { addr, len })?;
    }
    Ok(())
}

/// Counts a request that has succeeded, and answers it. Returns the number of bytes of its buffers that were written.
fn succeed(context: &Context<'_>, chain: &Chain, request: &Request) -> Result<u64, ReadError> {
    let counters = &context.shared.counters;
    match request.operation {
        Operation::Read(_) => {
            counters.reads_total.increment();
            counters.read_bytes_total.add(request.bytes);
            return Ok(request.bytes);
        }
        Operation::Write(_) => {
            counters.writes_total.increment();
            counters.written_bytes_total.add(request.bytes);
        }
        Operation::Flush => counters.flushes_total.increment(),
        Operation::Discard => counters.discarded_bytes_total.add(request.bytes),
        Operation::WriteZeroes => counters.zeroed_bytes_total.add(request.bytes),
        Operation::Id => {
            let mut answer = chain.writable(context.memory);
            let _ = answer.split_tail(1);
            let serial = request.disk.serial();
            let room = usize::try_from(answer.remaining()).unwrap_or(usize::MAX);
            let id = serial.get(..room).unwrap_or(&serial);
            answer.write_all(id)?;
            return Ok(id.len() as u64);
        }
        Operation::Unknown(_) => {}
    }
    Ok(0)
}

/// Writes the last byte of a request's buffers. Returns false if there is none, or it is not memory.
fn write_status(context: &Context<'_>, chain: &Chain, value: u8) -> bool {
    let Some(mut status) = chain.writable(context.memory).split_tail(1) else {
        return false;
    };
    let written = status.write_all(&[value]);
    if let Err(error) = &written {
        context
            .shared
            .faults
            .report(format_args!("status: {error}"));
    }
    written.is_ok()
}

/// The host's file system, or its kernel, cannot do it.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}
