//! Accesses to missing pages, by whomever, seen before they go on.

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
    /// It wants to write; else to read.
    pub write: bool,
    /// Its number, see [`crate::sys::Fault`].
    pub thread: i32,
    region: usize,
    offset: usize,
}

/// Whoever touches a missing page of the guest's memory waits for [`MissingPages::zero`], for as long as this lives.
/// Pages of 4 KiB only.
#[derive(Debug)]
pub struct MissingPages {
    // First, so that nobody waits for it any more when the memory goes.
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

    /// The next thread that waits, `None` when there is none; the descriptor polls readable when there is one.
    /// Threads whose page came into being meanwhile are let go on and not mentioned.
    ///
    /// # Errors
    /// The system calls'; `InvalidData` for an address that is not the guest's.
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

    /// Makes `missing` a page of zeroes and lets those go on who wait for it.
    ///
    /// # Errors
    /// ioctl_userfaultfd(2)'s.
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
