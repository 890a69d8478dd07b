//! Mappings that keep files open when their descriptors are closed.

use std::ptr;
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

    /// There is such a mapping at `address` until the returned value is dropped, which must be before it is unmapped.
    /// There is no place for an `index` beyond the count, and nothing happens.
    pub fn hold(&self, index: usize, address: usize) -> Pin<'_> {
        let place = self.at.get(index);
        if let Some(place) = place {
            place.store(address, Ordering::Release);
        }
        Pin(place)
    }

    /// Unmaps all that are there: in the heir, when nobody else lives.
    pub(super) fn unmap(&self) {
        for place in &self.at {
            let address = place.load(Ordering::Acquire);
            if address != 0 {
                let start = ptr::with_exposed_provenance_mut(address);
                // SAFETY: its owner, who is dead, has said that the mapping is there, and takes that back before it
                // unmaps it.
                let _ = unsafe { rustix::mm::munmap(start, self.len) };
            }
        }
    }
}

/// A mapping in [`Pins`].
#[must_use = "the mapping is forgotten when this is dropped"]
pub struct Pin<'a>(Option<&'a AtomicUsize>);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            place.store(0, Ordering::Release);
        }
    }
}
