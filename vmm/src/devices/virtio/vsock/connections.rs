//! All connections: which packet belongs to which, whose turn it is, and how many there are at most.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::connection::{Connection, Ends};
use super::flow;
use super::greeting::Greeted;
use super::socket::connect;
use super::wire::{HOST_CID, Header, Op, STREAM};
use super::worker::{Peer, VsockCounters};
use crate::devices::virtio::queue::{Cursor, GuestFaults, Poller, ReadError};

/// Ports of the host for connections that its clients open, as with Firecracker.
const FIRST_PORT: u32 = 1 << 30;

/// Answers that may wait for the guest's buffers. With more, no further packet of the guest is taken.
const MOST_ANSWERS: usize = 256;

/// Time that the guest has to answer a request.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 10_000 });

/// All connections of a guest.
pub struct Connections {
    peer: Arc<Peer>,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_ends: HashMap<Ends, usize>,
    /// Connections that have something to send, each once.
    turns: VecDeque<usize>,
    /// Resets.
    answers: VecDeque<Header>,
    /// Room that the connections have been promised together.
    promised: u64,
    /// No answer is due before that.
    deadline: Option<Instant>,
}

impl Connections {
    /// None yet.
    pub fn new(peer: Arc<Peer>) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ends: HashMap::new(),
            turns: VecDeque::new(),
            answers: VecDeque::new(),
            promised: 0,
            deadline: None,
            peer,
        }
    }

    fn counters(&self) -> &VsockCounters {
        &self.peer.counters
    }

    fn faults(&self) -> &GuestFaults {
        &self.peer.faults
    }

    /// Returns true if there can be no further connection.
    pub fn is_full(&self) -> bool {
        self.slots.len() - self.free.len() >= self.peer.most_connections
    }

    /// Returns true if the guest has to take some packets before more of its own are looked at.
    pub fn is_congested(&self) -> bool {
        self.answers.len() >= MOST_ANSWERS
    }

    /// Returns true if there is something for the guest.
    pub fn has_packets(&self) -> bool {
        !self.answers.is_empty() || !self.turns.is_empty()
    }

    /// Takes a client of the host in. [`Connections::is_full`] must be false.
    pub fn add_client(&mut self, stream: UnixStream, poller: &Poller) {
        let room = flow::room(self.promised);
        let watched = self.add(stream, poller, |stream| Connection::of_client(stream, room));
        if let Some(slot) = watched {
            self.go_on(slot);
        }
    }

    /// Puts a connection on `stream` into a slot, and has it watched. The slot is its token. `None` if it cannot be watched.
    fn add(
        &mut self,
        stream: UnixStream,
        poller: &Poller,
        make: impl FnOnce(UnixStream) -> Connection,
    ) -> Option<usize> {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        if let Err(error) = poller.watch_stream(&stream, slot as u32) {
            if slot < self.slots.len() {
                self.free.push(slot);
            }
            tracing::warn!("vsock: a connection cannot be watched: {error}");
            self.counters().refused_total.increment();
            return None;
        }
        let connection = make(stream);
        self.promised += u64::from(connection.room());
        match self.slots.get_mut(slot) {
            Some(free) => *free = Some(connection),
            None => self.slots.push(Some(connection)),
        }
        Some(slot)
    }

    fn get(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    fn remove(&mut self, slot: usize) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::take) else {
            return;
        };
        self.promised -= u64::from(connection.room());
        if let Some(ends) = connection.ends {
            self.by_ends.remove(&ends);
        }
        if connection.is_queued {
            self.turns.retain(|other| *other != slot);
        }
        self.free.push(slot);
        self.counters().closed_total.increment();
    }

    /// Ends a connection, and tells the guest if it knows of it.
    fn abort(&mut self, slot: usize) {
        let ends = self.get(slot).and_then(|it| it.ends);
        self.remove(slot);
        if let Some(ends) = ends {
            self.answers.push_back(self.reset(ends));
        }
    }

    fn reset(&self, Ends { host, guest }: Ends) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.peer.cid,
            src_port: host,
            dst_port: guest,
            kind: STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }

    /// Something has happened at the stream of `slot`. `is_closed`: it is closed in both directions.
    pub fn wake(&mut self, slot: usize, is_closed: bool) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        connection.wake(is_closed);
        self.go_on(slot);
    }

    /// Does for a connection what can be done by now.
    fn go_on(&mut self, slot: usize) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        match connection.greet() {
            Some(Greeted::Waiting) => return,
            Some(Greeted::Over) => return self.remove(slot),
            Some(Greeted::Port(port)) => {
                let host = self.free_port(port);
                let ends = Ends { host, guest: port };
                self.by_ends.insert(ends, slot);
                let until = Instant::now() + PATIENCE;
                self.deadline.get_or_insert(until);
                if let Some(connection) = self.get(slot) {
                    connection.ask(ends, until);
                }
            }
            None => {}
        }
        let Some(connection) = self.get(slot) else {
            return;
        };
        if !connection.settle() {
            return self.abort(slot);
        }
        if connection.has_wish() && !std::mem::replace(&mut connection.is_queued, true) {
            self.turns.push_back(slot);
        }
    }

    /// A port of the host that makes a new pair with the guest's. There are far fewer connections than ports.
    fn free_port(&self, guest: u32) -> u32 {
        let next = &self.peer.next_port;
        loop {
            let host = next.load(Ordering::Relaxed).max(FIRST_PORT);
            next.store(host.wrapping_add(1), Ordering::Relaxed);
            if !self.by_ends.contains_key(&Ends { host, guest }) {
                return host;
            }
        }
    }

    /// The guest has sent a packet. `payload` is what stands behind the header.
    pub fn receive(&mut self, header: &Header, payload: &mut Cursor, poller: &Poller) {
        if header.src_cid != self.peer.cid {
            return self.refuse_packet(format_args!("a packet from CID {}", header.src_cid));
        }
        let op = Op::from_number(header.op);
        let ends = Ends {
            host: header.dst_port,
            guest: header.src_port,
        };
        let slot = self.by_ends.get(&ends).copied();
        let is_ours = header.dst_cid == HOST_CID && header.kind == STREAM;
        match (op, slot) {
            (Some(Op::Reset), Some(slot)) if is_ours => self.reset_by_guest(slot, ends),
            (Some(Op::Reset), _) => {}
            (Some(op), Some(slot)) if is_ours => self.deliver(slot, op, header, payload),
            (Some(Op::Request), None) if is_ours => self.request(header, ends, poller),
            _ => {
                if op.is_none() {
                    self.refuse_packet(format_args!("a packet of operation {}", header.op));
                }
                // As it came: nobody else can tell what it is about.
                let answer = Header {
                    src_cid: header.dst_cid,
                    kind: header.kind,
                    ..self.reset(ends)
                };
                self.answers.push_back(answer);
            }
        }
    }

    fn refuse_packet(&self, what: std::fmt::Arguments<'_>) {
        self.counters().errors_total.increment();
        self.faults().report(what);
    }

    fn reset_by_guest(&mut self, slot: usize, ends: Ends) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        let was_asked = connection.deadline().is_some();
        let is_over = connection.reset();
        self.by_ends.remove(&ends);
        if was_asked {
            self.counters().refused_total.increment();
        }
        if is_over {
            self.remove(slot);
        }
    }

    fn deliver(&mut self, slot: usize, op: Op, header: &Header, payload: &mut Cursor) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        let was_asked = connection.deadline().is_some();
        let received = connection.receive(op, header, payload);
        match received {
            Ok(()) => {
                if was_asked {
                    self.counters().host_connections_total.increment();
                }
                if op == Op::Data {
                    self.counters().tx_bytes_total.add(header.len.into());
                }
                self.go_on(slot);
            }
            Err(violation) => {
                self.refuse_packet(format_args!("a connection is reset: {violation}"));
                self.abort(slot);
            }
        }
    }

    /// The guest wants a connection to a server of the host.
    fn request(&mut self, header: &Header, ends: Ends, poller: &Poller) {
        let stream = if self.is_full() {
            None
        } else {
            connect(&self.peer.path, ends.host).ok()
        };
        let room = flow::room(self.promised);
        let make = |stream| Connection::of_guest(stream, room, header);
        let Some(stream) = stream else {
            self.counters().refused_total.increment();
            return self.answers.push_back(self.reset(ends));
        };
        let Some(slot) = self.add(stream, poller, make) else {
            return self.answers.push_back(self.reset(ends));
        };
        if let Some(connection) = self.get(slot) {
            connection.ends = Some(ends);
        }
        self.by_ends.insert(ends, slot);
        self.counters().guest_connections_total.increment();
        self.go_on(slot);
    }

    /// Makes the next packet for the guest, its bytes in `payload`; `None` if there is none.
    ///
    /// # Errors
    /// The guest's buffer is not memory; nothing is lost.
    pub fn next(&mut self, payload: &mut Cursor) -> Result<Option<Header>, ReadError> {
        if let Some(answer) = self.answers.pop_front() {
            return Ok(Some(answer));
        }
        while let Some(slot) = self.turns.pop_front() {
            let Some(connection) = self.get(slot) else {
                continue;
            };
            let made = match connection.next(payload) {
                Ok(made) => made,
                Err(error) => {
                    self.turns.push_front(slot);
                    return Err(error);
                }
            };
            connection.is_queued = false;
            self.go_on(slot);
            if let Some(header) = made {
                self.counters().rx_bytes_total.add(header.len.into());
                return Ok(Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.peer.cid,
                    kind: STREAM,
                    ..header
                }));
            }
        }
        Ok(None)
    }

    /// When [`Connections::expire`] is to be called next.
    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends what the guest has not answered in time.
    pub fn expire(&mut self) {
        let is_due = |deadline: &Instant| *deadline <= Instant::now();
        if !self.deadline.as_ref().is_some_and(is_due) {
            return;
        }
        for slot in 0..self.slots.len() {
            let deadline = self.get(slot).and_then(|it| it.deadline());
            if deadline.as_ref().is_some_and(is_due) {
                self.counters().refused_total.increment();
                self.abort(slot);
            }
        }
        let connections = self.slots.iter().flatten();
        self.deadline = connections.filter_map(Connection::deadline).min();
    }
}
