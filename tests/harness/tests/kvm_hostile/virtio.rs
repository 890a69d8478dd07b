//! What a driver does with the virtio devices of these machines, rightly or wrongly.

use ebb_payload::script::Script;

/// Flags of a descriptor (virtio 1.3, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bits of the status (virtio 1.3, 2.1).
pub const NEEDS_RESET: u64 = 64;

/// Registers (virtio 1.3, 4.2.2).
pub const FEATURES: u64 = 0x20;
pub const FEATURES_SELECT: u64 = 0x24;
pub const QUEUE_SELECT: u64 = 0x30;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const NOTIFY: u64 = 0x50;
pub const STATUS: u64 = 0x70;
pub const CONFIG: u64 = 0x100;

/// Feature bit 29: event indices. Bit 32, which is always negotiated: version 1.
pub const EVENT_INDEX: u64 = 1 << 29;
pub const INDIRECT_TABLES: u64 = 1 << 28;

/// Entries of the queues here.
pub const ENTRIES: u16 = 8;

/// A device's window.
#[derive(Clone, Copy, Debug)]
pub struct Device(pub u64);

/// A disk that may be written to, one that may not, a balloon with all of its queues, and a vsock.
pub const DISK: Device = Device(0xd000_0000);
pub const READONLY: Device = Device(0xd000_1000);
pub const BALLOON: Device = Device(0xd000_2000);
pub const VSOCK: Device = Device(0xd000_3000);

/// Where a queue's parts are.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// A buffer: address, length, flags.
pub type Buffer = (u64, u32, u16);

/// Descriptors of a chain, one after the other.
pub fn table(buffers: &[Buffer]) -> Vec<u64> {
    let words = (1u64..)
        .zip(buffers)
        .flat_map(|(next, &(addr, len, flags))| {
            [addr, u64::from(len) | u64::from(flags) << 32 | next << 48]
        });
    words.collect()
}

/// A queue with these descriptors, in which these heads are available.
pub fn queue(s: &mut Script<'_>, descriptors: &[u64], heads: &[u16]) -> Queue {
    let mut words = descriptors.to_vec();
    words.resize(2 * usize::from(ENTRIES), 0);
    let descriptors = s.words(&words, 16);
    let ring = [0, heads.len() as u16]
        .into_iter()
        .chain(heads.iter().copied());
    let mut ring: Vec<u8> = ring.flat_map(u16::to_le_bytes).collect();
    ring.resize(4 + 2 * usize::from(ENTRIES) + 2, 0);
    Queue {
        descriptors,
        available: s.data(&ring, 2),
        used: s.data(&[0; 4 + 8 * ENTRIES as usize + 2], 4),
    }
}

/// A queue with nothing in it.
pub fn empty(s: &mut Script<'_>) -> Queue {
    queue(s, &[], &[])
}

impl Device {
    pub fn set(self, s: &mut Script<'_>, register: u64, value: u64) {
        s.store(self.0 + register, 4, value);
    }

    /// From reset to FEATURES_OK, with version 1 and `features`.
    pub fn negotiate(self, s: &mut Script<'_>, features: u64) {
        for status in [0, 1, 3] {
            self.set(s, STATUS, status);
        }
        for (half, value) in [(0, features), (1, features >> 32 | 1)] {
            self.set(s, FEATURES_SELECT, half);
            self.set(s, FEATURES, value);
        }
        self.set(s, STATUS, 11);
    }

    /// Sets up a queue of `size` entries.
    pub fn queue(self, s: &mut Script<'_>, index: u64, queue: Queue, size: u64) {
        self.set(s, QUEUE_SELECT, index);
        self.set(s, QUEUE_SIZE, size);
        for (register, at) in [
            (0x80, queue.descriptors),
            (0x90, queue.available),
            (0xa0, queue.used),
        ] {
            self.set(s, register, at);
            self.set(s, register + 4, at >> 32);
        }
        self.set(s, QUEUE_READY, 1);
    }

    /// Negotiates, sets up `queues`, and starts the device.
    pub fn start(self, s: &mut Script<'_>, features: u64, queues: &[Queue]) {
        self.negotiate(s, features);
        for (index, &queue) in (0..).zip(queues) {
            self.queue(s, index, queue, ENTRIES.into());
        }
        self.set(s, STATUS, 15);
    }

    pub fn notify(self, s: &mut Script<'_>, queue: u64) {
        self.set(s, NOTIFY, queue);
    }

    /// The device must be in use, and not ask for a reset.
    pub fn is_well(self, s: &mut Script<'_>) {
        s.load(self.0 + STATUS, 4).expect(15);
    }

    /// The device must ask for a reset, sooner or later.
    pub fn asks_for_reset(self, s: &mut Script<'_>) {
        s.wait(self.0 + STATUS, 4, NEEDS_RESET, NEEDS_RESET);
    }

    /// Starts the device with one queue, in which one chain is available, and waits until it is returned.
    pub fn sends(self, s: &mut Script<'_>, features: u64, buffers: &[Buffer]) {
        let queue = queue(s, &table(buffers), &[0]);
        self.start(s, features, &[queue]);
        self.notify(s, 0);
        queue.returns(s, 1);
    }
}

impl Queue {
    /// So many chains must come back.
    pub fn returns(self, s: &mut Script<'_>, count: u64) {
        s.wait(self.used + 2, 2, 0xffff, count);
    }
}
