//! The registers against drivers, good and hostile.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use ebb_core::range::GpaRange;
use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::BalloonConfig;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::queue::tests::driver::{MockQueue, memory, wait_for};
use crate::guest_memory::{BadNote, KernelEvents, Lost, NoteSource, RangeSink};

const STATUS: u64 = 0x70;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[derive(Default)]
pub struct Log {
    pub activations: u32,
    resets: u32,
    pub current: Option<Activation>,
    config: [u8; 8],
}

/// Offers features 0, 33, EVENT_IDX and VERSION_1, and two queues.
pub struct MockDevice(pub Arc<Mutex<Log>>);

impl VirtioDevice for MockDevice {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_VERSION_1 | 1 << 33
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.lock().unwrap().config;
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = *config.get(offset as usize + n).unwrap_or(&0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data
            && let Some(to) = self.0.lock().unwrap().config.get_mut(offset as usize)
        {
            *to = *byte;
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        if activation.queues[0].is_none() {
            return Err(ActivationError::MissingQueue(0));
        }
        let mut log = self.0.lock().unwrap();
        assert!(log.current.is_none(), "active twice");
        log.activations += 1;
        log.current = Some(activation);
        Ok(())
    }
    fn workers(&self) -> &[Worker] {
        &[]
    }
    fn save(&self) -> Option<serde_json::Value> {
        Some(serde_json::Value::Null)
    }
    fn reset(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.resets += 1;
        log.current = None;
    }
}

#[derive(Default)]
struct Line(AtomicU32);

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Rig {
    transport: MmioTransport,
    memory: Arc<GuestMemoryMmap>,
    log: Arc<Mutex<Log>>,
    line: Arc<Line>,
}

impl Rig {
    fn new() -> Self {
        let (memory, log, line) = (memory(4), Arc::default(), Arc::new(Line::default()));
        let device = Box::new(MockDevice(Arc::clone(&log)));
        let transport = MmioTransport::new(device, Arc::clone(&memory), line.clone()).unwrap();
        Self {
            transport,
            memory,
            log,
            line,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        let action = self.transport.write(offset, &value.to_le_bytes());
        assert_eq!(action, Action::Continue);
    }

    /// As far as FEATURES_OK.
    fn negotiate(&mut self, features: u64) -> u32 {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        for (select, half) in [(1, Half::High), (0, Half::Low)] {
            self.write(0x24, select);
            self.write(0x20, half.of(features));
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(STATUS)
    }

    fn set_up(&mut self, index: u32, queue: &MockQueue) {
        self.write(QUEUE_SEL, index);
        assert_eq!(self.read(QUEUE_READY), 0);
        self.write(QUEUE_NUM, queue.size.into());
        let rings = [
            (0x80, queue.base),
            (0x90, queue.avail()),
            (0xa0, queue.used_ring()),
        ];
        for (offset, addr) in rings {
            self.write(offset, Half::Low.of(addr));
            self.write(offset + 4, Half::High.of(addr));
        }
        self.write(QUEUE_READY, 1);
        assert_eq!(self.read(QUEUE_READY), 1);
    }

    /// A well-behaved driver binds.
    fn bind(&mut self) {
        let features = 1 << VIRTIO_F_VERSION_1 | 1 << 33;
        assert_eq!(self.negotiate(features), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        // Above 4 GiB, so that the upper halves matter.
        let queue = MockQueue::new(&self.memory, 4 << 30, 64);
        self.set_up(0, &queue);
        self.write(STATUS, READY);
        assert_eq!(self.read(STATUS), READY);
        let log = self.log.lock().unwrap();
        let activation = log.current.as_ref().unwrap();
        let queue = &activation.queues[0].as_ref().unwrap().queue;
        assert_eq!(activation.features, features);
        assert_eq!((queue.size(), queue.desc_table()), (64, 4 << 30));
        assert!(activation.queues[1].is_none());
    }

    fn current<T>(&self, look: impl FnOnce(&Activation) -> T) -> T {
        look(self.log.lock().unwrap().current.as_ref().unwrap())
    }
}

#[test]
fn the_device_is_what_it_says() {
    let mut rig = Rig::new();
    let identity = [0, 4, 8, 12].map(|offset| rig.read(offset));
    assert_eq!(identity, [MAGIC, 2, 42, VENDOR]);
    let low = 1 | 1 << VIRTIO_RING_F_EVENT_IDX;
    for (select, features) in [(0, low), (1, 0b11), (2, 0), (u32::MAX, 0)] {
        rig.write(0x14, select);
        assert_eq!(rig.read(0x10), features);
    }
    assert_eq!([0xb0, 0xb4].map(|offset| rig.read(offset)), [u32::MAX; 2]);
}

#[test]
fn a_driver_binds_goes_and_comes_back() {
    let mut rig = Rig::new();
    for n in 1..4 {
        rig.bind();
        assert_eq!(rig.log.lock().unwrap().activations, n);
        let before = rig.log.lock().unwrap().resets;
        rig.write(STATUS, 0);
        assert_eq!(rig.log.lock().unwrap().resets, before + 1);
        assert_eq!((rig.read(STATUS), rig.read(QUEUE_READY)), (0, 0));
        assert!(rig.log.lock().unwrap().current.is_none());
    }
}

#[test]
fn features_that_are_unknown_or_without_version_1_are_refused() {
    let mut rig = Rig::new();
    for features in [
        0,
        1,
        1 << VIRTIO_F_VERSION_1 | 2,
        1 << VIRTIO_F_VERSION_1 | 1 << 63,
        u64::MAX,
    ] {
        assert_eq!(
            rig.negotiate(features),
            ACKNOWLEDGE | DRIVER,
            "{features:#x}"
        );
        rig.write(STATUS, READY);
        assert_eq!(rig.read(STATUS), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
    // Settled is settled.
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.write(0x20, 0xffff_ffff);
    rig.write(STATUS, READY);
    assert_eq!(rig.transport.driver_features, 1 << VIRTIO_F_VERSION_1);
}

#[test]
fn status_bits_come_in_order_and_stay() {
    let mut rig = Rig::new();
    for value in [
        DRIVER_OK,
        FEATURES_OK,
        DRIVER,
        DRIVER | DRIVER_OK,
        NEEDS_RESET,
    ] {
        rig.write(STATUS, value);
        assert_eq!(rig.read(STATUS), 0, "{value:#x}");
    }
    rig.bind();
    for value in [ACKNOWLEDGE, READY & !FEATURES_OK, NEEDS_RESET] {
        rig.write(STATUS, value);
        assert_eq!(rig.read(STATUS), READY, "{value:#x}");
    }
    rig.write(STATUS, READY | FAILED);
    assert_eq!(rig.read(STATUS), READY | FAILED);
    rig.write(STATUS, 0);
    assert_eq!(rig.read(STATUS), 0);
}

/// CVE-2026-5747: a queue's size changed after activation.
#[test]
fn a_queue_in_use_cannot_be_changed() {
    let mut rig = Rig::new();
    rig.bind();
    rig.write(QUEUE_SEL, 0);
    for (offset, value) in [
        (QUEUE_NUM, 256),
        (0x80, 0x1000),
        (0xa0, 0),
        (QUEUE_READY, 0),
    ] {
        rig.write(offset, value);
    }
    assert_eq!(rig.read(QUEUE_READY), 1);
    assert_eq!(
        rig.current(|activation| activation.queues[0].as_ref().unwrap().queue.size()),
        64
    );

    // Not even before activation, once it is ready.
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    let queue = MockQueue::new(&rig.memory, 0x10_0000, 64);
    rig.set_up(0, &queue);
    rig.write(QUEUE_NUM, 128);
    rig.write(STATUS, READY);
    assert_eq!(
        rig.current(|activation| activation.queues[0].as_ref().unwrap().queue.size()),
        64
    );
}

/// cloud-hypervisor#7917: a selector without a queue.
#[test]
fn a_queue_that_does_not_exist_is_empty() {
    let mut rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    for (select, max) in [(0, 256), (1, 16), (2, 0), (0x1_0000, 0), (u32::MAX, 0)] {
        rig.write(QUEUE_SEL, select);
        assert_eq!(rig.read(QUEUE_MAX), max);
    }
    for offset in [QUEUE_NUM, QUEUE_READY, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        rig.write(offset, 1);
    }
    assert_eq!(rig.read(QUEUE_READY), 0);
}

#[test]
fn a_queue_that_cannot_be_used_asks_for_a_reset() {
    let cases: [(&str, &[(u64, u32)]); 9] = [
        ("not a power of two", &[(QUEUE_NUM, 3)]),
        ("no entries", &[(QUEUE_NUM, 0)]),
        ("too large", &[(QUEUE_NUM, 512)]),
        ("far too large", &[(QUEUE_NUM, 0x1_0040)]),
        ("descriptors unaligned", &[(0x80, 0x10_0008)]),
        ("available ring unaligned", &[(0x90, 0x10_2001)]),
        ("used ring unaligned", &[(0xa0, 0x10_3002)]),
        ("not memory", &[(0xa4, 0xffff_ffff)]),
        ("available ring never set", &[(0x90, 0)]),
    ];
    for (what, writes) in cases {
        let mut rig = Rig::new();
        rig.negotiate(1 << VIRTIO_F_VERSION_1);
        let queue = MockQueue::new(&rig.memory, 0x10_0000, 64);
        rig.set_up(0, &queue);
        rig.write(QUEUE_READY, 0);
        for &(offset, value) in writes {
            rig.write(offset, value);
        }
        rig.write(QUEUE_READY, 1);
        rig.write(STATUS, READY);
        assert_eq!(rig.read(STATUS), READY | NEEDS_RESET, "{what}");
        assert_eq!(rig.read(INTERRUPT_STATUS), wire::INTERRUPT_CONFIG, "{what}");
        assert_eq!(rig.line.0.load(Ordering::SeqCst), 1, "{what}");
        assert!(rig.log.lock().unwrap().current.is_none(), "{what}");
        rig.write(QUEUE_NOTIFY, 0);
        rig.bind();
    }
    // Every queue is left out: the device itself refuses.
    let mut rig = Rig::new();
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.write(STATUS, READY);
    assert_eq!(rig.read(STATUS), READY | NEEDS_RESET);
}

#[test]
fn interrupts_are_seen_and_acknowledged() {
    let mut rig = Rig::new();
    rig.bind();
    let interrupt = rig.current(|activation| Arc::clone(&activation.interrupt));
    let generation = rig.read(0xfc);
    interrupt.used_buffers(0).unwrap();
    interrupt.configuration_changed().unwrap();
    assert_eq!(rig.line.0.load(Ordering::SeqCst), 2);
    assert_ne!(rig.read(0xfc), generation);
    assert_eq!(rig.read(INTERRUPT_STATUS), 3);
    rig.write(INTERRUPT_ACK, 1);
    assert_eq!(rig.read(INTERRUPT_STATUS), 2);
    interrupt.needs_reset().unwrap();
    assert_eq!(rig.read(STATUS), READY | NEEDS_RESET);
    rig.bind();
    assert_eq!(rig.read(INTERRUPT_STATUS), 0);
}

#[test]
fn a_trapped_notification_signals_the_queue() {
    let mut rig = Rig::new();
    let events: Vec<_> = rig
        .transport
        .queue_notifiers()
        .map(|(index, event)| (index, event.try_clone().unwrap()))
        .collect();
    assert_eq!(
        events.iter().map(|event| event.0).collect::<Vec<_>>(),
        [0, 1]
    );
    rig.write(QUEUE_NOTIFY, 0);
    assert!(events[0].1.read().is_err(), "nobody is there yet");
    rig.bind();
    for index in [0, 7, u32::MAX] {
        rig.write(QUEUE_NOTIFY, index);
    }
    let heard = |rig: &Rig| rig.current(|it| it.queues[0].as_ref().unwrap().notified.read().ok());
    assert_eq!(heard(&rig), Some(1));
    // What KVM would signal, in another life of the driver.
    rig.bind();
    events[0].1.write(1).unwrap();
    assert_eq!(heard(&rig), Some(1));
}

#[test]
fn registers_are_four_bytes_wide_and_configuration_any() {
    let mut rig = Rig::new();
    rig.transport.write(CONFIG, &[1]);
    rig.write(STATUS, ACKNOWLEDGE);
    rig.write(STATUS, ACKNOWLEDGE | DRIVER);
    for len in [1, 2, 3, 8] {
        let mut data = [0xff; 8];
        rig.transport.read(0, &mut data[..len]);
        assert!(data[..len].iter().all(|byte| *byte == 0));
        rig.transport.write(STATUS, &vec![0; len]);
    }
    rig.transport.write(STATUS + 1, &[0; 4]);
    assert_eq!(rig.read(STATUS), ACKNOWLEDGE | DRIVER);
    rig.transport.write(CONFIG + 2, &[7]);
    let mut data = [0xff; 8];
    rig.transport.read(CONFIG, &mut data);
    assert_eq!(data, [0, 0, 7, 0, 0, 0, 0, 0]);
    let mut data = [0xff; 2];
    rig.transport.read(WINDOW - 1, &mut data);
    assert_eq!(data, [0, 0]);
}

#[test]
fn only_what_a_good_driver_does_not_do_is_a_fault() {
    const FEATURES: u64 = 0x20;
    const FEATURES_SEL: u64 = 0x24;
    let mut rig = Rig::new();
    // Linux removes its queues after it has reset the device, and clears features that do not exist.
    rig.write(STATUS, ACKNOWLEDGE | DRIVER);
    rig.write(FEATURES_SEL, 2);
    for (offset, value, faults) in [
        (QUEUE_READY, 0, 0),
        (FEATURES, 0, 0),
        (QUEUE_READY, 1, 1),
        (QUEUE_NUM, 0, 2),
        (FEATURES, 1, 3),
    ] {
        rig.write(offset, value);
        let found = rig.transport.faults.count();
        assert_eq!(found, faults, "{value} at {offset:#x}");
    }
}

#[test]
fn queues_have_event_indices_if_the_driver_accepts_them() {
    for event_idx in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut rig = Rig::new();
        rig.negotiate(1 << VIRTIO_F_VERSION_1 | event_idx);
        let queue = MockQueue::new(&rig.memory, 0x10_0000, 64);
        rig.set_up(0, &queue);
        rig.write(STATUS, READY);
        let enabled = rig.current(|it| it.queues[0].as_ref().unwrap().queue.event_idx_enabled());
        assert_eq!(enabled, event_idx != 0);
    }
}

#[test]
fn a_transport_that_is_shut_down_has_reset_its_device() {
    let mut rig = Rig::new();
    rig.bind();
    rig.transport.shut_down();
    assert!(rig.log.lock().unwrap().current.is_none());
    assert_eq!(rig.read(STATUS), 0);
}

/// Remembers pages and resets.
#[derive(Default)]
struct Sink(Mutex<Vec<String>>);

impl Sink {
    fn note(&self, what: &str, ranges: &[GpaRange]) {
        let mut calls = self.0.lock().unwrap();
        calls.extend(
            ranges
                .iter()
                .map(|range| format!("{what} {:#x}", range.start())),
        );
    }
}

impl RangeSink for Sink {
    fn lazy_free(&self, ranges: &[GpaRange]) {
        self.note("free", ranges);
    }
    fn reuse(&self, ranges: &[GpaRange]) {
        self.note("reuse", ranges);
    }
    fn discard(&self, ranges: &[GpaRange]) {
        self.note("discard", ranges);
    }
    fn report(&self, ranges: &[GpaRange]) {
        self.note("report", ranges);
    }
    fn reset(&self) {
        self.0.lock().unwrap().push("reset".to_owned());
    }
    fn is_ram(&self, _range: GpaRange) -> bool {
        true
    }
}

#[test]
fn a_balloon_behind_the_registers_is_lazy_and_resets_before_the_status_does() {
    let mut rig = Rig::new();
    let sink = Arc::new(Sink::default());
    let config = BalloonConfig {
        size: 0,
        deflate_on_oom: false,
        statistics_interval_s: 0,
        auto_reserve: None,
        free_page_reporting: None,
    };
    let balloon = Balloon::new(&config, sink.clone()).unwrap();
    let handle = balloon.handle();
    assert!(!handle.status().deflate_on_oom);
    let memory = Arc::clone(&rig.memory);
    rig.transport = MmioTransport::new(Box::new(balloon), memory, rig.line.clone()).unwrap();
    for round in 1..4 {
        // Everything but EVENT_IDX.
        rig.negotiate(1 << VIRTIO_F_VERSION_1 | 1);
        let queues = [0x10_0000, 0x20_0000].map(|base| MockQueue::new(&rig.memory, base, 16));
        rig.set_up(0, &queues[0]);
        rig.set_up(1, &queues[1]);
        rig.write(STATUS, READY);
        assert_eq!(rig.read(STATUS), READY);
        assert!(handle.status().lazy);
        rig.memory
            .write_obj::<u32>(round, GuestAddress(0x30_0000))
            .unwrap();
        for (index, queue) in (0..).zip(&queues) {
            queue.offer_chain(0, &[(0x30_0000, 4, 0)]);
            rig.write(QUEUE_NOTIFY, index);
            wait_for(|| queue.used_index() == 1, "used buffer");
        }
        sink.0.lock().unwrap().retain(|call| call != "reset");
        rig.write(STATUS, 0);
        let calls = std::mem::take(&mut *sink.0.lock().unwrap());
        let pages = [
            format!("free {:#x}", round << 12),
            format!("reuse {:#x}", round << 12),
        ];
        assert_eq!(calls, [&pages[..], &["reset".to_owned()]].concat());
        assert!(!handle.status().lazy);
    }
    assert_eq!((handle.faults(), rig.transport.faults.count()), (0, 0));
}

proptest! {
    #[test]
    fn no_sequence_of_writes_breaks_the_transport(
        writes in prop::collection::vec((
            prop_oneof![
                4 => prop::sample::select(vec![
                    0x14_u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
                ]),
                1 => 0..0x1000_u64,
                1 => any::<u64>(),
            ],
            prop_oneof![any::<u32>(), 0..16_u32, Just(READY), Just(0x1000)],
            prop_oneof![8 => Just(4_usize), 1 => 0..9_usize],
        ), 0..200),
    ) {
        let mut rig = Rig::new();
        for (offset, value, len) in writes {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            rig.transport.write(offset, &data[..len]);
            rig.transport.read(offset, &mut data[..len]);
        }
        rig.bind();
    }
}

/// Counts what it is told, and whether the device was still in use then.
#[derive(Default)]
struct Kernel(Mutex<Vec<(Lost, u32)>>, Arc<Mutex<Log>>);

impl KernelEvents for Kernel {
    fn note(&self, _note: GpaRange, _source: NoteSource) -> Result<(), BadNote> {
        Ok(())
    }

    fn lost(&self, why: Lost) {
        let resets = self.1.lock().unwrap().resets;
        self.0.lock().unwrap().push((why, resets));
    }
}

#[test]
fn a_reset_of_a_device_in_use_is_told_before_it_happens() {
    let mut rig = Rig::new();
    let kernel = Arc::new(Kernel(Mutex::default(), Arc::clone(&rig.log)));
    let line = Arc::new(Line::default());
    let device = Box::new(MockDevice(Arc::clone(&rig.log)));
    let transport = MmioTransport::new(device, Arc::clone(&rig.memory), line).unwrap();
    rig.transport = transport.with_kernel(Arc::clone(&kernel) as _);
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    rig.write(STATUS, 0);
    assert_eq!(*kernel.0.lock().unwrap(), [], "not in use");
    rig.negotiate(1 << VIRTIO_F_VERSION_1);
    let queue = MockQueue::new(&rig.memory, 0x10_0000, 64);
    rig.set_up(0, &queue);
    rig.write(STATUS, READY);
    let resets = rig.log.lock().unwrap().resets;
    rig.write(STATUS, 0);
    assert_eq!(*kernel.0.lock().unwrap(), [(Lost::DeviceReset, resets)]);
    rig.transport.shut_down();
    assert_eq!(kernel.0.lock().unwrap().len(), 1, "the machine ends");
}
