//! A queue that a worker serves.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, ChainFault, GuestFaults};
use crate::devices::virtio::{QueueHandle, VirtioInterrupt};

/// A queue's rings are inconsistent: it is out of service until the device is reset.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} is out of service until a reset: {cause}")]
pub struct QueueFailure {
    index: usize,
    cause: Error,
}

/// A queue that a worker serves.
pub struct ServedQueue {
    index: usize,
    queue: Queue,
    notified: EventFd,
    failed: bool,
    /// The used index that the driver was told of last, or did not want to be told of.
    told: u16,
}

impl ServedQueue {
    /// Takes over queue number `index`.
    #[must_use]
    pub fn new(index: usize, handle: QueueHandle) -> Self {
        Self {
            index,
            told: handle.queue.next_used(),
            queue: handle.queue,
            notified: handle.notified,
            failed: false,
        }
    }

    /// Becomes readable when the driver notifies the queue.
    #[must_use]
    pub const fn notified(&self) -> &EventFd {
        &self.notified
    }

    /// Number of entries: the maximum number of chains of one pass.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Begins a pass: clears the notification, and disables further ones while the queue is served.
    pub fn begin(&mut self, memory: &GuestMemoryMmap) {
        // There may be nothing to read. Bad rings are reported by the next access to them.
        let _ = self.notified.read();
        let _ = self.queue.disable_notification(memory);
    }

    /// Loads the next chain into `chain`; `None` if there is none, or the queue is out of service. A chain with a fault
    /// is delivered together with the fault, and has to be [returned](Self::give_back) like any other.
    ///
    /// # Errors
    /// [`QueueFailure`], once.
    pub fn next(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &mut Chain,
    ) -> Result<Option<Result<(), ChainFault>>, QueueFailure> {
        if self.failed {
            return Ok(None);
        }
        // The iterator refuses an available index that has jumped by more than the queue's size.
        let next = match self.queue.iter(memory) {
            Ok(mut heads) => heads.next(),
            Err(cause) => return Err(self.fail(cause)),
        };
        let Some(descriptors) = next else {
            return Ok(None);
        };
        let (head, size) = (descriptors.head_index(), self.queue.size());
        // In a queue that the driver made shorter, Linux builds indirect chains longer than the queue: the limit is the
        // device's size.
        let loaded = chain.load(descriptors, self.queue.max_size());
        Ok(Some(if head < size {
            loaded
        } else {
            Err(ChainFault::Head { head, size })
        }))
    }

    /// Puts a chain into the used ring with the number of bytes that the device wrote. A head that is no index
    /// of the queue is ignored.
    ///
    /// # Errors
    /// [`QueueFailure`], once.
    pub fn give_back(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), QueueFailure> {
        if self.failed || head >= self.queue.size() {
            return Ok(());
        }
        self.queue
            .add_used(memory, head, written)
            .map_err(|cause| self.fail(cause))
    }

    /// The same with several chains, `(head, written)`, all of which the driver sees at once. They are indices of the queue, and
    /// no more than it has.
    ///
    /// # Errors
    /// [`QueueFailure`], once.
    pub fn give_back_all(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueFailure> {
        let Some((&(head, written), before)) = chains.split_last() else {
            return Ok(());
        };
        if self.failed {
            return Ok(());
        }
        for &(head, written) in before {
            // Not visible until the index passes it (virtio 1.3, 2.7.8).
            let slot = self.queue.next_used();
            let at = self.queue.used_ring() + 4 + 8 * u64::from(slot % self.queue.size());
            let element = u64::from(head) | u64::from(written) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(at))
                .map_err(|cause| self.fail(Error::GuestMemory(cause)))?;
            self.queue.set_next_used(slot.wrapping_add(1));
        }
        self.give_back(memory, head, written)
    }

    /// Ends a pass: interrupts the driver if it wants that, and enables notifications again. If there are more chains
    /// already, it notifies itself.
    ///
    /// # Errors
    /// [`QueueFailure`], once.
    pub fn end(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn VirtioInterrupt,
        faults: &GuestFaults,
    ) -> Result<(), QueueFailure> {
        self.tell(memory, interrupt, faults);
        if self.failed {
            return Ok(());
        }
        match self.queue.enable_notification(memory) {
            Ok(true) => {
                // The counter can only be full when it is readable anyway.
                let _ = self.notified.write(1);
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(cause) => Err(self.fail(cause)),
        }
    }

    /// Ends a pass without enabling notifications: for a device that has all the chains that it needs.
    pub fn tell(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &dyn VirtioInterrupt,
        faults: &GuestFaults,
    ) {
        let told = std::mem::replace(&mut self.told, self.queue.next_used());
        if told != self.told && self.wants_interrupt(memory, told) {
            interrupt
                .used_buffers(self.index)
                .unwrap_or_else(|error| faults.report(format_args!("interrupt: {error}")));
        }
    }

    /// Virtio 1.3, 2.7.7.2: whether the driver wants to hear of the chains from index `old` on. The queue itself knows neither
    /// the flag nor chains that were given back together.
    fn wants_interrupt(&self, memory: &GuestMemoryMmap, old: u16) -> bool {
        let word = |offset| {
            let at = GuestAddress(self.queue.avail_ring() + offset);
            memory.load::<u16>(at, Ordering::Relaxed).map(u16::from_le)
        };
        // What was given back is visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.queue.event_idx_enabled() {
            let new = self.queue.next_used();
            return word(4 + 2 * u64::from(self.queue.size())).map_or(true, |event| {
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            });
        }
        word(0).map_or(true, |flags| {
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        })
    }

    fn fail(&mut self, cause: Error) -> QueueFailure {
        self.failed = true;
        QueueFailure {
            index: self.index,
            cause,
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueT;

    use super::*;
    use crate::devices::virtio::queue::tests::driver::{MockInterrupt, MockQueue, memory};

    /// The driver asks to be told once index `event` is used (virtio 1.3, 2.7.7).
    #[test]
    fn chains_given_back_together_interrupt_when_the_driver_asked_for_one_of_them() {
        for (event, expected) in [(0, 1), (1, 1), (2, 1), (3, 0), (0xffff, 0)] {
            let (memory, interrupt) = (memory(8), MockInterrupt::default());
            let driver = MockQueue::new(&memory, 0x10_0000, 16);
            let mut handle = driver.handle();
            handle.queue.set_event_idx(true);
            let mut queue = ServedQueue::new(0, handle);
            let wish = GuestAddress(driver.avail() + 4 + 2 * 16);
            memory.write_obj(event, wish).unwrap();
            queue
                .give_back_all(&memory, &[(5, 10), (3, 20), (4, 30)])
                .unwrap();
            assert_eq!(driver.used_index(), 3);
            let used: Vec<_> = (0..3).map(|n| driver.used(n)).collect();
            assert_eq!(used, [(5, 10), (3, 20), (4, 30)]);
            let faults = GuestFaults::new("test");
            for _ in 0..2 {
                // The second time there is nothing new.
                queue.tell(&memory, &interrupt, &faults);
            }
            let count = interrupt.used.load(Ordering::SeqCst);
            assert_eq!(count, expected, "event {event}");
        }
    }
}
