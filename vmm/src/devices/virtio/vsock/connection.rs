//! One connection: a client's or a server's unix socket on the host, and a port in the guest.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::flow::{Incoming, Outgoing};
use super::greeting::{Greeted, Greeting};
use super::wire::{Header, Op, shutdown};
use crate::devices::virtio::queue::{Cursor, ReadError};

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Port of the host.
    pub host: u32,
    /// Port of the guest.
    pub guest: u32,
}

/// How far it is.
enum Stage {
    /// A client of the host has yet to say which port it wants.
    Greeting(Greeting),
    /// The guest has to be asked, if it was not, and has to answer by this time.
    Asking { is_asked: bool, until: Instant },
    /// A client of the guest has yet to hear that it is connected.
    Accepted,
    /// Bytes may flow.
    Open,
}

/// A packet of the guest breaks the rules: the connection is reset.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// Not at this time.
    #[error("a packet {0:?} at a wrong time")]
    Untimely(Op),
    /// There is no room.
    #[error("{0} bytes, for which it was given no credit")]
    Credit(u32),
    /// Its bytes are not there.
    #[error(transparent)]
    Memory(#[from] ReadError),
}

/// What the guest is to hear next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Data,
    Say(Op),
}

/// A connection.
pub struct Connection {
    /// Its ends, once both are known.
    pub ends: Option<Ends>,
    /// It waits for its turn to send the guest a packet.
    pub is_queued: bool,
    /// None: it is closed.
    stream: Option<UnixStream>,
    stage: Stage,
    outgoing: Outgoing,
    incoming: Incoming,
    /// Bytes of the guest that the stream did not take yet; never more than there is room.
    buffer: VecDeque<u8>,
    /// The stream may have bytes, or room.
    readable: bool,
    writable: bool,
    /// What the stream's other side will not do any more, and what the guest knows of it: bits of [`shutdown`].
    client_done: u32,
    told_done: u32,
    /// What the guest will not do any more.
    guest_done: u32,
    /// What of `guest_done` the stream's other side has been told.
    passed_done: u32,
    /// The guest wants to know its credit.
    is_credit_wanted: bool,
    /// The guest was asked for its credit, and has not said anything since.
    has_asked_credit: bool,
}

impl Connection {
    fn new(stream: UnixStream, room: u32, stage: Stage) -> Self {
        Self {
            ends: None,
            is_queued: false,
            stream: Some(stream),
            stage,
            outgoing: Outgoing::default(),
            incoming: Incoming::new(room),
            buffer: VecDeque::new(),
            readable: true,
            writable: true,
            client_done: 0,
            told_done: 0,
            guest_done: 0,
            passed_done: 0,
            is_credit_wanted: false,
            has_asked_credit: false,
        }
    }

    /// A client of the host has connected.
    pub fn of_client(stream: UnixStream, room: u32) -> Self {
        Self::new(stream, room, Stage::Greeting(Greeting::default()))
    }

    /// The guest's `request` was accepted by the server at the other side of `stream`.
    pub fn of_guest(stream: UnixStream, room: u32, request: &Header) -> Self {
        let mut connection = Self::new(stream, room, Stage::Accepted);
        connection.learn(request);
        connection
    }

    /// Bytes of the guest that it may have to keep.
    pub const fn room(&self) -> u32 {
        self.incoming.room()
    }

    /// Something has happened at the stream. `is_closed`: neither direction is open any more.
    pub const fn wake(&mut self, is_closed: bool) {
        (self.readable, self.writable) = (true, true);
        // If it was closed to the client from here, the guest has said so itself.
        if is_closed && self.passed_done & shutdown::SEND == 0 {
            self.client_done |= shutdown::RECEIVE;
        }
    }

    /// Reads which port the client wants, if it has yet to say so.
    pub fn greet(&mut self) -> Option<Greeted> {
        match (&mut self.stage, &self.stream) {
            (Stage::Greeting(greeting), Some(stream)) => Some(greeting.read(stream)),
            _ => None,
        }
    }

    /// The client has said which port it wants: the guest will be asked, and has time to answer `until` then.
    pub fn ask(&mut self, ends: Ends, until: Instant) {
        self.ends = Some(ends);
        self.stage = Stage::Asking {
            is_asked: false,
            until,
        };
    }

    /// When the guest must have answered.
    pub const fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Asking { until, .. } => Some(until),
            _ => None,
        }
    }

    fn learn(&mut self, header: &Header) {
        self.outgoing.learn(header.buf_alloc, header.fwd_cnt);
        self.has_asked_credit = false;
    }

    /// A packet of the guest other than a request or a reset. `payload` has as many bytes as the header says.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn receive(
        &mut self,
        op: Op,
        header: &Header,
        payload: &mut Cursor,
    ) -> Result<(), Violation> {
        self.learn(header);
        match (&self.stage, op) {
            (Stage::Asking { is_asked: true, .. }, Op::Response) => self.open(),
            (Stage::Accepted | Stage::Open, Op::Shutdown) => {
                self.guest_done |= header.flags & shutdown::BOTH;
            }
            (Stage::Accepted | Stage::Open, Op::CreditUpdate) => {}
            (Stage::Accepted | Stage::Open, Op::CreditRequest) => self.is_credit_wanted = true,
            (Stage::Accepted | Stage::Open, Op::Data) if self.guest_done & shutdown::SEND == 0 => {
                return self.take(header.len, payload);
            }
            _ => return Err(Violation::Untimely(op)),
        }
        Ok(())
    }

    /// The guest has accepted: the client hears of it, in Firecracker's words.
    fn open(&mut self) {
        self.stage = Stage::Open;
        let line = format!("OK {}\n", self.ends.map_or(0, |ends| ends.host));
        let sent = self.send(line.as_bytes());
        // The first bytes on this way: they fit, or nobody is there.
        if sent != line.len() {
            self.client_done = shutdown::BOTH;
        }
    }

    /// Takes bytes of the guest: to the stream at once, and what that does not take into the buffer.
    fn take(&mut self, len: u32, payload: &mut Cursor) -> Result<(), Violation> {
        if !self.incoming.receive(len) {
            return Err(Violation::Credit(len));
        }
        while self.buffer.is_empty()
            && self.writable
            && self.client_done & shutdown::RECEIVE == 0
            && let (Some(piece), Some(mut stream)) = (payload.next_piece()?, self.stream.as_ref())
        {
            match stream.write_volatile(&piece) {
                Ok(written) => {
                    payload.skip(written as u64);
                    self.incoming.forward(written as u32);
                }
                Err(VolatileMemoryError::IOError(error))
                    if error.kind() == ErrorKind::WouldBlock =>
                {
                    self.writable = false;
                }
                Err(_) => self.client_done |= shutdown::RECEIVE,
            }
        }
        let rest = payload.remaining();
        if self.client_done & shutdown::RECEIVE != 0 {
            // Nobody will read it.
            self.incoming.forward(rest as u32);
            return Ok(());
        }
        let mut chunk = [0; 4096];
        loop {
            let count = payload.read(&mut chunk)?;
            match chunk.get(..count) {
                Some([]) | None => return Ok(()),
                Some(bytes) => self.buffer.extend(bytes),
            }
        }
    }

    /// Sends to the stream what it takes.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let Some(stream) = &self.stream else {
            return 0;
        };
        match send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => sent,
            Err(Errno::INTR) => 0,
            Err(Errno::AGAIN) => {
                self.writable = false;
                0
            }
            Err(_) => {
                self.client_done |= shutdown::RECEIVE;
                0
            }
        }
    }

    /// The guest has reset the connection. Returns true if that is its end: not if the guest had closed it in good order, and waits
    /// no longer for the client to read the rest.
    pub fn reset(&mut self) -> bool {
        self.ends = None;
        self.guest_done != shutdown::BOTH || self.buffer.is_empty()
    }

    /// Does what can be done by now. Returns false when nothing is left to do: the connection is over, and the guest is to be
    /// told so.
    pub fn settle(&mut self) -> bool {
        self.flush();
        let is_flushed = self.buffer.is_empty();
        let due = self.guest_done & !self.passed_done;
        if let Some(stream) = &self.stream {
            // Either fails if the other side is gone.
            if due & shutdown::RECEIVE != 0 {
                let _ = stream.shutdown(Shutdown::Read);
                self.passed_done |= shutdown::RECEIVE;
            }
            if due & shutdown::SEND != 0 && is_flushed {
                let _ = stream.shutdown(Shutdown::Write);
                self.passed_done |= shutdown::SEND;
            }
        }
        if self.client_done == shutdown::BOTH {
            self.stream = None;
        }
        !(self.guest_done == shutdown::BOTH && is_flushed)
    }

    fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() && self.client_done & shutdown::RECEIVE == 0
        {
            let buffer = std::mem::take(&mut self.buffer);
            let sent = self.send(buffer.as_slices().0);
            self.buffer = buffer;
            self.buffer.drain(..sent);
            self.incoming.forward(sent as u32);
        }
        if self.client_done & shutdown::RECEIVE != 0 {
            self.incoming.forward(self.buffer.len() as u32);
            self.buffer.clear();
        }
        if self.buffer.is_empty() {
            self.buffer = VecDeque::new();
        }
    }

    /// What the guest is to hear next; of data: the stream may have some.
    fn wish(&self) -> Option<Wish> {
        self.ends?;
        match self.stage {
            Stage::Greeting(_) | Stage::Asking { is_asked: true, .. } => return None,
            Stage::Asking { .. } => return Some(Wish::Say(Op::Request)),
            Stage::Accepted => return Some(Wish::Say(Op::Response)),
            Stage::Open => {}
        }
        let may_read = self.readable
            && self.client_done & shutdown::SEND == 0
            && self.guest_done & shutdown::RECEIVE == 0;
        let credit = self.outgoing.credit();
        if may_read && credit > 0 {
            return Some(Wish::Data);
        }
        let op = if self.client_done & !self.told_done != 0 {
            Op::Shutdown
        } else if self.is_credit_wanted || self.incoming.is_due() {
            Op::CreditUpdate
        } else if may_read && !self.has_asked_credit {
            Op::CreditRequest
        } else {
            return None;
        };
        Some(Wish::Say(op))
    }

    /// Returns true if the guest is to hear something.
    pub fn has_wish(&self) -> bool {
        self.wish().is_some()
    }

    /// Makes the next packet for the guest, its bytes in `payload`; `None` if there is nothing to say.
    ///
    /// # Errors
    /// The guest's buffer is not memory; nothing is lost.
    pub fn next(&mut self, payload: &mut Cursor) -> Result<Option<Header>, ReadError> {
        loop {
            let Some(wish) = self.wish() else {
                return Ok(None);
            };
            let op = match wish {
                Wish::Say(op) => op,
                Wish::Data => {
                    let len = self.read(payload)?;
                    if len > 0 {
                        return Ok(Some(self.header(Op::Data, len)));
                    }
                    // By now there is no data, for now or for ever.
                    continue;
                }
            };
            match op {
                Op::Request => {
                    if let Stage::Asking { is_asked, .. } = &mut self.stage {
                        *is_asked = true;
                    }
                }
                Op::Response => self.stage = Stage::Open,
                Op::Shutdown => self.told_done = self.client_done,
                Op::CreditRequest => self.has_asked_credit = true,
                _ => {}
            }
            return Ok(Some(self.header(op, 0)));
        }
    }

    /// Reads from the stream into `payload`, no more than the guest has room for. 0: there is nothing.
    fn read(&mut self, payload: &mut Cursor) -> Result<u32, ReadError> {
        let mut len = 0;
        while let Some(mut stream) = self.stream.as_ref() {
            let credit = self.outgoing.credit();
            let piece = match payload.next_piece() {
                Ok(piece) => piece,
                Err(_) if len > 0 => break,
                Err(error) => return Err(error),
            };
            let piece =
                piece.and_then(|piece| piece.subslice(0, piece.len().min(credit as usize)).ok());
            let Some(mut piece) = piece.filter(|piece| !piece.is_empty()) else {
                break;
            };
            match stream.read_volatile(&mut piece) {
                Ok(0) => self.client_done |= shutdown::SEND,
                Ok(count) => {
                    // A shorter read has emptied the stream, by the way, or met the end. The next one will tell.
                    len += count as u32;
                    self.outgoing.sent(count as u32);
                    payload.skip(count as u64);
                    if count == piece.len() {
                        continue;
                    }
                }
                Err(VolatileMemoryError::IOError(error))
                    if error.kind() == ErrorKind::WouldBlock =>
                {
                    self.readable = false;
                }
                Err(_) => self.client_done = shutdown::BOTH,
            }
            break;
        }
        Ok(len)
    }

    fn header(&mut self, op: Op, len: u32) -> Header {
        self.is_credit_wanted = false;
        let (buf_alloc, fwd_cnt) = self.incoming.tell();
        let Ends { host, guest } = self.ends.unwrap_or(Ends { host: 0, guest: 0 });
        Header {
            src_port: host,
            dst_port: guest,
            len,
            op: op as u16,
            flags: if op == Op::Shutdown {
                self.client_done
            } else {
                0
            },
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }
}
