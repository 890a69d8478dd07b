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
    added: bool,
}

impl ServedQueue {
    /// Takes over queue number `index`.
    #[must_use]
    pub fn new(index: usize, handle: QueueHandle) -> Self {
        Self {
            index,
            queue: handle.queue,
            notified: handle.notified,
            failed: false,
            added: false,
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
            .map_err(|cause| self.fail(cause))?;
        self.added = true;
        Ok(())
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
        if std::mem::take(&mut self.added) && self.wants_interrupt(memory) {
            interrupt
                .used_buffers()
                .unwrap_or_else(|error| faults.report(format_args!("interrupt: {error}")));
        }
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

    /// Virtio 1.3, 2.7.7.2. The queue itself knows event indices only, not the flag.
    fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> bool {
        let wanted = self.queue.needs_notification(memory).unwrap_or(true);
        if self.queue.event_idx_enabled() {
            return wanted;
        }
        fence(Ordering::SeqCst);
        let flags = memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        flags.map_or(true, |flags| {
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
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
