//! Virtio devices, whose driver writes what the input says into their registers and queues.

use std::fs;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

use ebb_core::release::Release;
use ebb_vmm::bus::BusDevice;
use ebb_vmm::config::{BalloonConfig, DiskConfig, DiskEngine};
use ebb_vmm::devices::virtio::VirtioDevice;
use ebb_vmm::devices::virtio::balloon::Balloon;
use ebb_vmm::devices::virtio::blk::{Block, Disk};
use ebb_vmm::devices::virtio::mmio::MmioTransport;
use ebb_vmm::guest_memory::GuestMemory;
use ebb_vmm::irq::Interrupt;
use tempfile::NamedTempFile;
use vm_memory::{Bytes as _, GuestAddress};

use super::machine::{REACH_MIB, memory};
use crate::Bytes;

/// Bytes of each disk, and what they are.
const DISK_BYTES: usize = 32 << 10;
const FILL: u8 = 0x5a;

/// Registers (virtio 1.3, 4.2.2).
pub const STATUS: u64 = 0x70;
const NOTIFY: u64 = 0x50;

/// An interrupt that nobody hears.
struct Unheard;

impl Interrupt for Unheard {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk that may not be written to, for all runs.
pub(super) fn read_only() -> &'static NamedTempFile {
    static FILE: OnceLock<NamedTempFile> = OnceLock::new();
    FILE.get_or_init(image)
}

fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(&[FILL; DISK_BYTES]).expect("written");
    file
}

pub(super) fn disk(
    file: &NamedTempFile,
    readonly: bool,
    engine: DiskEngine,
) -> Box<dyn VirtioDevice> {
    let config = DiskConfig {
        path: file.path().to_owned(),
        readonly,
        engine,
        ..DiskConfig::default()
    };
    let disk = Disk::open(&config).expect("a disk");
    Box::new(Block::new(0, disk, &config).expect("a thread"))
}

pub fn transport(memory: &GuestMemory, device: Box<dyn VirtioDevice>) -> MmioTransport {
    MmioTransport::new(device, memory.ram().memory(), Arc::new(Unheard)).expect("a transport")
}

pub(super) fn a_balloon(memory: &Arc<GuestMemory>) -> Box<dyn VirtioDevice> {
    let config = BalloonConfig {
        size: 0,
        deflate_on_oom: true,
        statistics_interval_s: 1,
        auto_reserve: None,
        free_page_reporting: Some(Release::Discard),
    };
    Box::new(Balloon::new(&config, Arc::clone(memory) as _).expect("a balloon"))
}

/// Any accesses to the registers of a disk or a balloon.
pub fn mmio(input: &[u8]) {
    let mut input = Bytes::new(input);
    let memory = memory();
    let mut device = match input.u8() % 2 {
        0 => transport(&memory, a_balloon(&memory)),
        _ => transport(&memory, disk(read_only(), true, DiskEngine::Auto)),
    };
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        let (kind, at) = (input.u8(), input.u8());
        let offset = match kind & 3 {
            0 => u64::from(at) | u64::from(input.u8()) << 8 & 0xfff,
            1 => 0x100 + u64::from(at),
            _ => u64::from(at) & !3,
        };
        let width = match kind & 0x18 {
            0 => 1 << (kind >> 6),
            _ => 4,
        };
        let mut data = input.u64().to_le_bytes();
        if kind & 4 == 0 {
            let _ = device.write(offset, &data[..width]);
        } else {
            device.read(offset, &mut data[..width]);
        }
    }
    device.shut_down();
}

/// Writes the input to memory, starts the device with queues there, and waits until it has served them.
fn drive(memory: &GuestMemory, device: Box<dyn VirtioDevice>, input: &mut Bytes<'_>) {
    let known = device.features();
    let mut device = transport(memory, device);
    let view = memory.ram().memory();
    let queues = u64::from(1 + input.u8() % 5);
    let features = input.u32() & known as u32;
    let mut write = |register: u64, value: u64| {
        let _ = device.write(register, &(value as u32).to_le_bytes());
    };
    for status in [0, 1, 3] {
        write(STATUS, status);
    }
    for (half, value) in [(0, features.into()), (1, 1)] {
        write(0x24, half);
        write(0x20, value);
    }
    write(STATUS, 11);
    for queue in 0..queues {
        // Each has 64 KiB: descriptors, the available ring and the used ring, of 16 entries. Buffers are where the input says.
        let base = (1 + queue) << 16;
        write(0x30, queue);
        write(0x38, 16);
        for (register, at) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
            write(register, at);
        }
        write(0x44, 1);
        fill_queue(&view, base, input);
    }
    // The rest is data: the first page behind the queues, which their buffers name often.
    let rest = input.rest();
    let _ = view.write_slice(&rest[..rest.len().min(0x8000)], GuestAddress(DATA));
    write(STATUS, 15);
    // A thread that has heard twice has served what was there before. The balloon has two, one of them for reports.
    let reports = if features & 2 == 0 { 2 } else { 3 };
    let threads = [Some(0), (features & 0x20 != 0).then_some(reports)];
    for queue in threads.into_iter().flatten().flat_map(|queue| [queue; 2]) {
        wait_until_heard(queue, &mut device);
    }
    device.shut_down();
}

/// Where the data of buffers is.
const DATA: u64 = 0x10_0000;

fn fill_queue(view: &vm_memory::GuestMemoryMmap, base: u64, input: &mut Bytes<'_>) {
    let count = u64::from(input.u8() % 17);
    for entry in 0..count {
        let kind = input.u8();
        let addr = match kind & 0xc0 {
            0xc0 => input.address(REACH_MIB),
            0x80 => base,
            _ => DATA + u64::from(input.u16() & 0x7fff),
        };
        let len = match kind & 0x30 {
            0 => u32::from(input.u16()),
            0x10 => 16,
            0x20 => 1 + 512 * u32::from(input.u8() % 4),
            _ => input.u32(),
        };
        let next = u64::from(input.u8());
        let (low, high) = (u64::from(len), u64::from(kind & 7) << 32 | next << 48);
        for (offset, word) in [(0, addr), (8, low | high)] {
            let at = GuestAddress(base + 16 * entry + offset);
            view.write_obj(word, at).expect("RAM");
        }
    }
    let heads = input.u8();
    let index = if heads < 0xf0 {
        u16::from(heads % 17)
    } else {
        input.u16()
    };
    let flags = u64::from(input.u8() & 1);
    view.write_obj(flags | u64::from(index) << 16, GuestAddress(base + 0x1000))
        .expect("RAM");
    for entry in 0..u64::from(index.min(16)) {
        let head = u16::from(input.u8());
        view.write_obj(head, GuestAddress(base + 0x1004 + 2 * entry))
            .expect("RAM");
    }
}

/// Notifies a queue, and waits until the device's thread has taken it. A device that has not started takes nothing.
pub fn wait_until_heard(queue: u32, device: &mut MmioTransport) {
    const DRIVER_OK: u32 = 4;
    const NEEDS_RESET: u32 = 64;
    let event = device.queue_notifiers().find(|(index, _)| *index == queue);
    let Some(event) = event.and_then(|(_, event)| event.try_clone().ok()) else {
        return;
    };
    let _ = device.write(NOTIFY, &queue.to_le_bytes());
    let mut status = [0; 4];
    loop {
        device.read(STATUS, &mut status);
        if u32::from_le_bytes(status) & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            return;
        }
        match event.read() {
            Ok(count) => event.write(count).expect("there is room"),
            Err(_) => return,
        }
        std::thread::yield_now();
    }
}

/// Queues of a balloon.
pub fn balloon(input: &[u8]) {
    let memory = memory();
    drive(&memory, a_balloon(&memory), &mut Bytes::new(input));
    let stats = memory.lazy().snapshot();
    assert_eq!(stats.lazy_bytes, 0, "the reset makes all RAM in use");
}

/// Queues of a disk.
pub fn block(input: &[u8]) {
    let mut input = Bytes::new(input);
    let memory = memory();
    let how = input.u8();
    let engine = match how & 2 {
        0 => DiskEngine::Auto,
        _ => DiskEngine::Threads,
    };
    if how.is_multiple_of(2) {
        let file = image();
        drive(&memory, disk(&file, false, engine), &mut input);
        let len = file.as_file().metadata().expect("metadata").len();
        assert_eq!(len, DISK_BYTES as u64, "no request changes the disk's size");
    } else {
        drive(&memory, disk(read_only(), true, engine), &mut input);
        let bytes = fs::read(read_only().path()).expect("the disk");
        assert!(
            bytes == [FILL; DISK_BYTES],
            "the disk may not be written to"
        );
    }
}
