//! The driver's side of a queue, for tests: well-behaved or not.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::virtio::{QueueHandle, VirtioInterrupt};

/// A next index follows.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Guest memory of `mib` MiB at 0, and of as much again at 4 GiB: there is a hole between.
pub fn memory(mib: usize) -> Arc<GuestMemoryMmap> {
    let ranges = [
        (GuestAddress(0), mib << 20),
        (GuestAddress(4 << 30), mib << 20),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Counts what the device tells.
#[derive(Debug, Default)]
pub struct MockInterrupt {
    pub used: AtomicU32,
    pub config: AtomicU32,
    pub reset: AtomicU32,
}

impl VirtioInterrupt for MockInterrupt {
    fn used_buffers(&self, _queue: usize) -> io::Result<()> {
        self.used.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn needs_reset(&self) -> io::Result<()> {
        self.reset.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A queue in guest memory, as its driver sees it. Takes less than 16 KiB at `base`.
pub struct MockQueue {
    pub memory: Arc<GuestMemoryMmap>,
    pub base: u64,
    pub size: u16,
    notifier: EventFd,
}

impl MockQueue {
    /// An empty queue at `base`, a multiple of 4096.
    pub fn new(memory: &Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        let queue = Self {
            memory: Arc::clone(memory),
            base,
            size,
            notifier: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        memory
            .write_slice(&[0; 0x4000], GuestAddress(base))
            .unwrap();
        queue
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    /// What the device gets at activation.
    pub fn handle(&self) -> QueueHandle {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_size(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        QueueHandle {
            queue,
            notified: self.notifier.try_clone().unwrap(),
        }
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: u16, (addr, len): (u64, u32), flags: u16, next: u16) {
        self.describe_at(self.base, index, (addr, len), flags, next);
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn describe_at(
        &self,
        table: u64,
        index: u16,
        (addr, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table + u64::from(index) * 16);
        self.memory.write_slice(&raw, at).unwrap();
    }

    /// Describes a chain of `(addr, len, flags)` from descriptor `first` on and makes it available.
    pub fn offer_chain(&self, first: u16, buffers: &[(u64, u32, u16)]) {
        self.describe_chain(first, buffers);
        self.offer(first);
    }

    /// Writes a chain of buffers that begins with descriptor `first`.
    pub fn describe_chain(&self, first: u16, buffers: &[(u64, u32, u16)]) {
        for (n, &(addr, len, flags)) in buffers.iter().enumerate() {
            let index = first + n as u16;
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            self.describe(index, (addr, len), flags | more, index + 1);
        }
    }

    /// Makes the chain from `head` available, without a notification.
    pub fn offer(&self, head: u16) {
        self.offer_at_once(&[head]);
    }

    /// Makes these chains available in one step, so that no thread sees a part of them only.
    pub fn offer_at_once(&self, heads: &[u16]) {
        let mut index = self.avail_index();
        for head in heads {
            let slot = self.avail() + 4 + 2 * u64::from(index % self.size);
            self.memory
                .write_obj(head.to_le(), GuestAddress(slot))
                .unwrap();
            index = index.wrapping_add(1);
        }
        self.set_avail_index(index);
    }

    pub fn avail_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.avail() + 2), Ordering::SeqCst)
            .unwrap()
    }

    pub fn set_avail_index(&self, index: u16) {
        self.memory
            .store(index, GuestAddress(self.avail() + 2), Ordering::SeqCst)
            .unwrap();
    }

    pub fn notify(&self) {
        self.notifier.write(1).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst)
            .unwrap()
    }

    /// Head and length of entry `n` of the used ring.
    pub fn used(&self, n: u16) -> (u32, u32) {
        let at = self.used_ring() + 4 + 8 * u64::from(n % self.size);
        let id = self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        let len = self.memory.read_obj::<u32>(GuestAddress(at + 4)).unwrap();
        (id, len)
    }

    /// Notifies, and waits until the used index has reached `index`.
    pub fn run_until_used(&self, index: u16) {
        self.notify();
        wait_for(
            || self.used_index().wrapping_sub(index) < 0x8000,
            "used index",
        );
    }
}

/// Waits up to 20 seconds for `condition`.
pub fn wait_for(condition: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what} did not come"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}
