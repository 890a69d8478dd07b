//! The interface against a driver that may be hostile. A socket is in the tap's place: it keeps frames apart, too.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::config::parse_keys;
use crate::devices::virtio::queue::tests::driver::{
    MockInterrupt, MockQueue, NEXT, WRITE, memory, wait_for,
};

const RECEIVE: u64 = 0x10_0000;
const TRANSMIT: u64 = 0x11_0000;
const DATA: u64 = 0x30_0000;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SIZE: u16 = 16;

/// Address, length and flags of each buffer of a chain.
type Buffers<'a> = &'a [(u64, u32, u16)];

struct Rig {
    memory: Arc<GuestMemoryMmap>,
    receive: MockQueue,
    transmit: MockQueue,
    net: Net,
    host: UnixDatagram,
    tap: UnixDatagram,
    interrupt: Arc<MockInterrupt>,
}

/// A header of zeroes, and bytes that differ.
fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend((0..bytes - HEADER_BYTES).map(|at| (at % 251) as u8));
    frame
}

impl Rig {
    /// With the features that are offered, but for these.
    fn without(left_out: u64) -> Self {
        Self::limited("", left_out)
    }

    fn limited(limits: &str, left_out: u64) -> Self {
        let memory = memory(8);
        let (host, tap) = UnixDatagram::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        tap.set_nonblocking(true).unwrap();
        let config = format!("tap=test,mac=02:00:00:00:00:09,mtu=9000{limits}");
        let config = parse_keys(&config).unwrap();
        let device = OwnedFd::from(tap.try_clone().unwrap());
        let mut rig = Self {
            receive: MockQueue::new(&memory, RECEIVE, SIZE),
            transmit: MockQueue::new(&memory, TRANSMIT, SIZE),
            memory,
            net: Net::new(0, "m", &config, Tap::over(File::from(device))).unwrap(),
            host,
            tap,
            interrupt: Arc::default(),
        };
        rig.activate(left_out);
        rig
    }

    fn activate(&mut self, left_out: u64) {
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.net.features() & !left_out,
            queues: vec![Some(self.receive.handle()), Some(self.transmit.handle())],
            interrupt: self.interrupt.clone(),
        };
        self.net.activate(activation).unwrap();
        // A frame that is sent proves that old frames for the guest are forgotten by now.
        self.send(&[(DATA, 64, 0)]);
        self.host.recv(&mut [0; 128]).unwrap();
    }

    /// The guest sends a chain, and it comes back.
    fn send(&self, buffers: Buffers) {
        let used = self.transmit.used_index();
        self.transmit.offer_chain(0, buffers);
        self.transmit.run_until_used(used.wrapping_add(1));
    }

    /// Offers buffers of these sizes, one after the other in memory, from descriptor `first` on.
    fn offer(&self, first: u16, sizes: &[u32]) {
        let mut addr = DATA;
        for (index, &size) in (first..).zip(sizes) {
            self.receive.describe(index, (addr, size), WRITE, 0);
            self.receive.offer(index);
            addr += u64::from(size);
        }
        self.receive.notify();
    }

    fn received(&self, index: u16) {
        wait_for(|| self.receive.used_index() == index, "frame");
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        data
    }

    fn assert_data(&self, mut expected: Vec<u8>, buffers: u8) {
        expected[wire::NUM_BUFFERS] = buffers;
        assert!(self.data(expected.len()) == expected);
    }

    /// A frame goes each way, through fresh queues.
    fn assert_alive(&mut self) {
        self.net.reset();
        while self.host.recv(&mut [0; 128]).is_ok() {}
        self.receive = MockQueue::new(&self.memory, RECEIVE, SIZE);
        self.transmit = MockQueue::new(&self.memory, TRANSMIT, SIZE);
        self.activate(0);
        self.offer(0, &[2048]);
        self.host.send(&frame(100)).unwrap();
        self.received(1);
        self.assert_data(frame(100), 1);
    }
}

#[test]
fn a_frame_comes_and_goes() {
    let rig = Rig::without(0);
    rig.offer(3, &[1526]);
    rig.host.send(&frame(1526)).unwrap();
    rig.received(1);
    assert_eq!(rig.receive.used(0), (3, 1526));
    rig.assert_data(frame(1526), 1);
    // Cut anywhere.
    rig.send(&[(DATA, 5, 0), (DATA + 5, 20, 0), (DATA + 25, 1501, 0)]);
    let mut sent = vec![0; 2000];
    assert_eq!(rig.host.recv(&mut sent).unwrap(), 1526);
    rig.assert_data(sent[..1526].to_vec(), 1);
    let expected = NetStats {
        rx_packets_total: 1,
        rx_bytes_total: 1514,
        rx_dropped_total: 0,
        tx_packets_total: 2,
        tx_bytes_total: 52 + 1514,
        tx_dropped_total: 0,
        throttled_total: 0,
    };
    assert_eq!(rig.net.counters().snapshot(), expected);
    wait_for(
        || rig.interrupt.used.load(Ordering::SeqCst) == 3,
        "interrupts",
    );
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let rig = Rig::without(0);
    rig.offer(0, &[12, 1000, 1000, 500, 500]);
    rig.host.send(&frame(2500)).unwrap();
    rig.received(4);
    let used: Vec<_> = (0..4).map(|n| rig.receive.used(n)).collect();
    assert_eq!(used, [(0, 12), (1, 1000), (2, 1000), (3, 488)]);
    rig.assert_data(frame(2500), 4);
    rig.host.send(&frame(400)).unwrap();
    rig.received(5);
    assert_eq!(rig.receive.used(4), (4, 400));
}

#[test]
fn the_end_of_a_frame_waits_for_buffers() {
    let rig = Rig::without(0);
    rig.offer(0, &[600]);
    rig.host.send(&frame(1900)).unwrap();
    // FIONREAD: the length of the next message.
    wait_for(
        || rustix::io::ioctl_fionread(&rig.tap).unwrap() == 0,
        "the frame's end",
    );
    assert_eq!(rig.receive.used_index(), 0);
    // The rest is right behind.
    rig.receive.describe(1, (DATA + 600, 700), WRITE, 0);
    rig.receive.offer(1);
    rig.receive.describe(2, (DATA + 1300, 700), WRITE, 0);
    rig.receive.offer(2);
    rig.receive.notify();
    rig.received(3);
    assert_eq!(rig.receive.used(2), (2, 600));
    rig.assert_data(frame(1900), 3);
    assert_eq!(rig.net.counters().snapshot().rx_dropped_total, 0);
}

#[test]
fn frames_that_fit_into_no_buffers_are_dropped() {
    let rig = Rig::without(0);
    rig.offer(0, &[20; SIZE as usize]);
    rig.host.send(&frame(400)).unwrap();
    let dropped = |count| {
        wait_for(
            || rig.net.counters().snapshot().rx_dropped_total == count,
            "drop",
        )
    };
    dropped(1);
    rig.host.send(&frame(300)).unwrap();
    rig.received(15);

    let rig = Rig::without(MERGEABLE);
    rig.offer(0, &[400, 1000]);
    rig.host.send(&frame(401)).unwrap();
    wait_for(
        || rig.net.counters().snapshot().rx_dropped_total == 1,
        "drop",
    );
    rig.host.send(&frame(400)).unwrap();
    rig.received(1);
    assert_eq!(rig.receive.used(0), (0, 400));
    rig.assert_data(frame(400), 1);
}

#[test]
fn buffers_that_are_none_come_back_empty() {
    let rig = Rig::without(0);
    let cases: [(&str, Buffers); 5] = [
        ("nothing to write to", &[(DATA, 2048, 0)]),
        ("less than a header", &[(DATA, 11, WRITE)]),
        ("not memory", &[(DATA, 64, WRITE), (0xd000_0000, 64, WRITE)]),
        ("leaves memory", &[((8 << 20) - 32, 64, WRITE)]),
        (
            "readable after writable",
            &[(DATA, 64, WRITE), (DATA, 64, 0)],
        ),
    ];
    for (n, (what, chain)) in (0..).zip(cases) {
        rig.receive.offer_chain(0, chain);
        rig.receive.notify();
        rig.received(n + 1);
        assert_eq!(rig.receive.used(n), (0, 0), "{what}");
    }
    rig.offer(0, &[2048]);
    rig.host.send(&frame(100)).unwrap();
    rig.received(6);
    assert_eq!(rig.net.counters().snapshot().rx_packets_total, 1);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let rig = Rig::without(0);
    let large = (1 << 20, 0x10_0000, 0);
    let cases: [(&str, Buffers); 7] = [
        ("nothing to read", &[(DATA, 64, WRITE)]),
        ("a header only", &[(DATA, 12, 0)]),
        ("no whole addresses", &[(DATA, 12, 0), (DATA, 13, 0)]),
        ("too long", &[(DATA, 12, 0), (DATA, 65554, 0)]),
        ("4 GiB", &[(DATA, u32::MAX, 0)]),
        ("not memory", &[(0xd000_0000, 64, 0)]),
        ("much", &[large, large, large, large]),
    ];
    for (number, (what, chain)) in (1..).zip(cases) {
        rig.send(chain);
        assert_eq!(
            rig.net.counters().snapshot().tx_dropped_total,
            number,
            "{what}"
        );
        assert!(rig.host.recv(&mut [0; 64]).is_err(), "{what}");
    }
    // The largest.
    rig.send(&[(DATA, 12, 0), (DATA + 12, 65553, 0)]);
    let mut sent = vec![0; 70000];
    assert_eq!(rig.host.recv(&mut sent).unwrap(), 65565);
    // A loop.
    let used = rig.transmit.used_index();
    rig.transmit.describe(0, (DATA, 64), NEXT, 0);
    rig.transmit.offer(0);
    rig.transmit.run_until_used(used + 1);
    assert_eq!(rig.net.counters().snapshot().tx_dropped_total, 8);
}

/// The host has no room for more: what the guest sends is gone, and nothing is kept.
#[test]
fn what_the_host_does_not_take_is_dropped() {
    let rig = Rig::without(0);
    for _ in 0..2000 {
        rig.send(&[(DATA, 12, 0), (DATA, 1500, 0)]);
    }
    let stats = rig.net.counters().snapshot();
    assert!(stats.tx_dropped_total > 0);
    assert_eq!(stats.tx_packets_total - 1 + stats.tx_dropped_total, 2000);
}

#[test]
fn a_reset_stops_it_and_old_frames_are_forgotten() {
    let mut rig = Rig::without(0);
    rig.offer(0, &[2048]);
    rig.net.reset();
    rig.net.reset();
    for _ in 0..3 {
        rig.host.send(&frame(99)).unwrap();
    }
    rig.assert_alive();
    assert_eq!(rig.net.counters().snapshot().rx_dropped_total, 3);
    for queue in [&rig.receive, &rig.transmit] {
        let before = rig.interrupt.reset.load(Ordering::SeqCst);
        queue.set_avail_index(0x4000);
        queue.notify();
        wait_for(
            || rig.interrupt.reset.load(Ordering::SeqCst) > before,
            "reset request",
        );
    }
}

/// A bucket that fills in a day does not fill here. The rig has sent one frame.
#[test]
fn limits_hold_frames_back_in_each_direction() {
    let rig = Rig::limited(",tx_ops=3/86400000", 0);
    rig.send(&[(DATA, 64, 0)]);
    rig.send(&[(DATA, 64, 0)]);
    let throttled = |rig: &Rig| rig.net.counters().snapshot().throttled_total;
    wait_for(|| throttled(&rig) == 1, "limit");
    rig.transmit.offer_chain(0, &[(DATA, 64, 0)]);
    rig.transmit.notify();
    wait_for(|| throttled(&rig) == 2, "limit");
    assert_eq!(rig.net.counters().snapshot().tx_packets_total, 3);
    // The other direction goes on.
    rig.offer(0, &[512; 8]);
    for count in 1..4 {
        rig.host.send(&frame(100)).unwrap();
        rig.received(count);
    }

    let mut rig = Rig::limited(",rx_bw=101/86400000", 0);
    rig.offer(0, &[512; 8]);
    for count in 1..3 {
        rig.host.send(&frame(100)).unwrap();
        rig.received(count);
    }
    rig.host.send(&frame(100)).unwrap();
    wait_for(|| throttled(&rig) > 0, "limit");
    rig.send(&[(DATA, 64, 0)]);
    assert_eq!(rig.receive.used_index(), 2);
    rig.net.reset();
    assert_eq!(rig.net.counters().snapshot().rx_packets_total, 2);
}

#[test]
fn another_limit_lets_go_what_was_held_back() {
    let rig = Rig::limited(",tx_ops=1/86400000,rx_ops=1/86400000", 0);
    rig.offer(0, &[512; 8]);
    rig.host.send(&frame(100)).unwrap();
    rig.received(1);
    rig.host.send(&frame(100)).unwrap();
    rig.transmit.offer_chain(0, &[(DATA, 64, 0)]);
    rig.transmit.notify();
    let throttled = || rig.net.counters().snapshot().throttled_total;
    wait_for(|| throttled() >= 2, "limits");
    let sent = rig.transmit.used_index();
    let none = Some("0".parse().unwrap());
    rig.net.limits().transmit.set(None, none);
    wait_for(|| rig.transmit.used_index() == sent + 1, "frame");
    assert_eq!(rig.receive.used_index(), 1, "the other limit stays");
    rig.net.limits().receive.set(None, none);
    rig.received(2);
}

#[test]
fn what_was_held_back_goes_on_by_itself() {
    let rig = Rig::limited(",tx_ops=5/20,rx_bw=300/20", 0);
    rig.offer(0, &[512; SIZE as usize]);
    for count in 1..=SIZE {
        rig.send(&[(DATA, 64, 0)]);
        rig.host.send(&frame(100)).unwrap();
        rig.received(count);
    }
    assert!(rig.net.counters().snapshot().throttled_total > 0);
}

#[test]
fn both_queues_are_needed() {
    let mut rig = Rig::without(0);
    rig.net.reset();
    let activation = Activation {
        memory: Arc::clone(&rig.memory),
        features: rig.net.features(),
        queues: vec![Some(rig.receive.handle()), None],
        interrupt: rig.interrupt.clone(),
    };
    let error = rig.net.activate(activation).unwrap_err();
    assert!(matches!(error, ActivationError::MissingQueue(1)), "{error}");
}

/// Numbers of the specification: a network device is 1; the bits are those of virtio 1.3, 5.1.3 and 6.
#[test]
fn the_device_says_what_it_is_and_can_do() {
    let rig = Rig::without(0);
    let features = [32, 29, 28, 3, 5, 15, 16];
    let features = features.iter().fold(0, |all, bit| all | 1 << bit);
    assert_eq!((rig.net.device_type(), rig.net.features()), (1, features));
    assert_eq!(rig.net.queue_sizes(), [QUEUE_SIZE; 2]);
    let mut config = [0xff; 16];
    rig.net.read_config(0, &mut config);
    let mtu = 9000_u16.to_le_bytes();
    assert_eq!(config[..8], [2, 0, 0, 0, 0, 9, 1, 0]);
    assert_eq!(config[8..], [0, 0, mtu[0], mtu[1], 0, 0, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_in_the_rings_stop_it(
        table in prop::collection::vec((0..0x60_0000_u64, any::<u32>(), 0..8_u16, 0..18_u16), 16),
        heads in prop::collection::vec(0..18_u16, 0..16),
        jump in 0..24_u16,
        left_out in prop_oneof![Just(0), Just(MERGEABLE)],
    ) {
        let mut rig = Rig::without(left_out);
        for queue in [&rig.receive, &rig.transmit] {
            for (n, &(addr, len, flags, next)) in table.iter().enumerate() {
                // Most chains are good for something.
                let len = if n % 2 == 0 { len % 4096 } else { len };
                let flags = if queue.base == RECEIVE { flags | WRITE } else { flags & !WRITE };
                queue.describe(n as u16, (addr, len), flags, next);
            }
            for &head in &heads {
                queue.offer(head);
            }
            queue.set_avail_index(queue.avail_index().wrapping_add(jump));
        }
        for bytes in [60, 1500, 9000] {
            // There may be no room.
            let _ = rig.host.send(&frame(bytes));
        }
        rig.receive.notify();
        rig.transmit.notify();
        rig.assert_alive();
    }
}
