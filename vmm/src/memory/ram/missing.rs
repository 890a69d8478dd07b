//! Catches accesses to missing pages of guest memory, by any thread, before they go on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use ebb_core::range::{GpaRange, PAGE_SIZE};

use super::GuestRam;
use crate::memory::MemoryError;
use crate::sys::Userfault;

/// A thread that waits for a page of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingPage {
    /// The page in the guest.
    pub page: GpaRange,
    /// True if the thread writes, false if it reads.
    pub write: bool,
    /// Number of the thread, see [`crate::sys::Fault`].
    pub thread: i32,
    region: usize,
    offset: usize,
}

/// While this value exists, every thread that touches a missing page of the guest's memory waits for
/// [`MissingPages::zero`]. Pages of 4 KiB only.
#[derive(Debug)]
pub struct MissingPages {
    // First: it must be dropped before the memory, so that nobody waits any more when the memory is unmapped.
    faults: Userfault,
    ram: Arc<GuestRam>,
}

impl MissingPages {
    /// Watches all of `ram`.
    ///
    /// # Errors
    /// [`MemoryError::Watch`].
    pub fn watch(ram: Arc<GuestRam>) -> Result<Self, MemoryError> {
        let watch = |source| MemoryError::Watch { source };
        let faults = Userfault::open().map_err(watch)?;
        for mapping in &ram.mappings {
            faults.watch(mapping).map_err(watch)?;
        }
        Ok(Self { faults, ram })
    }

    /// The next thread that waits, or `None` if none does. The descriptor polls readable when one does. A thread whose
    /// page exists by now is woken and not returned.
    ///
    /// # Errors
    /// Those of read(2) and ioctl_userfaultfd(2); `InvalidData` for an address that is not guest memory.
    pub fn next(&self) -> io::Result<Option<MissingPage>> {
        while let Some(fault) = self.faults.next()? {
            let mut regions = self.ram.regions.iter().zip(&self.ram.mappings).enumerate();
            let found = regions.find_map(|(index, (region, mapping))| {
                let offset = fault.address.checked_sub(mapping.address())?;
                (offset < mapping.len()).then_some((index, region.gpa, offset))
            });
            let (region, gpa, offset) = found.ok_or(io::ErrorKind::InvalidData)?;
            let mapping = &self.ram.mappings[region];
            if mapping.is_present(offset)? {
                self.faults.wake(mapping, offset)?;
                continue;
            }
            let start = gpa.start() + offset as u64;
            let page = GpaRange::new(start, start + PAGE_SIZE).ok_or(io::ErrorKind::InvalidData)?;
            return Ok(Some(MissingPage {
                page,
                write: fault.write,
                thread: fault.thread,
                region,
                offset,
            }));
        }
        Ok(None)
    }

    /// Makes `missing` a page of zeroes and wakes the threads that wait for it.
    ///
    /// # Errors
    /// Those of ioctl_userfaultfd(2).
    pub fn zero(&self, missing: &MissingPage) -> io::Result<()> {
        self.faults
            .zero(&self.ram.mappings[missing.region], missing.offset)
    }
}

impl AsFd for MissingPages {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}
