//! Frames and requests for random bytes, in a machine that has an interface and a source of these, too.

use std::net::Ipv4Addr;

use ebb_payload::script::Script;

use super::{Case, case};
use crate::machine::RAM;
use crate::virtio::{Buffer, Device, Queue, STATUS, WRITE, empty, queue, table};

/// Buffers for frames are here.
const PLAY: u64 = ebb_payload::freestanding::map::TEST_MEMORY;

/// What comes after disks and balloon, in the place where other machines have their vsock.
const NET: Device = Device(0xd000_3000);
const RNG: Device = Device(0xd000_4000);

/// The host's address at the interface.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 19, 1);
/// Bytes of the header in front of each frame, and of the largest frame.
const HEADER: u32 = 12;
const FRAME: u32 = 65535 + 18;

/// A frame that the host answers: who has its address (RFC 826), behind a header that is `header` and zeroes.
fn question(s: &mut Script<'_>, header: &[u8]) -> Buffer {
    let mut frame = header.to_vec();
    frame.resize(HEADER as usize, 0);
    let own = [2, 0, 0, 0, 0, 9];
    frame.extend([0xff; 6]);
    frame.extend(own);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(own);
    frame.extend([10, 77, 19, 2]);
    frame.extend([0; 6]);
    frame.extend(HOST.octets());
    (s.data(&frame, 8), frame.len() as u32, 0)
}

/// Sets the queues up, with these chains to send, each of one buffer, and these for what comes.
fn start(s: &mut Script<'_>, sent: &[Buffer], spaces: &[Buffer]) -> (Queue, Queue) {
    let mut ring = |buffers: &[Buffer]| {
        let heads: Vec<u16> = (0..buffers.len() as u16).collect();
        queue(s, &table(buffers), &heads)
    };
    let (receive, transmit) = (ring(spaces), ring(sent));
    NET.start(s, 0, &[receive, transmit]);
    NET.notify(s, 0);
    NET.notify(s, 1);
    transmit.returns(s, sent.len() as u64);
    (receive, transmit)
}

/// The host answers a good frame, and the answer comes.
fn is_answered(s: &mut Script<'_>) {
    let sent = [question(s, &[])];
    let (receive, _) = start(s, &sent, &[(PLAY, 2048, WRITE)]);
    receive.returns(s, 1);
    NET.is_well(s);
}

pub const CASES: &[Case] = &[
    case(
        "net_frames_of_wrong_lengths",
        "sends frames that are none, that are cut, and that are larger than any",
        |s| {
            let (at, ..) = question(s, &[]);
            let sent = [
                (at, 1, 0),
                (at, HEADER, 0),
                (at, HEADER + 13, 0),
                (PLAY, HEADER + FRAME + 1, 0),
                (PLAY, 0xffff_ffff, 0),
                (at, HEADER + 42, WRITE),
            ];
            start(s, &sent, &[]);
            NET.is_well(s);
            is_answered(s);
        },
    ),
    case(
        "net_headers_that_lie",
        "asks for checksums outside of the frame, and for segments of 0 bytes and of kinds that do not exist",
        |s| {
            let headers: [&[u8]; 6] = [
                &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
                &[1, 0, 0, 0, 0, 0, 40, 0, 0xff, 0xff],
                &[1, 1, 0xff, 0xff, 0, 0, 14, 0, 16, 0],
                &[0, 0x7f, 0, 0, 1, 0],
                &[0, 0xff, 0xff, 0xff, 0xff, 0xff],
                &[0xff; HEADER as usize],
            ];
            let sent = headers.map(|header| question(s, header));
            start(s, &sent, &[]);
            NET.is_well(s);
            is_answered(s);
        },
    ),
    case(
        "net_buffers_out_of_memory",
        "sends from, and wants frames at, addresses that are not RAM, and in buffers of 1 and 11 bytes",
        |s| {
            let places = [0xd000_0000, RAM - 20, u64::MAX - 20, 1 << 63];
            let mut sent = places.map(|at| (at, HEADER + 42, 0)).to_vec();
            sent.push(question(s, &[]));
            let mut spaces = places.map(|at| (at, 2048, WRITE)).to_vec();
            spaces.extend([
                (PLAY, 1, WRITE),
                (PLAY, HEADER - 1, WRITE),
                (PLAY, 2048, 0),
                (PLAY, 2048, WRITE),
            ]);
            let (receive, _) = start(s, &sent, &spaces);
            receive.returns(s, spaces.len() as u64);
            NET.is_well(s);
        },
    ),
    case(
        "net_rings_that_jump",
        "makes more available than a queue has",
        |s| {
            for broken in 0..2 {
                let queues = [empty(s), empty(s)];
                NET.start(s, 0, &queues);
                s.store(queues[broken].available + 2, 2, 0x4000);
                // A frame to receive: only then are buffers looked for.
                NET.notify(s, broken as u64);
                NET.asks_for_reset(s);
            }
        },
    ),
    case(
        "rng_requests_that_are_none",
        "wants random bytes at addresses that are not RAM, in what may only be read, and more than there is RAM",
        |s| {
            let requests = [
                (0xd000_0000, 64, WRITE),
                (RAM - 20, 64, WRITE),
                (u64::MAX - 20, 64, WRITE),
                (PLAY, 64, 0),
                (PLAY, 0xffff_ffff, WRITE),
                (PLAY, 64, WRITE),
            ];
            let heads: Vec<u16> = (0..requests.len() as u16).collect();
            let queue = queue(s, &table(&requests), &heads);
            RNG.start(s, 0, &[queue]);
            RNG.notify(s, 0);
            queue.returns(s, requests.len() as u64);
            RNG.is_well(s);
            s.store(queue.available + 2, 2, 0x4000);
            RNG.notify(s, 0);
            RNG.asks_for_reset(s);
            RNG.set(s, STATUS, 0);
        },
    ),
];
