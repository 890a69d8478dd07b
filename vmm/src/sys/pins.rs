//! Mappings that keep files open when their descriptors are closed.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Mappings of equal length, each of a file that lives as long as it is mapped or open: the pages that KVM shares with the
/// threads of vCPUs, and which keep the machine and its second-level tables alive. Who frees the memory of a dead
/// process unmaps them, see `Heir`.
#[derive(Debug)]
pub struct Pins {
    len: usize,
    /// Addresses; 0: there is none.
    at: Box<[AtomicUsize]>,
}

impl Pins {
    /// Places for `count` mappings of `len` bytes, whole pages.
    #[must_use]
    pub fn new(count: usize, len: usize) -> Self {
        Self {
            len,
            at: (0..count).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// There is such a mapping at `address` until the returned value is dropped. There is no place for an `index` beyond
    /// the count, and nothing happens.
    ///
    /// # Safety
    /// It is there, and stays until then; when this process is dead nobody who shares its memory needs it.
    pub unsafe fn hold(self: &Arc<Self>, index: usize, address: usize) -> Pin {
        let pin = Pin {
            pins: Arc::clone(self),
            index,
        };
        pin.set(address);
        pin
    }

    /// Unmaps all that are there: in the heir, when nobody else lives.
    pub(super) fn unmap(&self) {
        for place in &self.at {
            let address = place.load(Ordering::Acquire);
            if address != 0 {
                let start = ptr::with_exposed_provenance_mut(address);
                // SAFETY: as promised to `hold`: it is there, and its owner is dead.
                let _ = unsafe { rustix::mm::munmap(start, self.len) };
            }
        }
    }
}

/// A mapping in [`Pins`].
#[derive(Debug)]
#[must_use = "the mapping is forgotten when this is dropped"]
pub struct Pin {
    pins: Arc<Pins>,
    index: usize,
}

impl Pin {
    fn set(&self, address: usize) {
        if let Some(place) = self.pins.at.get(self.index) {
            place.store(address, Ordering::Release);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.set(0);
    }
}
