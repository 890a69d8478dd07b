//! Memory whose content comes from a page server.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use ebb_core::range::GpaRange;

use super::{Extent, GuestRam};
use crate::memory::MemoryError;
use crate::sys::Userfault;

/// Memory that a page server gives content to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Address in this process.
    pub address: usize,
    /// Length in bytes.
    pub len: usize,
    /// Where its content is in a file that holds all regions one after the other.
    pub file_offset: u64,
}

impl GuestRam {
    /// Leaves the content of `runs`, which nobody has touched, to whoever gets [`GuestRam::page_faults`]: who touches a page
    /// there waits until the other has put it there. What is released of it reads zero afterwards. From now on pages can be
    /// discarded but not marked free, and several ranges are not released in one call.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; [`MemoryError::Watch`] if the host does not allow it.
    pub fn serve(&mut self, runs: &[GpaRange]) -> Result<(), MemoryError> {
        self.can_mark_free = false;
        let watch = |source| MemoryError::Watch { source };
        let faults = Arc::new(Userfault::open().map_err(watch)?);
        for &run in runs {
            self.check(run)?;
            let parts: Vec<_> = self.parts(run).collect();
            for part in parts {
                let Extent { offset, len, .. } = self.extent(0, part);
                let served = self.mappings[part.0].serve((offset, len), &faults, self.huge_pages);
                served.map_err(watch)?;
            }
        }
        self.faults = Some(faults);
        Ok(())
    }

    /// What a page server has to know of `runs`.
    #[must_use]
    pub fn served(&self, runs: &[GpaRange]) -> Vec<Served> {
        let parts = runs.iter().flat_map(|run| self.parts(*run));
        let served = parts.map(|(index, part)| {
            let Extent { offset, len, .. } = self.extent(0, (index, part));
            Served {
                address: self.mappings[index].address() + offset,
                len,
                file_offset: self.file_offset(part.start()),
            }
        });
        served.collect()
    }

    /// By this a page server hears who waits for a page, and puts it there; `None` if there is none.
    #[must_use]
    pub fn page_faults(&self) -> Option<BorrowedFd<'_>> {
        self.faults.as_ref().map(|faults| faults.as_fd())
    }

    /// Wakes all that wait for a page server: what it has not given is zero from now on. So nobody may care for the content any
    /// more. It makes system calls and nothing else.
    pub fn stop_serving(&self) {
        for mapping in self.mappings.iter().filter(|it| it.has_overlay()) {
            if let Some(faults) = &self.faults {
                // There is nothing to do about an error.
                let _ = faults.unwatch(mapping);
            }
        }
    }
}
