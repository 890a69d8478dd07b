//! The registers by which a driver sets up a queue.

use std::io;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::wire::{QueueRegister, Ring};
use crate::devices::virtio::QueueHandle;

/// A queue cannot be used as the driver has set it up.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("queue {index} cannot have {size} entries: a power of two up to {max}")]
    Size { index: usize, size: u32, max: u16 },
    #[error("queue {index}: {what} at {addr:#x} is not aligned, 0, or not guest memory")]
    Address {
        index: usize,
        what: &'static str,
        addr: u64,
    },
    #[error("queue {index}: its event cannot be duplicated: {cause}")]
    Event { index: usize, cause: io::Error },
}

/// What a snapshot keeps of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueSaved {
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// The index from which on the device takes and returns chains.
    next: u16,
}

/// The registers of one queue, exactly as written: they are checked as a whole at activation.
pub(super) struct QueueSetup {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Where the device goes on after it was restored.
    next: u16,
    pub notifier: EventFd,
}

impl QueueSetup {
    pub fn new(max_size: u16) -> io::Result<Self> {
        Ok(Self {
            max_size,
            size: max_size.into(),
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next: 0,
            notifier: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub const fn max_size(&self) -> u16 {
        self.max_size
    }

    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Addresses of descriptors, available and used ring.
    pub const fn rings(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    pub const fn is_ready(&self) -> bool {
        self.ready
    }

    /// Resets the registers. The notifier stays: it is registered with KVM.
    pub fn reset(&mut self) {
        self.size = self.max_size.into();
        self.ready = false;
        (self.descriptors, self.available, self.used) = (0, 0, 0);
        self.next = 0;
    }

    /// The registers. A device that rests has returned all chains that it has taken, or takes those again that it has not: so
    /// it goes on where the used ring is.
    pub fn save(&self, memory: &GuestMemoryMmap) -> QueueSaved {
        let index = GuestAddress(self.used.saturating_add(2));
        let next = memory.load::<u16>(index, Ordering::Acquire);
        QueueSaved {
            size: self.size,
            ready: self.ready,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            next: if self.ready {
                next.map_or(0, u16::from_le)
            } else {
                0
            },
        }
    }

    /// Takes up registers, which are checked as a whole at activation.
    pub fn restore(&mut self, saved: &QueueSaved) {
        self.size = saved.size;
        self.ready = saved.ready;
        self.descriptors = saved.descriptors;
        self.available = saved.available;
        self.used = saved.used;
        self.next = saved.next;
    }

    /// Writes a register. A queue in use can only be disabled (virtio 1.3, 4.2.2.2).
    pub fn write(&mut self, register: QueueRegister, value: u32) {
        match register {
            QueueRegister::Ready => self.ready = value & 1 != 0,
            _ if self.ready => {}
            QueueRegister::Size => self.size = value,
            QueueRegister::Address(ring, half) => {
                let addr = match ring {
                    Ring::Descriptors => &mut self.descriptors,
                    Ring::Available => &mut self.available,
                    Ring::Used => &mut self.used,
                };
                *addr = half.replace(*addr, value);
            }
        }
    }

    /// The queue for the device; `None` if the driver did not set it up.
    pub fn build(
        &self,
        index: usize,
        memory: &GuestMemoryMmap,
        event_idx: bool,
    ) -> Result<Option<QueueHandle>, QueueError> {
        if !self.ready {
            return Ok(None);
        }
        let max = self.max_size;
        let size = self.size;
        let too_large = |_| QueueError::Size { index, size, max };
        let address = |what, addr| QueueError::Address { index, what, addr };
        // The device's size is a power of two up to 32768, and nothing else is wrong with a new queue.
        let mut queue = Queue::new(max).map_err(too_large)?;
        let entries = u16::try_from(size).map_err(|_| QueueError::Size { index, size, max })?;
        queue.try_set_size(entries).map_err(too_large)?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(|_| address("the descriptor table", self.descriptors))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(|_| address("the available ring", self.available))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(|_| address("the used ring", self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.set_next_avail(self.next);
        queue.set_next_used(self.next);
        // The queue takes an available ring at 0 for one that was never set.
        if self.available == 0 || !queue.is_valid(memory) {
            return Err(address(
                "one of its rings, the available ring",
                self.available,
            ));
        }
        let notified = self
            .notifier
            .try_clone()
            .map_err(|cause| QueueError::Event { index, cause })?;
        Ok(Some(QueueHandle { queue, notified }))
    }
}
