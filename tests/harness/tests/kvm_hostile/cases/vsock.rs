//! Packets to a vsock.

use ebb_payload::script::Script;

use super::{Case, case};
use crate::machine::RAM;
use crate::virtio::{Buffer, ENTRIES, NEXT, Queue, VSOCK, WRITE, empty, queue, table};

/// Buffers for what comes are here, 4 KiB each.
const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;
const PAGE: u64 = 4096;
const HEADER: u32 = 44;
/// A port of the host where a program waits, and reads all.
pub const SERVED: u64 = 80;
/// One where nobody does.
const UNSERVED: u64 = 81;

/// The guest's number.
pub const CID: u64 = 3;

/// Operations (virtio 1.3, 5.10.6).
const REQUEST: u64 = 1;
const RESPONSE: u64 = 2;
const RESET: u64 = 3;
const SHUTDOWN: u64 = 4;
const DATA: u64 = 5;
const CREDIT_UPDATE: u64 = 6;
const CREDIT_REQUEST: u64 = 7;

/// A header's words, for a packet to this port of the host.
fn header(op: u64, port: u64) -> [u64; 6] {
    [CID, 2, 1000 | port << 32, 1 << 32 | op << 48, 1 << 52, 0]
}

/// Sets the queues up, with these chains to send, each of one buffer, and these for what comes.
fn start(s: &mut Script<'_>, sent: &[Buffer], spaces: &[Buffer]) -> (Queue, Queue) {
    let mut ring = |buffers: &[Buffer]| {
        let heads: Vec<u16> = (0..buffers.len() as u16).collect();
        queue(s, &table(buffers), &heads)
    };
    let (receive, transmit) = (ring(spaces), ring(sent));
    let events = empty(s);
    VSOCK.start(s, 0, &[receive, transmit, events]);
    VSOCK.notify(s, 0);
    VSOCK.notify(s, 1);
    transmit.returns(s, sent.len() as u64);
    (receive, transmit)
}

/// As many buffers for what comes as there can be.
fn pages() -> Vec<Buffer> {
    let page = |n| (PLAY + PAGE * n, PAGE as u32, WRITE);
    (0..u64::from(ENTRIES)).map(page).collect()
}

/// Sends packets; the operations of those that come must be these.
fn talk(s: &mut Script<'_>, packets: &[[u64; 6]], answers: &[u64]) {
    let sent: Vec<Buffer> = packets
        .iter()
        .map(|words| (s.words(words, 8), HEADER, 0))
        .collect();
    let (receive, _) = start(s, &sent, &pages());
    receive.returns(s, answers.len() as u64);
    for (page, op) in (0..).zip(answers) {
        s.load(PLAY + PAGE * page + 30, 2).expect_bits(0xffff, *op);
    }
    VSOCK.is_well(s);
}

pub const CASES: &[Case] = &[
    case(
        "vsock_packets_of_wrong_lengths",
        "sends headers that are cut, and that say more than there is",
        |s| {
            let mut long = header(DATA, SERVED);
            long[3] |= 1000;
            let mut endless = header(DATA, SERVED);
            endless[3] |= 0xffff_ffff;
            let (long, endless) = (s.words(&long, 8), s.words(&endless, 8));
            let sent = [
                (long, 1, 0),
                (long, HEADER - 1, 0),
                (long, HEADER, 0),
                (long, HEADER + 999, 0),
                (endless, HEADER, 0),
                (endless, 0xffff_ffff, 0),
                (long, HEADER, WRITE),
            ];
            start(s, &sent, &pages());
            VSOCK.is_well(s);
            talk(s, &[header(REQUEST, UNSERVED)], &[RESET]);
        },
    ),
    case(
        "vsock_packets_for_others",
        "sends packets as another guest, to other guests, and of kinds that do not exist",
        |s| {
            let other = |at: usize, value: u64| {
                let mut words = header(REQUEST, SERVED);
                words[at] = value;
                words
            };
            let packets = [
                other(0, 4),
                other(0, u64::MAX),
                other(1, CID),
                other(1, u64::MAX),
                other(3, 2 << 32 | REQUEST << 48),
                other(3, 1 << 32 | 0xffff << 48),
                other(3, 1 << 32),
            ];
            talk(s, &packets, &[RESET; 5]);
        },
    ),
    case(
        "vsock_packets_of_no_connection",
        "sends every operation for a connection that there is not",
        |s| {
            let ops = [
                RESPONSE,
                SHUTDOWN,
                DATA,
                CREDIT_UPDATE,
                CREDIT_REQUEST,
                RESET,
            ];
            let packets = ops.map(|op| header(op, SERVED));
            talk(s, &packets, &[RESET; 5]);
        },
    ),
    case(
        "vsock_credits_that_overflow",
        "claims credit beyond 32 bits, and to have taken what it never got",
        |s| {
            let credit = |room: u64, taken: u64| {
                let mut words = header(CREDIT_REQUEST, SERVED);
                (words[4], words[5]) = (room << 32, taken);
                words
            };
            let packets = [
                header(REQUEST, SERVED),
                credit(0xffff_ffff, 0xffff_ffff),
                credit(0, 1),
                credit(0xffff_ffff, 0x8000_0000),
                header(REQUEST, SERVED),
            ];
            // Requests for the credit that come together get one answer.
            let sent: Vec<Buffer> = packets
                .iter()
                .map(|words| (s.words(words, 8), HEADER, 0))
                .collect();
            start(s, &sent, &pages());
            VSOCK.is_well(s);
            talk(s, &[header(REQUEST, SERVED)], &[RESPONSE]);
        },
    ),
    case(
        "vsock_flood_of_requests",
        "makes 264 requests that are refused, without a buffer for the answers, then gives some",
        |s| {
            let at = s.words(&header(REQUEST, UNSERVED), 8);
            let sent = [(at, HEADER, 0); ENTRIES as usize];
            let (receive, transmit) = start(s, &sent, &[]);
            let entries = u64::from(ENTRIES);
            for round in 2..=32 {
                s.store(transmit.available + 2, 2, entries * round);
                VSOCK.notify(s, 1);
                transmit.returns(s, entries * round);
            }
            s.store(transmit.available + 2, 2, entries * 33);
            VSOCK.notify(s, 1);
            for (entry, (addr, len, flags)) in (0..).zip(pages()) {
                s.store(receive.descriptors + 16 * entry, 8, addr);
                s.store(
                    receive.descriptors + 16 * entry + 8,
                    8,
                    u64::from(len) | u64::from(flags) << 32,
                );
                s.store(receive.available + 4 + 2 * entry, 2, entry);
            }
            for round in 1..=33 {
                s.store(receive.available + 2, 2, entries * round);
                VSOCK.notify(s, 0);
                receive.returns(s, entries * round);
            }
            transmit.returns(s, entries * 33);
            VSOCK.is_well(s);
        },
    ),
    case(
        "vsock_buffers_out_of_memory",
        "sends from, and wants packets at, addresses that are not RAM",
        |s| {
            let places = [0xd000_0000, RAM - 20, u64::MAX - 20, 1 << 63];
            let mut sent = places.map(|at| (at, HEADER, 0)).to_vec();
            sent.push((s.words(&header(REQUEST, UNSERVED), 8), HEADER, 0));
            let mut spaces = places.map(|at| (at, PAGE as u32, WRITE)).to_vec();
            spaces.push((PLAY, PAGE as u32, WRITE));
            let (receive, _) = start(s, &sent, &spaces);
            receive.returns(s, 5);
            s.load(PLAY + 30, 2).expect_bits(0xffff, RESET);
            VSOCK.is_well(s);
        },
    ),
    case(
        "vsock_tiny_buffers",
        "wants packets in buffers of 1, 43 and 44 bytes, and in such that may only be read",
        |s| {
            let sent = [(s.words(&header(REQUEST, UNSERVED), 8), HEADER, 0)];
            let spaces = [
                (PLAY, 1, WRITE),
                (PLAY, HEADER - 1, WRITE),
                (PLAY, HEADER, WRITE),
                (PLAY, PAGE as u32, 0),
                (PLAY, HEADER + 1, WRITE),
            ];
            let (receive, _) = start(s, &sent, &spaces);
            receive.returns(s, 5);
            s.load(PLAY + 30, 2).expect_bits(0xffff, RESET);
            VSOCK.is_well(s);
        },
    ),
    case(
        "vsock_header_and_bytes_in_pieces",
        "sends a request in pieces of a byte, and bytes in buffers that overlap",
        |s| {
            let (request, mut data) = (header(REQUEST, SERVED), header(DATA, SERVED));
            data[3] |= 3 * 4096;
            let (request, data) = (s.words(&request, 8), s.words(&data, 8));
            let descriptors = table(&[
                (request, 1, NEXT),
                (request + 1, 1, NEXT),
                (request + 2, HEADER - 2, 0),
                (data, HEADER, NEXT),
                (PLAY, 4096, NEXT),
                (PLAY + 1, 4096, NEXT),
                (PLAY, 4096, 0),
            ]);
            let (transmit, receive) = (queue(s, &descriptors, &[0, 3]), empty(s));
            let events = empty(s);
            VSOCK.start(s, 0, &[receive, transmit, events]);
            VSOCK.notify(s, 1);
            transmit.returns(s, 2);
            VSOCK.is_well(s);
        },
    ),
    case(
        "vsock_rings_that_jump",
        "makes more available than a queue has",
        |s| {
            for broken in 0..2 {
                let at = s.words(&header(REQUEST, UNSERVED), 8);
                let queues = [
                    empty(s),
                    queue(s, &table(&[(at, HEADER, 0)]), &[0]),
                    empty(s),
                ];
                VSOCK.start(s, 0, &queues);
                s.store(queues[broken].available + 2, 2, 0x4000);
                VSOCK.notify(s, 1);
                VSOCK.asks_for_reset(s);
            }
        },
    ),
];
