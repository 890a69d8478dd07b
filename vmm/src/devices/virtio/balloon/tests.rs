//! The balloon against a driver that may be hostile.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_core::release::Release;
use proptest::prelude::*;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::devices::virtio::queue::tests::driver::{
    INDIRECT, MockInterrupt, MockQueue, NEXT, WRITE, memory, wait_for,
};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const INFLATE: u64 = 0x10_0000;
const DEFLATE: u64 = 0x20_0000;
const STATISTICS: u64 = 0x30_0000;
const REPORTS: u64 = 0x38_0000;
/// Where messages go.
const BUFFER: u64 = 0x40_0000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    /// Operation, pages as (first, end), used index of the inflate and the deflate queue at that moment.
    Pages(&'static str, Vec<(u64, u64)>, (u16, u16)),
    /// Pages that are reported free, used index of the reporting queue at that moment.
    Report(Vec<(u64, u64)>, u16),
    Reset,
}

struct MockSink {
    memory: Arc<GuestMemoryMmap>,
    calls: Mutex<Vec<Call>>,
}

impl MockSink {
    fn used(&self, queue: u64) -> u16 {
        self.memory.read_obj(GuestAddress(queue + 0x3002)).unwrap()
    }

    fn note(&self, what: &'static str, ranges: &[GpaRange]) {
        let used = (self.used(INFLATE), self.used(DEFLATE));
        let call = Call::Pages(what, pages(ranges), used);
        self.calls.lock().unwrap().push(call);
    }
}

fn pages(ranges: &[GpaRange]) -> Vec<(u64, u64)> {
    let pages = |range: &GpaRange| (range.start() / PAGE_SIZE, range.end() / PAGE_SIZE);
    ranges.iter().map(pages).collect()
}

impl RangeSink for MockSink {
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
        let call = Call::Report(pages(ranges), self.used(REPORTS));
        self.calls.lock().unwrap().push(call);
    }
    fn reset(&self) {
        self.calls.lock().unwrap().push(Call::Reset);
    }
    fn is_ram(&self, range: GpaRange) -> bool {
        self.memory.iter().any(|region| {
            use vm_memory::GuestMemoryRegion;
            let start = region.start_addr().raw_value();
            start <= range.start() && range.end() <= start + region.len()
        })
    }
}

/// A machine with a balloon and a driver.
struct Rig {
    memory: Arc<GuestMemoryMmap>,
    sink: Arc<MockSink>,
    balloon: Balloon,
    inflate: MockQueue,
    deflate: MockQueue,
    statistics: MockQueue,
    reports: MockQueue,
    interrupt: Arc<MockInterrupt>,
}

impl Rig {
    fn new(statistics_interval_s: u16) -> Self {
        let memory = memory(16);
        let sink = Arc::new(MockSink {
            memory: Arc::clone(&memory),
            calls: Mutex::default(),
        });
        let config = BalloonConfig {
            size: 0,
            deflate_on_oom: true,
            statistics_interval_s,
            auto_reserve: None,
            free_page_reporting: Some(Release::Discard),
        };
        Self {
            balloon: Balloon::new(&config, sink.clone()).unwrap(),
            inflate: MockQueue::new(&memory, INFLATE, 16),
            deflate: MockQueue::new(&memory, DEFLATE, 16),
            statistics: MockQueue::new(&memory, STATISTICS, 16),
            reports: MockQueue::new(&memory, REPORTS, 64),
            interrupt: Arc::default(),
            memory,
            sink,
        }
    }

    fn active(features: u64) -> Self {
        let mut rig = Self::new(0);
        rig.activate(features);
        rig
    }

    fn activate(&mut self, features: u64) {
        let mut queues = vec![Some(self.inflate.handle()), Some(self.deflate.handle())];
        if features & F_STATS_VQ != 0 {
            queues.push(Some(self.statistics.handle()));
        }
        if features & F_REPORTING != 0 {
            queues.push(Some(self.reports.handle()));
        }
        queues.resize_with(self.balloon.queue_sizes().len(), || None);
        self.activate_with(features, queues);
    }

    fn activate_with(&mut self, features: u64, queues: Vec<Option<QueueHandle>>) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: features | VERSION_1,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.balloon.activate(activation).unwrap();
    }

    fn write_pfns(&self, at: u64, pfns: &[u32]) -> u32 {
        let raw: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
        raw.len() as u32
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.sink.calls.lock().unwrap())
    }

    /// A good message gets through on both queues.
    fn assert_alive(&self) {
        self.calls();
        for (queue, what) in [(&self.inflate, "free"), (&self.deflate, "reuse")] {
            let used = queue.used_index();
            let len = self.write_pfns(BUFFER, &[5]);
            queue.offer_chain(0, &[(BUFFER, len, 0)]);
            queue.run_until_used(used.wrapping_add(1));
            let calls = self.calls();
            assert!(
                matches!(&calls[..], [Call::Pages(name, pages, _)] if *name == what && *pages == [(5, 6)]),
                "{calls:?}"
            );
        }
    }
}

#[test]
fn pages_are_merged_and_handed_over_before_they_are_acknowledged() {
    let rig = Rig::active(F_MUST_TELL_HOST);
    let first = rig.write_pfns(BUFFER, &[0x100, 0x102, 0x101, 0x101]);
    let second = rig.write_pfns(BUFFER + 64, &[0x103, 0x200]);
    rig.inflate.offer_chain(0, &[(BUFFER, first, 0)]);
    rig.inflate.offer_chain(4, &[(BUFFER + 64, second, 0)]);
    rig.inflate.run_until_used(2);
    let pages = vec![(0x100, 0x104), (0x200, 0x201)];
    assert_eq!(rig.calls(), [Call::Pages("free", pages, (0, 0))]);
    assert_eq!((rig.inflate.used(0), rig.inflate.used(1)), ((0, 0), (4, 0)));
    wait_for(
        || rig.interrupt.used.load(Ordering::SeqCst) == 1,
        "interrupt",
    );

    rig.deflate.offer_chain(0, &[(BUFFER, first, 0)]);
    rig.deflate.run_until_used(1);
    assert_eq!(
        rig.calls(),
        [Call::Pages("reuse", vec![(0x100, 0x103)], (2, 0))]
    );
    assert_eq!(rig.balloon.handle().faults(), 0);
}

/// Every other page of 4 GiB: what is acknowledged is tracked, and can be taken.
#[test]
fn a_fragmented_balloon_is_the_hosts_to_the_last_page() {
    const MESSAGE: usize = 1 << 15;
    let first = 16 << 20;
    let ram = GpaRange::new(0, first + (4 << 30)).unwrap();
    let memory = Arc::new(crate::guest_memory::tests::plain(ram));
    let guest = memory.ram().memory();
    let queue = MockQueue::new(&guest, INFLATE, 16);
    let deflate = MockQueue::new(&guest, DEFLATE, 16);
    let config = BalloonConfig {
        size: 0,
        deflate_on_oom: false,
        statistics_interval_s: 0,
        auto_reserve: None,
        free_page_reporting: None,
    };
    let mut balloon = Balloon::new(&config, memory.clone()).unwrap();
    let activation = Activation {
        memory: Arc::clone(&guest),
        features: F_MUST_TELL_HOST | VERSION_1,
        queues: vec![Some(queue.handle()), Some(deflate.handle())],
        interrupt: Arc::<MockInterrupt>::default(),
    };
    balloon.activate(activation).unwrap();
    let pfns: Vec<u32> = (0..1 << 19)
        .map(|page| (first / PAGE_SIZE) as u32 + 2 * page)
        .collect();
    for (message, pfns) in (1..).zip(pfns.chunks(MESSAGE)) {
        let raw: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        guest.write_slice(&raw, GuestAddress(BUFFER)).unwrap();
        queue.offer_chain(0, &[(BUFFER, raw.len() as u32, 0)]);
        queue.run_until_used(message);
        let lazy = memory.lazy().snapshot();
        assert_eq!(
            lazy.lazy_bytes,
            u64::from(message) * MESSAGE as u64 * PAGE_SIZE
        );
    }
    assert_eq!(memory.lazy().snapshot().lazy_bytes, 2 << 30);
    balloon.reset();
    assert_eq!(memory.lazy().snapshot().ranges, 0);
}

#[test]
fn the_device_says_what_it_is_and_can_do() {
    let bits = [32, 29, 0, 1, 2, 4, 5];
    let features = bits.iter().fold(0, |all, bit| all | 1 << bit);
    let balloon = Rig::new(1).balloon;
    let found = (balloon.device_type(), balloon.features());
    assert_eq!(found, (5, features));
}

#[test]
fn a_driver_that_does_not_tell_has_its_pages_discarded_first() {
    let rig = Rig::active(0);
    assert!(!rig.balloon.handle().status().lazy);
    let len = rig.write_pfns(BUFFER, &[9]);
    rig.inflate.offer_chain(0, &[(BUFFER, len, 0)]);
    rig.inflate.run_until_used(1);
    rig.deflate.offer_chain(0, &[(BUFFER, len, 0)]);
    rig.deflate.run_until_used(1);
    let pages = vec![(9, 10)];
    assert_eq!(
        rig.calls(),
        [
            Call::Pages("discard", pages.clone(), (0, 0)),
            Call::Pages("reuse", pages, (1, 0))
        ]
    );
}

#[test]
fn pages_that_are_not_ram_are_skipped() {
    let rig = Rig::active(F_MUST_TELL_HOST);
    // The last page of RAM below the hole, the hole, the MMIO window, RAM above 4 GiB, far beyond everything.
    let len = rig.write_pfns(BUFFER, &[0xfff, 0x1000, 0xd_0000, 0x10_0000, u32::MAX]);
    rig.inflate.offer_chain(0, &[(BUFFER, len, 0)]);
    rig.inflate.run_until_used(1);
    let pages = vec![(0xfff, 0x1000), (0x10_0000, 0x10_0001)];
    assert_eq!(rig.calls(), [Call::Pages("free", pages, (0, 0))]);
    assert_eq!(rig.balloon.handle().faults(), 1);
    rig.assert_alive();
}

#[test]
fn arrays_of_any_length_and_layout_are_taken_in_bounded_pieces() {
    let rig = Rig::active(F_MUST_TELL_HOST);
    let pfns: Vec<u32> = (0..0x1000).cycle().take(3 * 8192).collect();
    let len = rig.write_pfns(BUFFER, &pfns);
    // A page number astride two buffers, and three bytes too many.
    rig.inflate.offer_chain(
        0,
        &[
            (BUFFER, 6, 0),
            (BUFFER + 6, 0, 0),
            (BUFFER + 6, len - 6 + 3, 0),
        ],
    );
    rig.inflate.run_until_used(1);
    let calls = rig.calls();
    assert!(calls.len() > 1);
    for call in calls {
        assert_eq!(call, Call::Pages("free", vec![(0, 0x1000)], (0, 0)));
    }
    assert!(rig.balloon.handle().faults() >= 1);
    rig.assert_alive();
}

#[test]
fn bad_descriptors_are_returned_and_the_queue_goes_on() {
    let rig = Rig::active(F_MUST_TELL_HOST);
    let len = rig.write_pfns(BUFFER, &[1, 2, 3]);
    let queue = &rig.inflate;
    // A loop.
    queue.describe(0, (BUFFER, len), NEXT, 0);
    queue.offer(0);
    // A next index that leads nowhere.
    queue.describe(1, (BUFFER, len), NEXT, 77);
    queue.offer(1);
    // Writable where readable is due.
    queue.describe(2, (BUFFER, len), WRITE, 0);
    queue.offer(2);
    // Not memory; wraps around.
    queue.describe(3, (0xd000_0000, 4096), 0, 0);
    queue.offer(3);
    queue.describe(4, (u64::MAX - 3, u32::MAX), 0, 0);
    queue.offer(4);
    // An indirect table in itself, and one of odd length.
    queue.describe_at(BUFFER + 4096, 0, (BUFFER + 4096, 16), INDIRECT, 0);
    queue.describe(5, (BUFFER + 4096, 16), INDIRECT, 0);
    queue.offer(5);
    queue.describe(6, (BUFFER + 4096, 17), INDIRECT, 0);
    queue.offer(6);
    // A head outside of the table: it cannot be returned.
    queue.offer(16);
    queue.offer(0xffff);
    queue.run_until_used(7);
    assert_eq!(rig.calls(), []);
    assert_eq!(
        rig.balloon.handle().faults(),
        11,
        "two are too long besides"
    );
    rig.assert_alive();
}

#[test]
fn a_deflate_is_honoured_as_far_as_it_goes() {
    let rig = Rig::active(F_MUST_TELL_HOST);
    let len = rig.write_pfns(BUFFER, &[1, 2, 3]);
    rig.deflate.describe(0, (BUFFER, len), NEXT, 0);
    rig.deflate.offer(0);
    rig.deflate.run_until_used(1);
    assert_eq!(rig.calls(), [Call::Pages("reuse", vec![(1, 4)], (0, 0))]);
}

#[test]
fn an_available_index_that_jumps_needs_a_reset() {
    let mut rig = Rig::active(F_MUST_TELL_HOST);
    rig.inflate.set_avail_index(0x8000);
    rig.inflate.notify();
    wait_for(
        || rig.interrupt.reset.load(Ordering::SeqCst) == 1,
        "reset request",
    );
    for _ in 0..100 {
        rig.inflate.notify();
    }
    // The other queue still works, and so does this one after the reset.
    let len = rig.write_pfns(BUFFER, &[7]);
    rig.deflate.offer_chain(0, &[(BUFFER, len, 0)]);
    rig.deflate.run_until_used(1);
    assert_eq!(rig.interrupt.reset.load(Ordering::SeqCst), 1);
    assert_eq!(rig.balloon.handle().faults(), 1);
    rig.balloon.reset();
    rig.inflate = MockQueue::new(&rig.memory, INFLATE, 16);
    rig.deflate = MockQueue::new(&rig.memory, DEFLATE, 16);
    rig.activate(F_MUST_TELL_HOST);
    rig.assert_alive();
}

#[test]
fn reset_returns_everything_and_the_driver_can_come_back() {
    let mut rig = Rig::active(F_MUST_TELL_HOST);
    let handle = rig.balloon.handle();
    handle.set_target(8 << 20).unwrap();
    assert_eq!(rig.interrupt.config.load(Ordering::SeqCst), 1);
    rig.balloon.write_config(4, &2048_u32.to_le_bytes());
    let status = handle.status();
    assert_eq!(
        (status.target_bytes, status.actual_bytes),
        (8 << 20, 8 << 20)
    );
    assert!(status.lazy && status.deflate_on_oom);

    // Busy while the reset comes.
    let len = rig.write_pfns(BUFFER, &(0..256).collect::<Vec<_>>());
    for n in 0..16 {
        rig.inflate.offer_chain(n, &[(BUFFER, len, 0)]);
    }
    rig.inflate.notify();
    rig.balloon.reset();
    let calls = rig.calls();
    assert_eq!(
        calls.last(),
        Some(&Call::Reset),
        "nothing comes after the reset"
    );
    let status = handle.status();
    assert_eq!((status.target_bytes, status.actual_bytes), (8 << 20, 0));
    assert!(!status.lazy);
    handle.set_target(4 << 20).unwrap();
    assert_eq!(
        rig.interrupt.config.load(Ordering::SeqCst),
        1,
        "nobody to tell"
    );
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(rig.calls(), []);

    for _ in 0..3 {
        rig.inflate = MockQueue::new(&rig.memory, INFLATE, 16);
        rig.deflate = MockQueue::new(&rig.memory, DEFLATE, 16);
        rig.activate(F_MUST_TELL_HOST);
        rig.assert_alive();
        rig.balloon.reset();
        rig.balloon.reset();
    }
}

#[test]
fn reset_interrupts_a_message_of_gigabytes() {
    let mut rig = Rig::active(F_MUST_TELL_HOST);
    let buffers = [(0, 16 << 20, 0); 16];
    rig.deflate.offer_chain(0, &buffers);
    for _ in 0..15 {
        rig.deflate.offer(0);
    }
    rig.deflate.notify();
    rig.balloon.reset();
    assert!(rig.deflate.used_index() < 16, "it was read to its end");
}

#[test]
fn statistics_are_asked_for_and_bounded() {
    let mut rig = Rig::new(1);
    rig.activate(F_MUST_TELL_HOST | F_STATS_VQ);
    let handle = rig.balloon.handle();
    let mut raw = vec![];
    for (tag, value) in [(4_u16, 1_u64 << 20), (99, 5), (5, 2 << 20)] {
        raw.extend(tag.to_le_bytes());
        raw.extend(value.to_le_bytes());
    }
    rig.memory.write_slice(&raw, GuestAddress(BUFFER)).unwrap();
    rig.statistics
        .offer_chain(0, &[(BUFFER, raw.len() as u32, 0)]);
    rig.statistics.notify();
    wait_for(
        || handle.statistics().unwrap().free_memory.is_some(),
        "statistics",
    );
    assert_eq!(handle.statistics().unwrap().total_memory, Some(2 << 20));
    let (latest, _) = handle.latest().unwrap();
    assert_eq!(latest.total_memory, Some(2 << 20));
    // The buffer comes back when the time has come, and not before.
    wait_for(|| rig.statistics.used_index() == 1, "request");
    // Far too large, far too many.
    for n in 0..8 {
        rig.statistics.offer_chain(n, &[(0, 16 << 20, 0)]);
    }
    rig.statistics.run_until_used(8);
    assert!(handle.faults() >= 8);
    handle.set_statistics_interval(2).unwrap();
    assert_eq!(handle.status().statistics_interval_s, 2);
    assert_eq!(
        handle.set_statistics_interval(0),
        Err(BalloonError::IntervalZero)
    );
    rig.assert_alive();
    rig.balloon.reset();
    assert_eq!(handle.statistics(), Ok(Statistics::default()));
    assert_eq!(handle.latest(), None);
}

#[test]
fn the_larger_one_of_two_targets_is_asked_for() {
    let mut rig = Rig::active(F_MUST_TELL_HOST);
    let handle = rig.balloon.handle();
    let asked = || {
        let status = handle.status();
        (status.target_bytes >> 20, status.floor_bytes >> 20)
    };
    handle.set_auto_target(5 << 20).unwrap();
    assert_eq!(asked(), (5, 0));
    handle.set_target(3 << 20).unwrap();
    assert_eq!(asked(), (5, 3));
    handle.set_target(9 << 20).unwrap();
    handle.set_target(1 << 20).unwrap();
    assert_eq!(asked(), (1, 1), "what an operator asked for is not kept");
    handle.set_auto_target(5 << 20).unwrap();
    assert_eq!(rig.interrupt.config.load(Ordering::SeqCst), 5);
    assert!(handle.set_auto_target(5).is_err());
    rig.balloon.reset();
    assert_eq!(asked(), (1, 1), "a new driver has a new guest");
}

#[test]
fn requests_out_of_bounds_are_refused() {
    let handle = Rig::new(0).balloon.handle();
    let max = u64::from(u32::MAX) * PAGE_SIZE;
    assert_eq!(
        handle.set_target(max + PAGE_SIZE),
        Err(BalloonError::TargetTooLarge {
            bytes: max + PAGE_SIZE,
            max
        })
    );
    assert_eq!(
        handle.set_target(5),
        Err(BalloonError::TargetUnaligned { bytes: 5 })
    );
    assert_eq!(handle.set_target(max), Ok(()));
    assert_eq!(handle.statistics(), Err(BalloonError::NoStatistics));
    assert_eq!(
        handle.set_statistics_interval(1),
        Err(BalloonError::NoStatistics)
    );
}

#[test]
fn a_queue_that_is_left_out_is_named() {
    let mut rig = Rig::new(0);
    let activation = Activation {
        memory: Arc::clone(&rig.memory),
        features: VERSION_1,
        queues: vec![Some(rig.inflate.handle()), None],
        interrupt: rig.interrupt.clone(),
    };
    let error = rig.balloon.activate(activation).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the driver left out queue 1, which the device needs"
    );
    rig.activate(F_MUST_TELL_HOST);
    rig.assert_alive();
}

/// Address and length of pages `first..end`.
fn buffer(first: u64, end: u64) -> (u64, u32, u16) {
    let bytes = |pages: u64| pages * PAGE_SIZE;
    (bytes(first), bytes(end - first) as u32, WRITE)
}

#[test]
fn reports_are_merged_across_messages_and_acknowledged_last() {
    let rig = Rig::active(F_MUST_TELL_HOST | F_REPORTING);
    assert!(rig.balloon.handle().status().reporting);
    let queue = &rig.reports;
    queue.describe_chain(0, &[buffer(0x600, 0x800), buffer(0x1_00000, 0x1_00200)]);
    queue.describe_chain(8, &[buffer(0x800, 0xa00), buffer(0x700, 0x801)]);
    queue.describe_chain(16, &[buffer(0xc00, 0xc01)]);
    queue.offer_at_once(&[0, 8, 16]);
    queue.run_until_used(3);
    let merged = vec![(0x600, 0xa00), (0xc00, 0xc01), (0x1_00000, 0x1_00200)];
    assert_eq!(rig.calls(), [Call::Report(merged, 0)]);
    assert_eq!(
        (queue.used(0), queue.used(1), queue.used(2)),
        ((0, 0), (8, 0), (16, 0))
    );
    let expected = ReportStats {
        messages_total: 3,
        ranges_total: 5,
        bytes_total: (0x200 + 0x200 + 0x200 + 0x101 + 1) * PAGE_SIZE,
        poisoned_bytes_total: 0,
    };
    assert_eq!(rig.balloon.handle().reports(), expected);
    assert_eq!(rig.balloon.handle().faults(), 0);
    wait_for(
        || rig.interrupt.used.load(Ordering::SeqCst) == 1,
        "interrupt",
    );
    rig.assert_alive();
}

#[test]
fn the_reporting_queue_is_found_by_either_numbering() {
    let features = [F_REPORTING, F_REPORTING | F_STATS_VQ];
    for (features, dense) in features
        .into_iter()
        .flat_map(|features| [(features, true), (features, false)])
    {
        let mut rig = Rig::new(1);
        let mut queues = vec![Some(rig.inflate.handle()), Some(rig.deflate.handle())];
        if features & F_STATS_VQ != 0 {
            queues.push(Some(rig.statistics.handle()));
        }
        queues.resize_with(if dense { queues.len() } else { 4 }, || None);
        queues.push(Some(rig.reports.handle()));
        queues.resize_with(5, || None);
        rig.activate_with(features | F_MUST_TELL_HOST, queues);
        rig.reports.offer_chain(0, &[buffer(0x600, 0x800)]);
        rig.reports.run_until_used(1);
        assert_eq!(rig.calls(), [Call::Report(vec![(0x600, 0x800)], 0)]);
        rig.assert_alive();
    }
    let mut rig = Rig::new(0);
    let queues = vec![
        Some(rig.inflate.handle()),
        Some(rig.deflate.handle()),
        None,
        None,
        None,
    ];
    let error = rig.balloon.activate(Activation {
        memory: Arc::clone(&rig.memory),
        features: VERSION_1 | F_REPORTING,
        queues,
        interrupt: rig.interrupt.clone(),
    });
    assert!(matches!(error, Err(ActivationError::MissingQueue(2))));
}

#[test]
fn reports_that_make_no_sense_are_returned_and_left_alone() {
    let rig = Rig::active(F_MUST_TELL_HOST | F_REPORTING);
    let queue = &rig.reports;
    // The MMIO hole, astride the end of RAM, beyond everything, wrapping around, unaligned at either end.
    let (start, len, _) = buffer(0x600, 0x800);
    let bad = [
        buffer(0xd_0000, 0xd_0200),
        buffer(0xfff, 0x1001),
        (1 << 52, 1 << 21, WRITE),
        (u64::MAX - 4095, 8192, WRITE),
        (start + 1, len, WRITE),
        (start, len - 1, WRITE),
    ];
    queue.offer_chain(0, &bad);
    // More than 4 GiB in all: such a chain is not believed from there on.
    queue.offer_chain(8, &[(start, u32::MAX, WRITE), buffer(0x600, 0x800)]);
    // To be read, and to be read before one that is good; empty ones are no ranges at all.
    queue.offer_chain(16, &[(start, len, 0)]);
    queue.offer_chain(17, &[(start, len, 0), buffer(0x600, 0x800)]);
    queue.offer_chain(20, &[(start, 0, WRITE), (start, 0, 0)]);
    // A loop, a chain that leads nowhere, an indirect table in itself.
    queue.describe(24, (start, len), WRITE | NEXT, 24);
    queue.offer(24);
    queue.describe(25, (start, len), WRITE | NEXT, 999);
    queue.offer(25);
    queue.describe_at(BUFFER, 0, (BUFFER, 16), INDIRECT, 0);
    queue.describe(26, (BUFFER, 16), INDIRECT, 0);
    queue.offer(26);
    // A good one among bad ones.
    queue.offer_chain(30, &[buffer(0xd_0000, 0xd_0001), buffer(0x600, 0x601)]);
    queue.run_until_used(9);
    // The worker may have begun while the messages were still being made available, so some can be returned already.
    let calls = rig.calls();
    let [Call::Report(ranges, returned)] = calls.as_slice() else {
        panic!("{calls:?}");
    };
    assert_eq!(ranges, &[(0x600, 0x601)]);
    assert!(*returned < 9, "reported before its message is returned");
    let handle = rig.balloon.handle();
    assert_eq!(
        (
            handle.reports().messages_total,
            handle.reports().ranges_total
        ),
        (9, 1)
    );
    assert_eq!(handle.faults(), 6 + 1 + 2 + 3 + 1);
    rig.assert_alive();
}

#[test]
fn a_storm_of_reports_is_taken_in_bounded_pieces() {
    let rig = Rig::active(F_MUST_TELL_HOST | F_REPORTING);
    // Indirect tables of 64 ranges each, in each of 64 messages, twice around; every range is a page, none touch.
    for table in 0..64_u64 {
        let at = BUFFER + table * 4096;
        for n in 0..64_u64 {
            let page = 0x1_00000 + 2 * (n * 16 + table % 16);
            let more = if n < 63 { NEXT } else { 0 };
            rig.reports.describe_at(
                at,
                n as u16,
                (page * PAGE_SIZE, 4096),
                WRITE | more,
                n as u16 + 1,
            );
        }
        rig.reports
            .describe(table as u16, (at, 64 * 16), INDIRECT, 0);
    }
    for round in 1..3 {
        for head in 0..64 {
            rig.reports.offer(head);
        }
        rig.reports.run_until_used(64 * round);
    }
    let calls = rig.calls();
    assert!(calls.len() >= 2, "{}", calls.len());
    // Returned messages, as of the call before.
    let mut before = 0;
    for (index, call) in calls.into_iter().enumerate() {
        let Call::Report(pages, used) = call else {
            panic!("{call:?}")
        };
        // Those that one call is for are returned after it.
        let returned = if index == 0 { 0 } else { 64 };
        assert!(
            pages.len() <= 1024 && used - before <= returned,
            "{} {before} {used}",
            pages.len()
        );
        before = used;
    }
    assert_eq!(rig.balloon.handle().reports().ranges_total, 2 * 64 * 64);
    rig.assert_alive();
}

#[test]
fn poisoned_pages_keep_what_is_in_them() {
    for (features, poison, taken) in [
        (F_PAGE_POISON, 0_u32, true),
        (F_PAGE_POISON, 0xaaaa_aaaa, false),
        // Not negotiated: the field means nothing.
        (0, 0xaaaa_aaaa, true),
    ] {
        let mut rig = Rig::new(0);
        rig.balloon.write_config(12, &poison.to_le_bytes());
        rig.activate(F_MUST_TELL_HOST | F_REPORTING | features);
        rig.reports.offer_chain(0, &[buffer(0x600, 0x800)]);
        rig.reports.run_until_used(1);
        assert_eq!(!rig.calls().is_empty(), taken, "{features} {poison:#x}");
        let reports = rig.balloon.handle().reports();
        assert_eq!(
            reports.poisoned_bytes_total,
            if taken { 0 } else { 0x200 * PAGE_SIZE }
        );
        rig.balloon.reset();
        let mut data = [1; 4];
        rig.balloon.read_config(12, &mut data);
        assert_eq!(data, [0; 4], "the next driver says itself");
    }
}

#[test]
fn reporting_is_there_only_when_asked_for() {
    let config = BalloonConfig {
        size: 0,
        deflate_on_oom: false,
        statistics_interval_s: 0,
        auto_reserve: None,
        free_page_reporting: None,
    };
    let memory = memory(16);
    let sink = Arc::new(MockSink {
        memory,
        calls: Mutex::default(),
    });
    let balloon = Balloon::new(&config, sink).unwrap();
    assert_eq!(balloon.features() & (F_REPORTING | F_PAGE_POISON), 0);
    assert_eq!(balloon.queue_sizes().len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_in_the_rings_stop_the_balloon(
        table in prop::collection::vec(any::<(u64, u32, u16, u16)>(), 16),
        near: bool,
        heads in prop::collection::vec(0..20_u16, 0..16),
        jump: u16,
    ) {
        let mut rig = Rig::active(F_MUST_TELL_HOST | F_REPORTING);
        for queue in [&rig.inflate, &rig.deflate, &rig.reports] {
            for (n, &(addr, len, flags, next)) in table.iter().enumerate() {
                // Plausible values find more than random ones.
                let (addr, len) = if near { (addr % (20 << 20), len % 8192) } else { (addr, len) };
                queue.describe(n as u16, (addr, len), flags % 8, next % 18);
            }
            for &head in &heads {
                queue.offer(head);
            }
            queue.set_avail_index(queue.avail_index().wrapping_add(jump % 24));
            queue.notify();
        }
        std::thread::sleep(Duration::from_micros(500));
        // Whatever it did to itself, a reset brings it back.
        rig.balloon.reset();
        rig.inflate = MockQueue::new(&rig.memory, INFLATE, 16);
        rig.deflate = MockQueue::new(&rig.memory, DEFLATE, 16);
        rig.reports = MockQueue::new(&rig.memory, REPORTS, 64);
        rig.activate(F_MUST_TELL_HOST | F_REPORTING);
        rig.assert_alive();
    }
}
