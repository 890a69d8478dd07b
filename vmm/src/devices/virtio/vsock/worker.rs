//! The device's thread: serves both queues, the socket for clients of the host, and the streams of all connections.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use vm_memory::GuestMemoryMmap;

use super::QUEUE_SIZE;
use super::connections::Connections;
use super::wire::{HEADER_BYTES, Header, MAX_PAYLOAD, TRANSPORT_RESET};
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{
    Chain, GuestFaults, Poller, QueueFailure, ReadError, ServedQueue, Work,
};

ebb_core::metrics! {
    /// What the vsock has done since the machine started. `rx` is the way to the guest, `tx` the way from it.
    pub struct VsockStats from pub struct VsockCounters {
        /// Connections that the guest opened.
        guest_connections_total: Counter,
        /// Connections that clients of the host opened.
        host_connections_total: Counter,
        /// Connections that were not opened: nobody listened, no answer came, or there were too many.
        refused_total: Counter,
        /// Connections that have ended, and clients that were refused.
        closed_total: Counter,
        /// Packets of the guest that were none, or that broke a rule.
        errors_total: Counter,
        /// Packets that the guest got.
        rx_packets_total: Counter,
        /// Packets that the guest sent.
        tx_packets_total: Counter,
        /// Bytes of streams that the guest got.
        rx_bytes_total: Counter of Bytes,
        /// Bytes of streams that the guest sent.
        tx_bytes_total: Counter of Bytes,
    }
}

/// The guest, and where its connections lead.
#[derive(Debug)]
pub(super) struct Peer {
    pub cid: u64,
    pub path: PathBuf,
    pub most_connections: usize,
    /// The host's end of the next connection that one of its clients opens.
    pub next_port: AtomicU32,
    pub counters: Arc<VsockCounters>,
    pub faults: GuestFaults,
}

/// A packet was not taken.
#[derive(Debug, thiserror::Error)]
enum PacketError {
    #[error("a packet: {0}")]
    Memory(#[from] ReadError),
    #[error("a packet says that it has {said} bytes, and has {has}")]
    Length { said: u32, has: u64 },
}

/// What the thread needs of the machine.
pub(super) struct Context {
    pub memory: Arc<GuestMemoryMmap>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
    pub peer: Arc<Peer>,
    /// The driver is to hear that its connections are gone.
    pub is_restored: bool,
}

/// What wakes the thread, beside the streams, whose tokens are those of [`Connections`].
const LISTENER: u32 = 1 << 31;
const RECEIVE: u32 = LISTENER + 1;
const TRANSMIT: u32 = LISTENER + 2;
const EVENTS: u32 = LISTENER + 3;

/// Time after which clients are taken again when the host had no room for one.
const PAUSE: Duration = Duration::from_millis(100);

/// The queues, the connections and the socket.
pub(super) struct VsockWorker {
    context: Context,
    receive: ServedQueue,
    transmit: ServedQueue,
    events: ServedQueue,
    listener: Arc<UnixListener>,
    connections: Connections,
    chain: Chain,
    /// A chain of the guest's for a packet.
    space: Chain,
    has_space: bool,
    /// The guest may have sent something.
    is_transmit_due: bool,
    /// The driver has not heard yet that its connections are gone.
    is_reset_due: bool,
    /// Clients may wait.
    is_accept_due: bool,
    /// The host had no room for one.
    accept_after: Option<Instant>,
}

impl VsockWorker {
    pub fn new(context: Context, queues: [ServedQueue; 3], listener: Arc<UnixListener>) -> Self {
        let [receive, transmit, events] = queues;
        Self {
            connections: Connections::new(Arc::clone(&context.peer)),
            is_reset_due: context.is_restored,
            context,
            receive,
            transmit,
            events,
            listener,
            chain: Chain::with_capacity(QUEUE_SIZE),
            space: Chain::with_capacity(QUEUE_SIZE),
            has_space: false,
            // What the driver made available before it was ready is not notified again.
            is_transmit_due: true,
            is_accept_due: true,
            accept_after: None,
        }
    }

    /// Does what can be done by now. Returns true if there is more.
    fn serve(&mut self, poller: &Poller) -> Result<bool, QueueFailure> {
        if self.is_reset_due {
            self.is_reset_due = !self.tell_of_reset()?;
        }
        self.connections.expire();
        if self.is_accept_due {
            self.accept(poller);
        }
        if self.is_transmit_due && !self.connections.is_congested() {
            self.is_transmit_due = self.transmit(poller)?;
        }
        let more = self.connections.has_packets() && self.receive(poller)?;
        let may_accept = self.is_accept_due && self.accept_after.is_none();
        Ok(more
            || self.is_transmit_due && !self.connections.is_congested()
            || may_accept && !self.connections.is_full())
    }

    /// Tells the driver that all connections are gone, so that it ends those that it has; who listens goes on. Returns false if
    /// it has no buffer for that yet.
    fn tell_of_reset(&mut self) -> Result<bool, QueueFailure> {
        let memory = Arc::clone(&self.context.memory);
        let (interrupt, faults) = (&*self.context.interrupt, &self.context.peer.faults);
        self.events.begin(&memory);
        let Some(loaded) = self.events.next(&memory, &mut self.chain)? else {
            self.events.end(&memory, interrupt, faults)?;
            return Ok(false);
        };
        let event = TRANSPORT_RESET.to_le_bytes();
        let written = match loaded {
            Ok(()) => self
                .chain
                .writable(&memory)
                .write_all(&event)
                .map_err(|it| it.to_string()),
            Err(fault) => Err(fault.to_string()),
        };
        let bytes = if let Err(error) = &written {
            faults.report(format_args!("a buffer for events: {error}"));
            0
        } else {
            event.len() as u32
        };
        self.events.give_back(&memory, self.chain.head(), bytes)?;
        self.events.tell(&memory, interrupt, faults);
        // A driver with a bad buffer has missed its event.
        Ok(true)
    }

    /// Takes clients of the host in.
    fn accept(&mut self, poller: &Poller) {
        let now = Instant::now();
        if self.accept_after.is_some_and(|after| now < after) {
            return;
        }
        self.accept_after = None;
        while !self.connections.is_full() {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&*self.listener, flags) {
                Ok(stream) => self.connections.add_client(stream.into(), poller),
                Err(Errno::AGAIN) => {
                    self.is_accept_due = false;
                    return;
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!("vsock: a client was not accepted: {error}");
                    self.accept_after = Some(now + PAUSE);
                    return;
                }
            }
        }
    }

    /// Takes packets of the guest, at most as many as the queue has entries. Returns true if there may be more.
    fn transmit(&mut self, poller: &Poller) -> Result<bool, QueueFailure> {
        let memory = Arc::clone(&self.context.memory);
        self.transmit.begin(&memory);
        for _ in 0..self.transmit.size() {
            if poller.stop().is_stopped() || self.connections.is_congested() {
                self.tell();
                return Ok(true);
            }
            let Some(loaded) = self.transmit.next(&memory, &mut self.chain)? else {
                let (interrupt, faults) = (&*self.context.interrupt, &self.context.peer.faults);
                self.transmit.end(&memory, interrupt, faults)?;
                return Ok(false);
            };
            let taken = match loaded {
                Ok(()) => self.take(&memory, poller).map_err(|it| it.to_string()),
                Err(fault) => Err(fault.to_string()),
            };
            let peer = &self.context.peer;
            match taken {
                Ok(()) => peer.counters.tx_packets_total.increment(),
                Err(error) => {
                    peer.counters.errors_total.increment();
                    peer.faults.report(error);
                }
            }
            self.transmit.give_back(&memory, self.chain.head(), 0)?;
        }
        self.tell();
        Ok(true)
    }

    /// Tells the driver what was given back.
    fn tell(&mut self) {
        let Context {
            memory,
            interrupt,
            peer,
            ..
        } = &self.context;
        self.transmit.tell(memory, &**interrupt, &peer.faults);
    }

    fn take(&mut self, memory: &GuestMemoryMmap, poller: &Poller) -> Result<(), PacketError> {
        let mut payload = self.chain.readable(memory);
        let mut raw = [0; HEADER_BYTES];
        payload.read_exact(&mut raw)?;
        let header = Header::read(&raw);
        let (said, has) = (header.len, payload.remaining());
        if u64::from(said) > has || said > MAX_PAYLOAD {
            return Err(PacketError::Length { said, has });
        }
        payload.truncate(said.into());
        self.connections.receive(&header, &mut payload, poller);
        Ok(())
    }

    /// Gives the guest packets, at most as many as the queue has entries. Returns true if there may be more, and buffers for it.
    fn receive(&mut self, poller: &Poller) -> Result<bool, QueueFailure> {
        let memory = Arc::clone(&self.context.memory);
        self.receive.begin(&memory);
        let mut is_starved = false;
        let mut more = true;
        for _ in 0..self.receive.size() {
            if poller.stop().is_stopped() || !self.connections.has_packets() {
                more = false;
                break;
            }
            if !self.has_space {
                let Some(loaded) = self.receive.next(&memory, &mut self.space)? else {
                    (is_starved, more) = (true, false);
                    break;
                };
                if let Err(fault) = loaded {
                    self.refuse_space(&memory, fault.to_string())?;
                    continue;
                }
                self.has_space = true;
            }
            self.fill(&memory)?;
        }
        let (interrupt, faults) = (&*self.context.interrupt, &self.context.peer.faults);
        if is_starved {
            // Only now is it of interest that the driver adds buffers.
            self.receive.end(&memory, interrupt, faults)?;
        } else {
            self.receive.tell(&memory, interrupt, faults);
        }
        Ok(more)
    }

    /// Puts the next packet into the chain that there is.
    fn fill(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueFailure> {
        let mut header_space = self.space.writable(memory);
        let room = header_space.remaining();
        let payload = room.checked_sub(HEADER_BYTES as u64).filter(|it| *it > 0);
        let payload = payload.and_then(|payload| header_space.split_tail(payload));
        let Some(mut payload) = payload else {
            return self.refuse_space(memory, format!("a buffer of {room} bytes for packets"));
        };
        payload.truncate(MAX_PAYLOAD.into());
        // Before anything is taken out of a stream.
        if let Err(error) = header_space.clone().write_all(&[0; HEADER_BYTES]) {
            return self.refuse_space(memory, format!("a buffer for packets: {error}"));
        }
        match self.connections.next(&mut payload) {
            Ok(Some(header)) => {
                // It was just written to.
                let _ = header_space.write_all(&header.bytes());
                self.has_space = false;
                self.context.peer.counters.rx_packets_total.increment();
                let written = HEADER_BYTES as u32 + header.len;
                self.receive.give_back(memory, self.space.head(), written)
            }
            Ok(None) => Ok(()),
            Err(error) => self.refuse_space(memory, format!("a buffer for packets: {error}")),
        }
    }

    /// Gives back a chain that is no good for packets.
    fn refuse_space(&mut self, memory: &GuestMemoryMmap, why: String) -> Result<(), QueueFailure> {
        self.has_space = false;
        self.context.peer.counters.errors_total.increment();
        self.context.peer.faults.report(why);
        self.receive.give_back(memory, self.space.head(), 0)
    }

    /// How long to wait for the next event at most.
    fn timeout(&self) -> Option<Duration> {
        let accept = self.accept_after.filter(|_| self.is_accept_due);
        let due = self.connections.deadline().into_iter().chain(accept).min();
        due.map(|due| due.saturating_duration_since(Instant::now()))
    }
}

impl Work for VsockWorker {
    fn watch(&self, poller: &Poller) -> io::Result<()> {
        poller.watch(self.receive.notified(), RECEIVE)?;
        poller.watch(self.transmit.notified(), TRANSMIT)?;
        poller.watch(self.events.notified(), EVENTS)?;
        // It stays readable while there is no room for clients.
        poller.watch_arrivals(&*self.listener, LISTENER)
    }

    fn run(mut self, poller: &Poller) {
        loop {
            let timeout = match self.serve(poller) {
                Ok(true) => Some(Duration::ZERO),
                Ok(false) => self.timeout(),
                Err(failure) => {
                    let faults = &self.context.peer.faults;
                    faults.report(failure);
                    let told = self.context.interrupt.needs_reset();
                    told.unwrap_or_else(|error| faults.report(format_args!("interrupt: {error}")));
                    None
                }
            };
            let is_running = poller.wait_for_streams(timeout, |token, is_closed| match token {
                // Clears it, even if the queue cannot be served now.
                RECEIVE => self.receive.begin(&self.context.memory),
                TRANSMIT => {
                    self.transmit.begin(&self.context.memory);
                    self.is_transmit_due = true;
                }
                EVENTS => self.events.begin(&self.context.memory),
                LISTENER => self.is_accept_due = true,
                slot => self.connections.wake(slot as usize, is_closed),
            });
            if !is_running {
                return;
            }
        }
    }
}
