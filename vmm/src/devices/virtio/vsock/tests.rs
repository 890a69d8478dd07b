//! The vsock against a driver that may be hostile, and against programs of the host that may be slow, or vanish.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::wire::{HEADER_BYTES, Header, Op, STREAM, shutdown};
use super::*;
use crate::devices::virtio::queue::tests::driver::{
    MockInterrupt, MockQueue, WRITE, memory, wait_for,
};

const CID: u32 = 52;
const MOST: u64 = 20;

const RX: u64 = 0x10_0000;
const TX: u64 = 0x11_0000;
const EVENTS: u64 = 0x12_0000;
/// Where the guest's packets are, 16 of at most 128 KiB.
const SENT: u64 = 0x20_0000;
/// Its buffers for packets, 32 of 4 KiB.
const BUFFERS: u64 = 0x60_0000;
const BUFFER: u32 = 4096;

/// Room that the guest says it has.
const ROOM: u32 = 1 << 20;

/// Address, length and flags of each buffer of a chain.
type Buffers<'a> = &'a [(u64, u32, u16)];

struct Rig {
    memory: Arc<GuestMemoryMmap>,
    queues: [MockQueue; 3],
    vsock: Vsock,
    _socket: VsockSocket,
    interrupt: Arc<MockInterrupt>,
    folder: TempDir,
    seen: u16,
    sent: u16,
}

impl Rig {
    fn new() -> Self {
        let rig = Self::without_buffers();
        for index in 0..32 {
            rig.offer(index, BUFFER);
        }
        rig.queues[0].notify();
        rig
    }

    fn without_buffers() -> Self {
        let memory = memory(8);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v");
        let socket = VsockSocket::open(&path).unwrap();
        let mut rig = Self {
            queues: Self::queues(&memory),
            memory,
            vsock: Vsock::with_most(CID, &path, &socket, MOST).unwrap(),
            _socket: socket,
            interrupt: Arc::default(),
            folder,
            seen: 0,
            sent: 0,
        };
        rig.activate();
        rig
    }

    fn queues(memory: &Arc<GuestMemoryMmap>) -> [MockQueue; 3] {
        [(RX, 256), (TX, 256), (EVENTS, 16)].map(|(base, size)| MockQueue::new(memory, base, size))
    }

    fn activate(&mut self) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.vsock.features(),
            queues: self.queues.iter().map(|it| Some(it.handle())).collect(),
            interrupt: self.interrupt.clone(),
        };
        self.vsock.activate(activation).unwrap();
    }

    fn offer(&self, index: u16, len: u32) {
        let addr = BUFFERS + u64::from(index) * u64::from(BUFFER);
        self.queues[0].offer_chain(index, &[(addr, len, WRITE)]);
    }

    fn path(&self, port: u32) -> std::path::PathBuf {
        self.folder.path().join(format!("v_{port}"))
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.folder.path().join("v")).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        client
    }

    /// Sends what is at `chain`, and waits until the device has taken it.
    fn send_chain(&mut self, chain: Buffers) {
        self.queues[1].offer_chain(self.sent % 16 * 4, chain);
        self.sent = self.sent.wrapping_add(1);
        self.queues[1].run_until_used(self.sent);
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let addr = SENT + u64::from(self.sent % 16) * 0x2_0000;
        let raw = [&header.bytes()[..], payload].concat();
        self.memory.write_slice(&raw, GuestAddress(addr)).unwrap();
        self.send_chain(&[(addr, raw.len() as u32, 0)]);
    }

    /// The next packet that the guest gets. Its buffer is given again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        wait_for(|| self.queues[0].used_index() != self.seen, "a packet");
        let (head, len) = self.queues[0].used(self.seen);
        self.seen = self.seen.wrapping_add(1);
        let addr = GuestAddress(BUFFERS + u64::from(head) * u64::from(BUFFER));
        let mut raw = vec![0; len as usize];
        self.memory.read_slice(&mut raw, addr).unwrap();
        self.offer(head as u16, BUFFER);
        self.queues[0].notify();
        let header = Header::read(raw[..HEADER_BYTES].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (2, CID.into()));
        assert_eq!(header.len as usize, raw.len() - HEADER_BYTES);
        (header, raw.split_off(HEADER_BYTES))
    }

    /// The next packet, which must be this.
    fn expect(&mut self, op: Op, ends: (u32, u32)) -> (Header, Vec<u8>) {
        let packet = self.packet();
        let found = (packet.0.op, packet.0.src_port, packet.0.dst_port);
        assert_eq!(found, (op as u16, ends.0, ends.1), "{:?}", packet.0);
        packet
    }

    /// Bytes for the guest, until there are so many.
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let (header, bytes) = self.packet();
            assert_eq!(header.op, Op::Data as u16, "{header:?}");
            all.extend(bytes);
        }
        all
    }

    /// A connection of the guest to a server of the host.
    fn connect(&mut self, port: u32, server: &UnixListener) -> UnixStream {
        self.send(packet(Op::Request, (1000, port)), &[]);
        let stream = server.accept().unwrap().0;
        let mut answer = self.packet().0;
        while answer.op == Op::Request as u16 {
            // For a client of another test's part.
            answer = self.packet().0;
        }
        let found = (answer.op, answer.src_port, answer.dst_port);
        assert_eq!(found, (Op::Response as u16, port, 1000), "{answer:?}");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(port)).unwrap()
    }

    fn errors(&self) -> u64 {
        self.vsock.counters().snapshot().errors_total
    }

    /// The device still does what it is there for.
    fn works(&mut self, port: u32) {
        let server = self.listen(port);
        let mut stream = self.connect(port, &server);
        self.send(data((1000, port), b"good"), b"good");
        let mut found = [0; 4];
        stream.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"good");
        self.send(packet(Op::Reset, (1000, port)), &[]);
        assert_eq!(stream.read(&mut found).unwrap(), 0);
    }
}

/// A packet of the guest, from its port to the host's.
fn packet(op: Op, (guest, host): (u32, u32)) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: 2,
        src_port: guest,
        dst_port: host,
        kind: STREAM,
        op: op as u16,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

fn data(ends: (u32, u32), payload: &[u8]) -> Header {
    Header {
        len: payload.len() as u32,
        ..packet(Op::Data, ends)
    }
}

fn closing(ends: (u32, u32), flags: u32) -> Header {
    Header {
        flags,
        ..packet(Op::Shutdown, ends)
    }
}

fn ends_of(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn the_guest_talks_to_a_server_of_the_host() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    rig.send(data((1000, 80), b"question"), b"question");
    let mut question = [0; 8];
    stream.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"question");

    // The server says all and closes its half; the guest goes on sending.
    let answer: Vec<u8> = (0..100_000_u32).map(|at| (at % 251) as u8).collect();
    stream.write_all(&answer).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.bytes(answer.len()), answer);
    let (closed, _) = rig.expect(Op::Shutdown, (80, 1000));
    assert_eq!(closed.flags, shutdown::SEND);
    rig.send(data((1000, 80), b"thanks"), b"thanks");
    rig.send(closing((1000, 80), shutdown::SEND), &[]);
    let mut thanks = String::new();
    stream.read_to_string(&mut thanks).unwrap();
    assert_eq!(thanks, "thanks");
    rig.send(closing((1000, 80), shutdown::RECEIVE), &[]);
    rig.expect(Op::Reset, (80, 1000));
    let stats = rig.vsock.counters().snapshot();
    assert_eq!((stats.guest_connections_total, stats.closed_total), (1, 1));
    assert_eq!((stats.tx_bytes_total, stats.rx_bytes_total), (14, 100_000));
    assert_eq!((stats.errors_total, stats.refused_total), (0, 0));
}

#[test]
fn a_client_of_the_host_talks_to_the_guest_and_vanishes() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    let (request, _) = rig.packet();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 52));
    let host = request.src_port;
    rig.send(packet(Op::Response, (52, host)), &[]);
    let line = format!("OK {host}\n");
    let mut found = vec![0; line.len()];
    client.read_exact(&mut found).unwrap();
    assert_eq!(String::from_utf8_lossy(&found), line);
    assert_eq!(rig.bytes(5), b"early");
    rig.send(data((52, host), b"hello"), b"hello");
    client.read_exact(&mut found[..5]).unwrap();
    assert_eq!(&found[..5], b"hello");
    client.write_all(b"last").unwrap();
    drop(client);
    assert_eq!(rig.bytes(4), b"last");
    // The device may see the end of what the client says before it sees that nobody listens either.
    let mut closed = rig.expect(Op::Shutdown, (host, 52)).0;
    if closed.flags == shutdown::SEND {
        closed = rig.expect(Op::Shutdown, (host, 52)).0;
    }
    assert_eq!(closed.flags, shutdown::BOTH);
    // The guest does not know yet, and then ends it.
    rig.send(data((52, host), b"?"), b"?");
    rig.send(packet(Op::Reset, (52, host)), &[]);
    assert_eq!(rig.vsock.counters().snapshot().host_connections_total, 1);
    assert_eq!(
        (rig.errors(), rig.vsock.counters().snapshot().closed_total),
        (0, 1)
    );
    rig.works(80);
}

#[test]
fn what_nobody_expects_is_reset() {
    let mut rig = Rig::new();
    // Nobody listens; no connection.
    for op in [
        Op::Request,
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        rig.send(packet(op, (7, 80)), &[]);
        rig.expect(Op::Reset, (80, 7));
    }
    assert_eq!(rig.errors(), 0);
    rig.send(
        Header {
            op: 99,
            ..packet(Op::Data, (7, 80))
        },
        &[],
    );
    rig.expect(Op::Reset, (80, 7));
    rig.send(
        Header {
            kind: 2,
            ..packet(Op::Request, (7, 80))
        },
        &[],
    );
    assert_eq!(rig.expect(Op::Reset, (80, 7)).0.kind, 2);
    // A reset and what another guest would have sent get no answer.
    rig.send(packet(Op::Reset, (7, 80)), &[]);
    rig.send(
        Header {
            src_cid: 99,
            ..packet(Op::Request, (7, 80))
        },
        &[],
    );
    assert_eq!(rig.errors(), 2);
    rig.works(80);
}

#[test]
fn a_client_gets_nothing_but_an_end_from_a_guest_that_refuses_or_is_silent() {
    let mut rig = Rig::new();
    for answer in [Some(Op::Reset), Some(Op::Data), None] {
        let mut client = rig.client();
        client.write_all(b"CONNECT 9\n").unwrap();
        let (request, _) = rig.packet();
        if let Some(op) = answer {
            rig.send(packet(op, (9, request.src_port)), &[]);
        }
        assert!(ends_of(&mut client), "{answer:?}");
        if answer != Some(Op::Reset) {
            rig.expect(Op::Reset, (request.src_port, 9));
        }
    }
    let mut client = rig.client();
    client.write_all(b"HELLO\n").unwrap();
    assert!(ends_of(&mut client));
    assert_eq!(rig.vsock.counters().snapshot().host_connections_total, 0);
    rig.works(80);
}

#[test]
fn no_more_is_kept_than_the_guest_had_credit_for() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    let chunk: Vec<u8> = (0..0x1_0000_u32).map(|at| (at % 253) as u8).collect();
    // Nobody reads: what the socket does not take is kept, until the guest's credit is used up.
    let (mut sent, mut room, mut taken) = (0_u32, 256 << 10, 0);
    loop {
        let size = (room - (sent - taken)).min(chunk.len() as u32);
        if size == 0 {
            break;
        }
        let part = &chunk[..size as usize];
        rig.send(data((1000, 80), part), part);
        sent += size;
        rig.send(packet(Op::CreditRequest, (1000, 80)), &[]);
        let (credit, _) = rig.expect(Op::CreditUpdate, (80, 1000));
        (room, taken) = (credit.buf_alloc, credit.fwd_cnt);
    }
    assert_eq!(room, 256 << 10);
    let mut all = vec![0; sent as usize];
    stream.read_exact(&mut all).unwrap();
    assert!(
        all.chunks(chunk.len())
            .all(|part| part == &chunk[..part.len()])
    );
    // Without being asked.
    let mut known = taken;
    while known != sent {
        known = rig.expect(Op::CreditUpdate, (80, 1000)).0.fwd_cnt;
        rig.send(packet(Op::CreditRequest, (1000, 80)), &[]);
        known = known.max(rig.expect(Op::CreditUpdate, (80, 1000)).0.fwd_cnt);
    }

    // More than the credit.
    for _ in 0..room / 0x1_0000 + 8 {
        rig.send(data((1000, 80), &chunk), &chunk);
        if rig.errors() > 0 {
            break;
        }
    }
    assert_eq!(rig.errors(), 1);
    while rig.packet().0.op != Op::Reset as u16 {}
    rig.works(81);
}

#[test]
fn a_guest_without_room_gets_nothing_and_others_go_on() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    let none = Header {
        buf_alloc: 0,
        ..packet(Op::CreditUpdate, (1000, 80))
    };
    rig.send(none, &[]);
    stream.write_all(b"wait").unwrap();
    rig.expect(Op::CreditRequest, (80, 1000));
    rig.works(81);
    // A count that it cannot have.
    rig.send(
        Header {
            buf_alloc: u32::MAX,
            fwd_cnt: 1,
            ..none
        },
        &[],
    );
    rig.expect(Op::CreditRequest, (80, 1000));
    rig.send(
        Header {
            buf_alloc: 3,
            ..none
        },
        &[],
    );
    assert_eq!(rig.packet().1, b"wai");
    rig.expect(Op::CreditRequest, (80, 1000));
    rig.send(
        Header {
            buf_alloc: 3,
            fwd_cnt: 3,
            ..none
        },
        &[],
    );
    assert_eq!(rig.packet().1, b"t");
}

#[test]
fn a_flood_of_requests_waits_until_the_guest_takes_the_answers() {
    let mut rig = Rig::without_buffers();
    let offered = 512;
    let addr = SENT;
    let raw = packet(Op::Request, (7, 80)).bytes();
    rig.memory.write_slice(&raw, GuestAddress(addr)).unwrap();
    for n in 0..256 {
        rig.queues[1].offer_chain(n, &[(addr, HEADER_BYTES as u32, 0)]);
    }
    rig.queues[1].run_until_used(256);
    for n in 0..offered - 256 {
        rig.queues[1].offer_chain(n, &[(addr, HEADER_BYTES as u32, 0)]);
    }
    rig.queues[1].notify();
    // One is taken for each answer, and not one more.
    for index in 0..32 {
        rig.offer(index, BUFFER);
    }
    rig.queues[0].notify();
    wait_for(|| rig.queues[0].used_index() == 32, "answers");
    let taken = rig.queues[1].used_index();
    assert!(taken <= 256 + 32, "{taken} were taken");
    for _ in 0..offered {
        rig.expect(Op::Reset, (80, 7));
    }
    assert_eq!(
        rig.vsock.counters().snapshot().refused_total,
        u64::from(offered)
    );
    rig.sent = offered;
    rig.works(80);
}

#[test]
fn packets_that_are_none_are_given_back() {
    let mut rig = Rig::new();
    let header = data((1000, 80), &[0; 100]).bytes();
    rig.memory.write_slice(&header, GuestAddress(SENT)).unwrap();
    let size = HEADER_BYTES as u32;
    let cases: [(&str, Buffers); 7] = [
        ("no header", &[(SENT, size - 1, 0)]),
        ("nothing to read", &[(SENT, size, WRITE)]),
        ("less than it says", &[(SENT, size + 99, 0)]),
        ("not memory", &[(0xd000_0000, size, 0)]),
        ("leaves memory", &[((8 << 20) - 20, size, 0)]),
        (
            "readable after writable",
            &[(SENT, size, WRITE), (SENT, 8, 0)],
        ),
        (
            "its bytes are not memory",
            &[(SENT, size, 0), (0xd000_0000, 100, 0)],
        ),
    ];
    let server = rig.listen(80);
    for (number, (what, chain)) in (1..).zip(cases) {
        if number == 7 {
            let mut stream = rig.connect(80, &server);
            rig.memory.write_slice(&header, GuestAddress(SENT)).unwrap();
            rig.send_chain(chain);
            rig.expect(Op::Reset, (80, 1000));
            assert!(ends_of(&mut stream));
        } else {
            rig.send_chain(chain);
        }
        assert_eq!(rig.errors(), number, "{what}");
    }
    let huge = Header {
        len: u32::MAX,
        ..packet(Op::Data, (1000, 80))
    };
    rig.send(huge, &[0; 100]);
    let large = Header {
        len: 0x1_0001,
        ..packet(Op::Data, (1000, 80))
    };
    rig.send(large, &[0; 0x1_0001]);
    assert_eq!(rig.errors(), 9);
    rig.works(81);
}

#[test]
fn buffers_that_are_none_are_given_back() {
    let mut rig = Rig::without_buffers();
    let size = HEADER_BYTES as u32;
    let cases: [Buffers; 6] = [
        &[(BUFFERS, size - 1, WRITE)],
        &[(BUFFERS, size, WRITE)],
        &[(BUFFERS, 4096, 0)],
        &[(0xd000_0000, 4096, WRITE)],
        &[((8 << 20) - 20, 4096, WRITE)],
        &[(BUFFERS, 4096, WRITE), (BUFFERS, 4096, 0)],
    ];
    for (number, chain) in (0..).zip(cases) {
        rig.queues[0].offer_chain(100 + 2 * number, chain);
    }
    rig.offer(0, BUFFER);
    rig.queues[0].notify();
    rig.send(packet(Op::Request, (7, 80)), &[]);
    rig.seen = cases.len() as u16;
    wait_for(|| rig.queues[0].used_index() > rig.seen, "all of them");
    rig.expect(Op::Reset, (80, 7));
    for number in 0..rig.seen - 1 {
        assert_eq!(rig.queues[0].used(number).1, 0);
    }
    assert_eq!(rig.errors(), cases.len() as u64);

    // Room for a byte, and for bytes that are not memory.
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    let gone: &[_] = &[(BUFFERS + 0x8000, size, WRITE), (0xd000_0000, 100, WRITE)];
    rig.queues[0].offer_chain(200, gone);
    rig.queues[0].offer_chain(202, &[(BUFFERS + 0x9000, size + 1, WRITE)]);
    // The one that `expect` gave back comes first.
    stream.write_all(b"a").unwrap();
    assert_eq!(rig.bytes(1), b"a");
    stream.write_all(b"bc").unwrap();
    rig.queues[0].notify();
    wait_for(|| rig.queues[0].used_index() == rig.seen + 3, "the rest");
    let lens: Vec<u32> = (0..3).map(|n| rig.queues[0].used(rig.seen + n).1).collect();
    assert_eq!(lens, [0, size + 1, size + 1]);
}

#[test]
fn connections_are_limited_and_clients_wait_for_their_turn() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut streams = Vec::new();
    for guest in 0..MOST as u32 {
        rig.send(packet(Op::Request, (guest, 80)), &[]);
        streams.push(server.accept().unwrap().0);
        rig.expect(Op::Response, (80, guest));
    }
    rig.send(packet(Op::Request, (1000, 80)), &[]);
    rig.expect(Op::Reset, (80, 1000));
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.send(packet(Op::Reset, (3, 80)), &[]);
    let (request, _) = rig.packet();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 52));
    assert!(ends_of(&mut streams[3]));
}

/// Linux waits eight seconds for the end of a connection that it has closed, then it resets it.
#[test]
fn what_the_guest_sent_before_it_closed_arrives_even_if_it_does_not_wait() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    let chunk = [7; 0x1_0000];
    for _ in 0..4 {
        rig.send(data((1000, 80), &chunk), &chunk);
    }
    rig.send(closing((1000, 80), shutdown::BOTH), &[]);
    rig.send(packet(Op::Reset, (1000, 80)), &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all.len() == 4 * chunk.len() && all.iter().all(|byte| *byte == 7));
    wait_for(
        || rig.vsock.counters().snapshot().closed_total == 1,
        "the end",
    );
}

#[test]
fn a_reset_closes_all_connections_and_broken_rings_ask_for_one() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let mut stream = rig.connect(80, &server);
    rig.vsock.reset();
    rig.vsock.reset();
    assert!(ends_of(&mut stream));
    // Who comes meanwhile waits.
    let mut client = rig.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.queues = Rig::queues(&rig.memory);
    (rig.seen, rig.sent) = (0, 0);
    rig.activate();
    for index in 0..32 {
        rig.offer(index, BUFFER);
    }
    rig.queues[0].notify();
    assert_eq!(rig.packet().0.op, Op::Request as u16);
    drop(server);
    std::fs::remove_file(rig.path(80)).unwrap();
    rig.works(80);
    for queue in 0..2 {
        rig.queues[queue].set_avail_index(0x4000);
        rig.queues[queue].notify();
    }
    rig.client().write_all(b"CONNECT 52\n").unwrap();
    wait_for(
        || rig.interrupt.reset.load(Ordering::SeqCst) > 0,
        "reset request",
    );
}

#[test]
fn the_socket_is_removed_and_a_dead_one_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let mut socket = VsockSocket::open(&path).unwrap();
    let taken = VsockSocket::open(&path).unwrap_err().to_string();
    assert!(
        taken.contains("--vsock") && taken.contains("a running server"),
        "{taken}"
    );
    socket.remove();
    assert!(!path.exists());
    drop(VsockSocket::open(&path).unwrap());
    assert!(!path.exists());
    let long = folder.path().join("x".repeat(96));
    let long = VsockSocket::open(&long).unwrap_err().to_string();
    assert!(long.contains("at most 96"), "{long}");
    std::fs::write(&path, "").unwrap();
    let file = VsockSocket::open(&path).unwrap_err().to_string();
    assert!(file.contains("no socket"), "{file}");
}

/// Numbers of the specification: a socket device is 19; the bits are those of virtio 1.3, 6.
#[test]
fn the_device_says_what_it_is() {
    let rig = Rig::new();
    let features = [32, 29, 28].iter().fold(0, |all, bit| all | 1 << bit);
    assert_eq!(
        (rig.vsock.device_type(), rig.vsock.features()),
        (19, features)
    );
    let mut config = [0xff; 12];
    rig.vsock.read_config(0, &mut config);
    assert_eq!(config, [52, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.vsock.read_config(u64::MAX, &mut config[..2]);
    assert_eq!(config[..2], [0, 0]);
}

#[test]
fn a_restored_driver_hears_once_that_its_connections_are_gone() {
    let mut rig = Rig::new();
    let server = rig.listen(80);
    let _stream = rig.connect(80, &server);
    rig.client().write_all(b"CONNECT 52\n").unwrap();
    let port = rig.packet().0.src_port;
    let state = rig.vsock.save().unwrap();
    rig.vsock.reset();
    rig.vsock.restore(&state).unwrap();
    rig.queues = Rig::queues(&rig.memory);
    (rig.seen, rig.sent) = (0, 0);
    rig.activate();
    for index in 0..32 {
        rig.offer(index, BUFFER);
    }
    // It has given no buffer for that yet.
    rig.works(81);
    rig.memory.write_obj(u64::MAX, GuestAddress(SENT)).unwrap();
    rig.queues[2].offer_chain(0, &[(SENT, 8, WRITE)]);
    rig.queues[2].offer_chain(1, &[(SENT + 8, 8, WRITE)]);
    rig.queues[2].run_until_used(1);
    assert_eq!(rig.queues[2].used(0), (0, 4));
    let event: u64 = rig.memory.read_obj(GuestAddress(SENT)).unwrap();
    assert_eq!(event, u64::from(u32::MAX) << 32);
    rig.client().write_all(b"CONNECT 52\n").unwrap();
    assert!(
        rig.packet().0.src_port > port,
        "the driver may know that one"
    );
    assert_eq!(rig.queues[2].used_index(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_packets_stop_it(
        packets in prop::collection::vec(
            ((0..9_u16, 0..4_u32, 80..82_u32, 0..3_u16), (0..300_u32, 0..300_usize, 0..4_u32), (any::<u32>(), any::<u32>())),
            1..60,
        ),
    ) {
        let mut rig = Rig::new();
        let _server = rig.listen(80);
        for ((op, guest, host, kind), (len, has, flags), (buf_alloc, fwd_cnt)) in packets {
            let header = Header {
                op,
                kind,
                len,
                flags,
                buf_alloc,
                fwd_cnt,
                ..packet(Op::Data, (guest, host))
            };
            rig.send(header, &vec![5; has]);
            while rig.seen != rig.queues[0].used_index() {
                rig.packet();
            }
        }
        rig.vsock.reset();
        rig.queues = Rig::queues(&rig.memory);
        (rig.seen, rig.sent) = (0, 0);
        rig.activate();
        for index in 0..32 {
            rig.offer(index, BUFFER);
        }
        rig.works(90);
    }

    #[test]
    fn no_bytes_in_the_rings_stop_it(
        table in prop::collection::vec((0..0x80_0000_u64, 0..0x1_1000_u32, 0..8_u16, 0..18_u16), 16),
        heads in prop::collection::vec((0..2_usize, 0..18_u16), 0..16),
        jump in 0..24_u16,
    ) {
        let mut rig = Rig::without_buffers();
        for (n, &(addr, len, flags, next)) in table.iter().enumerate() {
            for queue in &rig.queues[..2] {
                queue.describe(n as u16, (addr, len), flags, next);
            }
        }
        for &(queue, head) in &heads {
            rig.queues[queue].offer(head);
        }
        for queue in &rig.queues[..2] {
            queue.set_avail_index(queue.avail_index().wrapping_add(jump));
            queue.notify();
        }
        rig.client().write_all(b"CONNECT 5\n").unwrap();
        rig.vsock.reset();
        rig.queues = Rig::queues(&rig.memory);
        rig.activate();
        for index in 0..32 {
            rig.offer(index, BUFFER);
        }
        rig.works(90);
    }
}
