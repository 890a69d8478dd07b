//! The source of random bytes against a driver that may be hostile.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::devices::virtio::queue::tests::driver::{
    MockInterrupt, MockQueue, NEXT, WRITE, memory, wait_for,
};

const QUEUE: u64 = 0x10_0000;
const DATA: u64 = 0x30_0000;

/// Address, length and flags of each buffer of a chain.
type Buffers<'a> = &'a [(u64, u32, u16)];

struct Rig {
    memory: Arc<GuestMemoryMmap>,
    queue: MockQueue,
    rng: Entropy,
    interrupt: Arc<MockInterrupt>,
}

impl Rig {
    fn new() -> Self {
        Self::limited(RngLimits::default())
    }

    fn limited(limits: RngLimits) -> Self {
        let memory = memory(8);
        let mut rig = Self {
            queue: MockQueue::new(&memory, QUEUE, 16),
            memory,
            rng: Entropy::new(limits).unwrap(),
            interrupt: Arc::default(),
        };
        rig.activate();
        rig
    }

    fn activate(&mut self) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.rng.features(),
            queues: vec![Some(self.queue.handle())],
            interrupt: self.interrupt.clone(),
        };
        self.rng.activate(activation).unwrap();
    }

    /// Offers a chain and returns what the device says that it wrote.
    fn run(&self, buffers: Buffers) -> u32 {
        let used = self.queue.used_index();
        self.queue.offer_chain(0, buffers);
        self.queue.run_until_used(used.wrapping_add(1));
        self.queue.used(used).1
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        data
    }
}

#[test]
fn bytes_are_random_and_no_more_than_asked_for() {
    let mut rig = Rig::new();
    rig.memory
        .write_slice(&[0; 1024], GuestAddress(DATA))
        .unwrap();
    assert_eq!(
        rig.run(&[(DATA, 500, WRITE), (DATA + 500, 100, WRITE)]),
        600
    );
    let first = rig.data(601);
    assert!(first[..600].iter().filter(|byte| **byte == 0).count() < 60);
    assert_eq!(first[600], 0);
    assert_eq!(rig.run(&[(DATA, 600, WRITE)]), 600);
    assert_ne!(rig.data(600), first[..600]);
    let expected = RngStats {
        requests_total: 2,
        errors_total: 0,
        random_bytes_total: 1200,
        throttled_total: 0,
    };
    assert_eq!(rig.rng.counters().snapshot(), expected);
    // Joins the thread, which ends its pass first.
    rig.rng.reset();
    assert_eq!(rig.interrupt.used.load(Ordering::SeqCst), 2);
}

#[test]
fn limits_hold_requests_back() {
    let rig = Rig::limited(RngLimits {
        bw: "2/86400000".parse().ok(),
        ops: None,
    });
    assert_eq!(rig.run(&[(DATA, 64, WRITE)]), 64);
    rig.queue.offer_chain(0, &[(DATA, 64, WRITE)]);
    rig.queue.notify();
    let throttled = || rig.rng.counters().snapshot().throttled_total;
    wait_for(|| throttled() > 0, "limit");
    assert_eq!(rig.queue.used_index(), 1);
    rig.rng.limiter.set("0".parse().ok(), None);
    wait_for(|| rig.queue.used_index() == 2, "request");
}

#[test]
fn one_request_gets_a_bounded_number_of_bytes() {
    let rig = Rig::new();
    let most = worker::MOST as u32;
    assert_eq!(rig.run(&[(DATA, 1 << 20, WRITE)]), most);
    let all = [(DATA, most, WRITE), (DATA, u32::MAX - most, WRITE)];
    assert_eq!(rig.run(&all), most);
    assert_eq!(
        rig.rng.counters().snapshot().random_bytes_total,
        2 * u64::from(most)
    );
}

#[test]
fn bad_requests_get_nothing_and_the_queue_goes_on() {
    let rig = Rig::new();
    let cases: [(&str, Buffers); 4] = [
        ("nothing to write to", &[(DATA, 64, 0)]),
        ("not memory", &[(0xd000_0000, 64, WRITE)]),
        ("leaves memory", &[((8 << 20) - 32, 64, WRITE)]),
        (
            "readable after writable",
            &[(DATA, 64, WRITE), (DATA, 64, 0)],
        ),
    ];
    for (number, (what, chain)) in (1..).zip(cases) {
        assert_eq!(rig.run(chain), 0, "{what}");
        assert_eq!(rig.rng.counters().snapshot().errors_total, number, "{what}");
        assert_eq!(rig.run(&[(DATA, 8, WRITE)]), 8, "{what}");
    }
    // A loop.
    let used = rig.queue.used_index();
    rig.queue.describe(0, (DATA, 16), WRITE | NEXT, 0);
    rig.queue.offer(0);
    rig.queue.run_until_used(used + 1);
    assert_eq!(rig.queue.used(used).1, 0);
}

#[test]
fn a_reset_stops_it_and_broken_rings_ask_for_one() {
    let mut rig = Rig::new();
    rig.rng.reset();
    rig.rng.reset();
    rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
    rig.activate();
    assert_eq!(rig.run(&[(DATA, 8, WRITE)]), 8);
    rig.queue.set_avail_index(0x4000);
    rig.queue.notify();
    wait_for(
        || rig.interrupt.reset.load(Ordering::SeqCst) == 1,
        "reset request",
    );
}

/// Numbers of the specification: an entropy device is 4; the bits are those of virtio 1.3, 6.
#[test]
fn the_device_says_what_it_is() {
    let rng = Entropy::new(RngLimits::default()).unwrap();
    let features = [32, 29, 28].iter().fold(0, |all, bit| all | 1 << bit);
    assert_eq!((rng.device_type(), rng.features()), (4, features));
    let mut config = [0xff; 8];
    rng.read_config(0, &mut config);
    assert_eq!(config, [0; 8]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_in_the_rings_stop_it(
        table in prop::collection::vec((0..0x60_0000_u64, any::<u32>(), 0..8_u16, 0..18_u16), 16),
        heads in prop::collection::vec(0..18_u16, 0..16),
        jump in 0..24_u16,
    ) {
        let mut rig = Rig::new();
        for (n, &(addr, len, flags, next)) in table.iter().enumerate() {
            rig.queue.describe(n as u16, (addr, len), flags, next);
        }
        for &head in &heads {
            rig.queue.offer(head);
        }
        rig.queue.set_avail_index(rig.queue.avail_index().wrapping_add(jump));
        rig.queue.notify();
        wait_for(
            || rig.queue.used_index() == rig.queue.avail_index()
                || rig.interrupt.reset.load(Ordering::SeqCst) > 0
                || jump > 0 || heads.iter().any(|head| *head >= 16),
            "the end of the pass",
        );
        rig.rng.reset();
        rig.queue = MockQueue::new(&rig.memory, QUEUE, 16);
        rig.activate();
        prop_assert_eq!(rig.run(&[(DATA, 8, WRITE)]), 8);
    }
}
