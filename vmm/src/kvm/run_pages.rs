//! Where KVM's shared pages of the vCPUs are mapped.
//!
//! KVM shares a `kvm_run` page with the thread of each vCPU. A mapping keeps its file open, so as long as one of these
//! pages is mapped the machine and its second-level page tables stay in KVM, even when every descriptor is closed. After
//! the monitor was killed the pages are still mapped, because the reaper shares its memory: so the reaper unmaps them.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The addresses of the vCPUs' mapped `kvm_run` pages. One mapping may be several pages; all have the same length.
#[derive(Debug)]
pub struct RunPages {
    /// Bytes of a mapping.
    len: usize,
    /// Address of each vCPU's mapping; 0 if there is none.
    addresses: Box<[AtomicUsize]>,
}

impl RunPages {
    /// A table for `vcpus` vCPUs, with mappings of `len` bytes each (`KVM_GET_VCPU_MMAP_SIZE`). None is mapped yet.
    #[must_use]
    pub fn new(vcpus: usize, len: usize) -> Self {
        Self {
            len,
            addresses: (0..vcpus).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// Notes that the vCPU `index` has its mapping at `address`, until the returned value is dropped. Does nothing if
    /// the table is too small for `index`.
    ///
    /// # Safety
    /// The mapping exists until the returned value is dropped. Once this process is dead, nobody who shares its memory
    /// uses the mapping.
    pub unsafe fn register(self: &Arc<Self>, index: usize, address: usize) -> RegisteredPage {
        let page = RegisteredPage {
            pages: Arc::clone(self),
            index,
        };
        page.set(address);
        page
    }

    /// Unmaps all registered mappings.
    ///
    /// # Safety
    /// The process that registered them is dead, and the caller shares its memory.
    pub unsafe fn unmap_all(&self) {
        for place in &self.addresses {
            let address = place.load(Ordering::Acquire);
            if address != 0 {
                let start = ptr::with_exposed_provenance_mut(address);
                // SAFETY: `register` was promised that the mapping exists and that nobody uses it now.
                let _ = unsafe { rustix::mm::munmap(start, self.len) };
            }
        }
    }
}

/// An entry in [`RunPages`].
#[derive(Debug)]
#[must_use = "the entry is removed when this is dropped"]
pub struct RegisteredPage {
    pages: Arc<RunPages>,
    index: usize,
}

impl RegisteredPage {
    fn set(&self, address: usize) {
        if let Some(place) = self.pages.addresses.get(self.index) {
            place.store(address, Ordering::Release);
        }
    }
}

impl Drop for RegisteredPage {
    fn drop(&mut self) {
        self.set(0);
    }
}
