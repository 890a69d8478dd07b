//! The disk against a driver that may be hostile.

mod clearing;
mod live;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::wire::{STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use super::*;
use crate::devices::virtio::queue::tests::driver::{
    INDIRECT, MockInterrupt, MockQueue, NEXT, WRITE, memory, wait_for,
};

const QUEUE: u64 = 0x10_0000;
const HEADER: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
const STATUS: u64 = 0x40_0000;
const SECTORS: u64 = 64;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// Address, length and flags of each buffer of a chain.
type Buffers<'a> = &'a [(u64, u32, u16)];

struct Rig {
    dir: tempfile::TempDir,
    memory: Arc<GuestMemoryMmap>,
    queue: MockQueue,
    block: Block,
    interrupt: Arc<MockInterrupt>,
}

fn config(path: PathBuf, readonly: bool) -> DiskConfig {
    DiskConfig {
        path,
        readonly,
        ..DiskConfig::default()
    }
}

/// Sector n is full of n.
fn content() -> Vec<u8> {
    (0..SECTORS as usize * 512)
        .map(|at| (at / 512) as u8)
        .collect()
}

impl Rig {
    fn new(readonly: bool) -> Self {
        Self::with(|config| config.readonly = readonly)
    }

    /// A disk with `content`, as `set` has changed its configuration.
    fn with(set: impl FnOnce(&mut DiskConfig)) -> Self {
        // O_DIRECT needs a real file system, which a folder for temporary files may not be on.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, content()).unwrap();
        let mut config = config(path, false);
        set(&mut config);
        let disk = Disk::open(&config).unwrap();
        Self::over(dir, disk, &config)
    }

    fn over(dir: tempfile::TempDir, disk: Disk, config: &DiskConfig) -> Self {
        let memory = memory(8);
        let mut rig = Self {
            dir,
            queue: MockQueue::new(&memory, QUEUE, 16),
            memory,
            block: Block::new(3, disk, config).unwrap(),
            interrupt: Arc::default(),
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.block.features(),
            queues: vec![Some(self.queue.handle())],
            interrupt: self.interrupt.clone(),
        };
        self.block.activate(activation).unwrap();
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk")).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&raw, GuestAddress(HEADER)).unwrap();
        self.memory
            .write_obj(0xee_u8, GuestAddress(STATUS))
            .unwrap();
    }

    /// Runs the chain of `buffers`. Returns status and length.
    fn run(&self, buffers: Buffers) -> (u8, u32) {
        let used = self.queue.used_index();
        self.queue.offer_chain(0, buffers);
        self.queue.run_until_used(used.wrapping_add(1));
        let status = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        (status, self.queue.used(used).1)
    }

    fn request(&self, kind: u32, sector: u64, bytes: u32) -> (u8, u32) {
        self.header(kind, sector);
        let direction = if kind == OUT { 0 } else { WRITE };
        let mut buffers = vec![
            (HEADER, 16, 0),
            (DATA, bytes, direction),
            (STATUS, 1, WRITE),
        ];
        if bytes == 0 {
            buffers.remove(1);
        }
        self.run(&buffers)
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        data
    }

    fn assert_alive(&self) {
        assert_eq!(self.request(IN, 2, 512), (STATUS_OK, 513));
        assert_eq!(self.data(512), content()[1024..1536]);
    }
}

#[test]
fn what_is_written_is_read_back() {
    let rig = Rig::new(false);
    assert_eq!(rig.request(IN, 1, 1024), (STATUS_OK, 1025));
    assert_eq!(rig.data(1024), content()[512..1536]);
    rig.memory
        .write_slice(&[0xab; 512], GuestAddress(DATA))
        .unwrap();
    assert_eq!(rig.request(OUT, SECTORS - 1, 512), (STATUS_OK, 1));
    assert_eq!(rig.request(FLUSH, 0, 0), (STATUS_OK, 1));
    let mut expected = content();
    expected[(SECTORS as usize - 1) * 512..].fill(0xab);
    assert_eq!(rig.image(), expected);
    let expected = DiskStats {
        reads_total: 1,
        read_bytes_total: 1024,
        writes_total: 1,
        written_bytes_total: 512,
        flushes_total: 1,
        errors_total: 0,
        throttled_total: 0,
        discarded_bytes_total: 0,
        zeroed_bytes_total: 0,
    };
    assert_eq!(rig.block.handle().stats(), expected);
    wait_for(
        || rig.interrupt.used.load(Ordering::SeqCst) == 3,
        "interrupts",
    );
}

/// `VRING_AVAIL_F_NO_INTERRUPT`.
#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut rig = Rig::new(false);
    let flags = GuestAddress(rig.queue.avail());
    rig.memory.write_obj(1_u16, flags).unwrap();
    assert_eq!(rig.request(FLUSH, 0, 0), (STATUS_OK, 1));
    // Joins the thread, which ends its pass first.
    rig.block.reset();
    assert_eq!(rig.interrupt.used.load(Ordering::SeqCst), 0);
}

/// A pipe cannot be flushed: fdatasync(2) fails with EINVAL. So its error proves that the call was made.
#[test]
fn a_flush_reaches_the_host_and_its_failure_the_guest() {
    for engine in ENGINES {
        let config = DiskConfig {
            engine,
            ..DiskConfig::default()
        };
        for (readonly, status, flushes) in [(false, STATUS_IOERR, 0), (true, STATUS_OK, 1)] {
            let (reader, _writer) = std::io::pipe().unwrap();
            let disk = Disk::over(OwnedFd::from(reader).into(), readonly);
            let rig = Rig::over(tempfile::tempdir().unwrap(), disk, &config);
            assert_eq!(rig.request(FLUSH, 0, 0).0, status, "readonly={readonly}");
            let counted = rig.block.handle().stats().flushes_total;
            assert_eq!(counted, flushes, "{engine:?} readonly={readonly}");
        }
    }
}

#[test]
fn requests_may_be_cut_anywhere() {
    let rig = Rig::new(false);
    rig.header(IN, 4);
    let chain = [
        (HEADER, 3, 0),
        (HEADER + 3, 13, 0),
        (DATA, 100, WRITE),
        (DATA + 100, 1, WRITE),
        (DATA + 101, 923, WRITE),
        (STATUS, 1, WRITE),
    ];
    assert_eq!(rig.run(&chain), (STATUS_OK, 1025));
    assert_eq!(rig.data(1024), content()[2048..3072]);
    // Data and status in one buffer, through an indirect table.
    rig.header(IN, 5);
    let table = 0x50_0000;
    rig.queue.describe_at(table, 0, (HEADER, 16), NEXT, 1);
    rig.queue
        .describe_at(table, 1, (STATUS - 512, 513), WRITE, 0);
    assert_eq!(rig.run(&[(table, 32, INDIRECT)]), (STATUS_OK, 513));
}

#[test]
fn the_id_is_cut_to_its_buffer() {
    let rig = Rig::new(true);
    assert_eq!(rig.request(GET_ID, 0, 20), (STATUS_OK, 21));
    let id = rig.data(20);
    assert_eq!(rig.request(GET_ID, 0, 4), (STATUS_OK, 5));
    assert_eq!(rig.data(4), id[..4]);
    assert_eq!(rig.request(GET_ID, 0, 64).0, STATUS_OK);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let rig = Rig::new(true);
    assert_ne!(rig.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(rig.request(OUT, 0, 512).0, STATUS_IOERR);
    assert_eq!(rig.request(FLUSH, 0, 0).0, STATUS_OK);
    assert_eq!(rig.image(), content());
    rig.assert_alive();
}

#[test]
fn requests_that_leave_the_disk_fail() {
    let rig = Rig::new(false);
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
    ] {
        for kind in [IN, OUT] {
            assert_eq!(
                rig.request(kind, sector, bytes).0,
                STATUS_IOERR,
                "{kind} {sector} {bytes}"
            );
        }
    }
    for kind in [2, 3, 5, 12, 14, u32::MAX] {
        assert_eq!(rig.request(kind, 0, 512).0, STATUS_UNSUPP, "{kind}");
    }
    assert_eq!(rig.image(), content());
    assert_eq!(rig.block.handle().stats().errors_total, 18);
    rig.assert_alive();
}

#[test]
fn a_file_that_shrank_is_an_input_error() {
    let rig = Rig::new(false);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.dir.path().join("disk"))
        .unwrap();
    file.set_len(2048).unwrap();
    assert_eq!(rig.request(IN, 3, 1024).0, STATUS_IOERR);
    rig.assert_alive();
}

#[test]
fn a_host_without_room_is_an_error_of_writes_only() {
    let mut options = fs::OpenOptions::new();
    let full = options.read(true).write(true).open("/dev/full").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::over(dir, Disk::over(full, false), &DiskConfig::default());
    assert_eq!(rig.request(OUT, 0, 512).0, STATUS_IOERR);
    assert_eq!(rig.request(IN, 0, 512).0, STATUS_OK);
}

#[test]
fn bad_chains_are_refused_and_the_queue_goes_on() {
    let rig = Rig::new(false);
    rig.header(IN, 0);
    let cases: [(&str, Buffers, u8); 7] = [
        ("no status", &[(HEADER, 16, 0)], 0xee),
        (
            "short header",
            &[(HEADER, 15, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
            STATUS_IOERR,
        ),
        (
            "no header",
            &[(DATA, 512, WRITE), (STATUS, 1, WRITE)],
            STATUS_IOERR,
        ),
        (
            "header is not memory",
            &[(0xd000_0000, 16, 0), (STATUS, 1, WRITE)],
            STATUS_IOERR,
        ),
        (
            "data is not memory",
            &[
                (HEADER, 16, 0),
                (0xd000_0000, 512, WRITE),
                (STATUS, 1, WRITE),
            ],
            STATUS_IOERR,
        ),
        (
            "data leaves memory",
            &[
                (HEADER, 16, 0),
                ((8 << 20) - 256, 512, WRITE),
                (STATUS, 1, WRITE),
            ],
            STATUS_IOERR,
        ),
        (
            "status is not memory",
            &[(HEADER, 16, 0), (DATA, 512, WRITE), (0xd000_0000, 1, WRITE)],
            0xee,
        ),
    ];
    for (what, chain, status) in cases {
        rig.header(IN, 0);
        assert_eq!(rig.run(chain).0, status, "{what}");
        rig.assert_alive();
    }
    // Readable after writable: the status is where the writable part ends.
    rig.header(IN, 0);
    assert_eq!(
        rig.run(&[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)])
            .0,
        STATUS_IOERR
    );
    // A loop.
    let used = rig.queue.used_index();
    rig.queue.describe(0, (HEADER, 16), NEXT, 0);
    rig.queue.offer(0);
    rig.queue.run_until_used(used + 1);
    rig.assert_alive();
    assert_eq!(rig.image(), content());
}

#[test]
fn reset_stops_the_thread_and_the_driver_can_come_back() {
    let mut rig = Rig::new(false);
    for _ in 0..3 {
        rig.assert_alive();
        rig.block.reset();
        rig.block.reset();
        let used = rig.queue.used_index();
        rig.queue
            .offer_chain(0, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
        rig.queue.notify();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(rig.queue.used_index(), used, "nobody serves the queue");
        rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
        rig.activate();
    }
    rig.queue.set_avail_index(0x4000);
    rig.queue.notify();
    wait_for(
        || rig.interrupt.reset.load(Ordering::SeqCst) == 1,
        "reset request",
    );
}

/// Without a look at the clock: a bucket that fills in a day does not fill here.
#[test]
fn limits_hold_requests_back_and_a_reset_does_not_help() {
    let read = 16 + 512 + 1;
    for (bandwidth, operations, expected) in [
        (None, Some("1/86400000+2"), 3),
        (None, Some("4/86400000"), 4),
        // The second one begins, because there is a byte left.
        (Some(format!("{}/86400000", read + 1)), None, 2),
        (Some(format!("{read}/86400000")), Some("9"), 1),
    ] {
        let rate = |text: &str| text.parse().unwrap();
        let mut rig = Rig::with(|config| {
            config.bw = bandwidth.as_deref().map(rate);
            config.ops = operations.map(rate);
        });
        for _ in 0..expected {
            assert_eq!(rig.request(IN, 0, 512), (STATUS_OK, 513));
        }
        let throttled = |rig: &Rig| rig.block.handle().stats().throttled_total;
        let chain = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        for round in 1..3 {
            let before = throttled(&rig);
            rig.header(IN, 0);
            rig.queue.offer_chain(0, &chain);
            rig.queue.notify();
            wait_for(|| throttled(&rig) > before, "limit");
            assert_eq!(
                rig.block.handle().stats().reads_total,
                expected,
                "round {round}"
            );
            rig.block.reset();
            rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
            rig.activate();
        }
    }
}

#[test]
fn what_was_held_back_goes_on_by_itself() {
    let rig = Rig::with(|config| config.ops = Some("1/200".parse().unwrap()));
    for first in [0, 3, 6] {
        rig.offer(first, IN, 2, (DATA, 512));
    }
    rig.queue.run_until_used(3);
    for first in [0, 3, 6] {
        assert_eq!(rig.status(first), STATUS_OK);
    }
    assert!(rig.block.handle().stats().throttled_total > 0);
}

/// Numbers of the specification: a block device is 2; the bits are those of virtio 1.3, 5.2.3 and 6.
#[test]
fn the_device_says_what_it_is_and_can_do() {
    let always = [32, 29, 28, 2, 6, 9]
        .iter()
        .fold(0, |all, bit| all | 1 << bit);
    let clearing = 1 << 13 | 1 << 14;
    for (readonly, queues, expected) in [
        (false, 1, always | clearing),
        (true, 1, always | 1 << 5),
        (false, 3, always | clearing | 1 << 12),
    ] {
        let rig = Rig::with(|config| (config.readonly, config.queues) = (readonly, queues));
        assert_eq!(rig.block.features(), expected);
        assert_eq!(rig.block.device_type(), 2);
        assert_eq!(rig.block.queue_sizes(), vec![QUEUE_SIZE; queues.into()]);
    }
}

#[test]
fn the_configuration_tells_the_size() {
    let rig = Rig::new(false);
    let mut data = [0xff; 8];
    rig.block.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), SECTORS);
    rig.block.read_config(20, &mut data);
    assert_eq!(data, [0, 2, 0, 0, 0, 0, 0, 0]);
    rig.block.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
}

/// Both ways to carry out requests.
const ENGINES: [DiskEngine; 2] = [DiskEngine::IoUring, DiskEngine::Threads];

impl Rig {
    /// Describes and offers a request in the descriptors from `first` on, with a header, data and status of its own.
    fn offer(&self, first: u16, kind: u32, sector: u64, (data, bytes): (u64, u32)) {
        let header = HEADER + 64 * u64::from(first);
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&raw, GuestAddress(header)).unwrap();
        let status = STATUS + u64::from(first);
        self.memory
            .write_obj(0xee_u8, GuestAddress(status))
            .unwrap();
        let direction = if kind == OUT { 0 } else { WRITE };
        let mut buffers = vec![
            (header, 16, 0),
            (data, bytes, direction),
            (status, 1, WRITE),
        ];
        if bytes == 0 {
            buffers.remove(1);
        }
        self.queue.offer_chain(first, &buffers);
    }

    fn status(&self, first: u16) -> u8 {
        let at = STATUS + u64::from(first);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

#[test]
fn several_requests_at_once_are_each_answered() {
    for engine in ENGINES {
        let rig = Rig::with(|config| config.engine = engine);
        for round in 0..50 {
            let used = rig.queue.used_index();
            for n in 0..5_u16 {
                let sector = (round * 5 + u64::from(n)) % SECTORS;
                rig.offer(3 * n, IN, sector, (DATA + 4096 * u64::from(n), 512));
            }
            rig.queue.run_until_used(used.wrapping_add(5));
            for n in 0..5_u16 {
                assert_eq!(rig.status(3 * n), STATUS_OK);
                let at = DATA + 4096 * u64::from(n) + 511;
                let byte: u8 = rig.memory.read_obj(GuestAddress(at)).unwrap();
                let sector = (round * 5 + u64::from(n)) % SECTORS;
                assert_eq!(u64::from(byte), sector, "{engine:?} {round} {n}");
            }
        }
        assert_eq!(rig.block.handle().stats().reads_total, 250, "{engine:?}");
    }
}

/// A request of 3 MiB and 512 bytes is done in four parts, and its data stays in order.
#[test]
fn a_long_request_goes_in_parts() {
    for (engine, direct) in [
        (DiskEngine::IoUring, false),
        (DiskEngine::IoUring, true),
        (DiskEngine::Threads, false),
        (DiskEngine::Threads, true),
    ] {
        let rig = Rig::with(|config| {
            let file = fs::OpenOptions::new().write(true).open(&config.path);
            file.unwrap().set_len(4 << 20).unwrap();
            (config.engine, config.direct) = (engine, direct);
        });
        let bytes = (3 << 20) + 512_u32;
        let data: Vec<u8> = (0..bytes).map(|at| (at / 512 % 251) as u8).collect();
        // Behind queue, header and status.
        let at = 4 << 30;
        rig.memory.write_slice(&data, GuestAddress(at)).unwrap();
        for (kind, sector) in [(OUT, 8), (IN, 8)] {
            rig.header(kind, sector);
            let direction = if kind == OUT { 0 } else { WRITE };
            let chain = [(HEADER, 16, 0), (at, bytes, direction), (STATUS, 1, WRITE)];
            let used = rig.queue.used_index();
            rig.queue.offer_chain(0, &chain);
            rig.queue.run_until_used(used + 1);
            let status: u8 = rig.memory.read_obj(GuestAddress(STATUS)).unwrap();
            assert_eq!(status, STATUS_OK, "{engine:?} {direct}");
            assert_eq!(rig.image()[4096..4096 + data.len()], data);
            let mut seen = vec![0; data.len()];
            rig.memory.read_slice(&mut seen, GuestAddress(at)).unwrap();
            assert!(seen == data, "{engine:?} {direct}");
        }
    }
}

/// Memory at odd addresses and in odd pieces, which the host's disk does not take.
#[test]
fn direct_access_moves_memory_that_does_not_suit_it() {
    for engine in ENGINES {
        let rig = Rig::with(|config| (config.engine, config.direct) = (engine, true));
        let odd = DATA + 3;
        rig.header(IN, 0);
        let parts = [(odd, 700, WRITE), (odd + 5000, 8192 - 700, WRITE)];
        let chain = [(HEADER, 16, 0), parts[0], parts[1], (STATUS, 1, WRITE)];
        assert_eq!(rig.run(&chain), (STATUS_OK, 8193), "{engine:?}");
        let mut seen = vec![0; 8192];
        let (left, right) = seen.split_at_mut(700);
        rig.memory.read_slice(left, GuestAddress(odd)).unwrap();
        let at = GuestAddress(odd + 5000);
        rig.memory.read_slice(right, at).unwrap();
        assert!(seen == content()[..8192], "{engine:?}");
        rig.header(OUT, 16);
        let chain = [
            (HEADER, 16, 0),
            (odd, 700, 0),
            (odd + 5000, 8192 - 700, 0),
            (STATUS, 1, WRITE),
        ];
        assert_eq!(rig.run(&chain), (STATUS_OK, 1), "{engine:?}");
        assert!(rig.image()[8192..16384] == content()[..8192], "{engine:?}");
        // Not memory at all.
        rig.header(OUT, 0);
        let chain = [(HEADER, 16, 0), (0xd000_0001, 4096, 0), (STATUS, 1, WRITE)];
        assert_eq!(rig.run(&chain).0, STATUS_IOERR);
    }
}

#[test]
fn a_flush_waits_for_the_writes_before_it_and_a_reset_for_all() {
    for engine in ENGINES {
        let mut rig = Rig::with(|config| config.engine = engine);
        for first in [0, 3, 6] {
            let sector = u64::from(first);
            rig.offer(first, OUT, sector, (DATA, 4096));
        }
        rig.offer(9, FLUSH, 0, (0, 0));
        rig.offer(12, IN, 0, (DATA + 8192, 4096));
        rig.queue.run_until_used(5);
        let order: Vec<u32> = (0..5).map(|n| rig.queue.used(n).0).collect();
        let place = |head: u32| order.iter().position(|it| *it == head).unwrap();
        for write in [0, 3, 6] {
            assert!(place(write) < place(9), "{engine:?} {order:?}");
            assert_eq!(rig.status(write as u16), STATUS_OK);
        }
        assert_eq!(rig.status(9), STATUS_OK);
        // What is under way at a reset is done, or was never begun, when it returns.
        for first in [0, 3, 6, 9, 12] {
            rig.offer(first, IN, 0, (DATA, 32768));
        }
        rig.queue.notify();
        rig.block.reset();
        rig.memory
            .write_slice(&[7; 32768], GuestAddress(DATA))
            .unwrap();
        assert!(rig.data(32768).iter().all(|byte| *byte == 7));
    }
}

#[test]
fn each_queue_has_a_thread_of_its_own_and_unused_ones_none_to_wait_for() {
    for engine in ENGINES {
        let mut rig = Rig::with(|config| (config.engine, config.queues) = (engine, 3));
        rig.block.reset();
        let others = [0x60_0000, 0x61_0000].map(|at| MockQueue::new(&rig.memory, at, 16));
        rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
        let activation = Activation {
            memory: Arc::clone(&rig.memory),
            features: rig.block.features(),
            queues: vec![Some(rig.queue.handle()), None, Some(others[1].handle())],
            interrupt: rig.interrupt.clone(),
        };
        rig.block.activate(activation).unwrap();
        rig.assert_alive();
        rig.header(IN, 3);
        let chain = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        others[1].offer_chain(0, &chain);
        others[1].run_until_used(1);
        assert_eq!(rig.data(512), content()[1536..2048]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_in_the_rings_stop_the_disk(
        table in prop::collection::vec((0..0x60_0000_u64, 0..4096_u32, 0..8_u16, 0..18_u16), 16),
        kind in 0..14_u32,
        sector in prop_oneof![0..80_u64, any::<u64>()],
        heads in prop::collection::vec(0..18_u16, 0..16),
        jump in 0..24_u16,
    ) {
        let mut rig = Rig::new(true);
        rig.header(kind, sector);
        for (n, &(addr, len, flags, next)) in table.iter().enumerate() {
            let addr = if n % 3 == 0 { HEADER } else { addr };
            rig.queue.describe(n as u16, (addr, len), flags, next);
        }
        for &head in &heads {
            rig.queue.offer(head);
        }
        rig.queue.set_avail_index(rig.queue.avail_index().wrapping_add(jump));
        rig.queue.notify();
        std::thread::sleep(std::time::Duration::from_micros(500));
        rig.block.reset();
        rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
        rig.activate();
        rig.assert_alive();
    }
}
