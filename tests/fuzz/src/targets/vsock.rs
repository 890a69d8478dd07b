//! A vsock, whose driver sends the packets that the input describes, with programs of the host at the other ends.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use ebb_vmm::bus::BusDevice;
use ebb_vmm::config::VsockConfig;
use ebb_vmm::devices::virtio::mmio::MmioTransport;
use ebb_vmm::devices::virtio::vsock::{Vsock, VsockSocket};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::devices::{STATUS, transport, wait_until_heard};
use super::machine::memory;
use crate::Bytes;

const CID: u32 = 3;
const ENTRIES: u64 = 16;
/// Where the queues are, 64 KiB for each; the packets, and the buffers, 4 KiB for each.
const QUEUES: u64 = 0x1_0000;
const PACKETS: u64 = 0x10_0000;
const BUFFERS: u64 = 0x20_0000;
const PAGE: u64 = 4096;

/// Sends up to 64 packets, 16 at a time, and takes what comes. `bare`: the guest gives no buffers for that.
pub fn run(input: &[u8]) {
    let mut input = Bytes::new(input);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("v");
    let socket = VsockSocket::open(&path).expect("a socket");
    let server = UnixListener::bind(folder.path().join("v_80")).expect("a server");
    server.set_nonblocking(true).expect("a server");
    let config = VsockConfig {
        cid: CID,
        path: path.clone(),
    };
    let vsock = Vsock::new(&config, &socket).expect("a thread");
    let memory = memory();
    let mut device = transport(&memory, Box::new(vsock));
    let view = memory.ram().memory();
    let is_bare = input.u8() & 1 != 0;
    start(&mut device);
    let mut client = UnixStream::connect(&path).expect("a client");
    client.write_all(b"CONNECT 1024\n").expect("a request");
    let mut streams = Vec::new();
    for round in 0..4 {
        send(&view, round, &mut input);
        if !is_bare {
            give(&view, round);
        }
        for queue in [0, 1, 1, 0] {
            wait_until_heard(queue, &mut device);
        }
        while let Ok((stream, _)) = server.accept() {
            // It may have been reset by now.
            let _ = (&stream).write_all(b"hello");
            streams.push(stream);
        }
    }
    device.shut_down();
    for mut stream in streams.into_iter().chain([client]) {
        // An end, whatever came before.
        while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
    }
}

fn start(device: &mut MmioTransport) {
    let mut write = |register: u64, value: u64| {
        let _ = device.write(register, &(value as u32).to_le_bytes());
    };
    for (register, value) in [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (0x24, 1),
        (0x20, 1),
        (STATUS, 11),
    ] {
        write(register, value);
    }
    for queue in 0..3 {
        let base = QUEUES * (1 + queue);
        write(0x30, queue);
        write(0x38, ENTRIES);
        for (register, at) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
            write(register, at);
        }
        write(0x44, 1);
    }
    write(STATUS, 15);
}

/// Puts descriptor `entry` of `queue` there, and makes all entries available once more.
fn describe(view: &GuestMemoryMmap, queue: u64, entry: u64, (addr, len, flags): (u64, u32, u64)) {
    let base = QUEUES * (1 + queue);
    for (offset, word) in [(0, addr), (8, u64::from(len) | flags << 32)] {
        let at = GuestAddress(base + 16 * entry + offset);
        view.write_obj(word, at).expect("RAM");
    }
    let at = GuestAddress(base + 0x1004 + 2 * entry);
    view.write_obj(entry as u16, at).expect("RAM");
}

fn make_available(view: &GuestMemoryMmap, queue: u64, round: u64) {
    let index = (ENTRIES * (1 + round)) as u16;
    let at = GuestAddress(QUEUES * (1 + queue) + 0x1002);
    view.write_obj(index, at).expect("RAM");
}

/// Headers mostly of what there could be, with any bytes behind them.
fn send(view: &GuestMemoryMmap, round: u64, input: &mut Bytes<'_>) {
    for entry in 0..ENTRIES {
        let (kind, op, len) = (input.u8(), input.u8(), input.u16());
        let port = |kind: u8, usual: [u32; 2]| usual[usize::from(kind & 1)];
        let mut header = [0; 44];
        header[0] = if kind & 0xc0 == 0xc0 {
            input.u8()
        } else {
            CID as u8
        };
        header[8] = if kind & 0x30 == 0x30 { input.u8() } else { 2 };
        header[16..20].copy_from_slice(&port(op >> 4, [1024, 1025]).to_le_bytes());
        header[20..24].copy_from_slice(&port(op >> 5, [80, 1 << 30]).to_le_bytes());
        let said = if kind & 0xc == 0xc {
            input.u32()
        } else {
            u32::from(len)
        };
        header[24..28].copy_from_slice(&said.to_le_bytes());
        header[28] = if kind & 3 == 3 { input.u8() } else { 1 };
        header[30] = op & 0xf;
        header[32] = input.u8();
        header[36..40].copy_from_slice(&input.u32().to_le_bytes());
        header[40..44].copy_from_slice(&input.u32().to_le_bytes());
        let at = PACKETS + PAGE * entry;
        view.write_slice(&header, GuestAddress(at)).expect("RAM");
        // More than a page is in the next packet, or in what follows.
        describe(view, 1, entry, (at, 44 + u32::from(len), 0));
    }
    make_available(view, 1, round);
}

fn give(view: &GuestMemoryMmap, round: u64) {
    for entry in 0..ENTRIES {
        describe(view, 0, entry, (BUFFERS + PAGE * entry, PAGE as u32, 2));
    }
    make_available(view, 0, round);
}
