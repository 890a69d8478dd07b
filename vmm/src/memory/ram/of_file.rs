//! Memory whose content comes from files.

use std::io;
use std::os::fd::BorrowedFd;

use ebb_core::range::GpaRange;

use super::{Extent, GuestRam, RamRegion};
use crate::memory::MemoryError;

impl GuestRam {
    /// Puts the content of `file` behind the RAM: `runs` of it have their content there, whole pages, at [`GuestRam::file_offset`], and are
    /// read when they are touched. The rest stays as it is. From now on pages can be discarded but not marked free, and
    /// several ranges are not released in one call.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; [`MemoryError::File`] if the kernel refuses.
    pub fn map_file(&mut self, file: BorrowedFd<'_>, runs: &[GpaRange]) -> Result<(), MemoryError> {
        self.can_mark_free = false;
        let huge_pages = self.huge_pages;
        for &run in runs {
            self.check(run)?;
            let parts: Vec<_> = self.parts(run).collect();
            for (mapping, part) in parts {
                let Extent { offset, len, .. } = self.extent(0, (mapping, part));
                let at = self.file_offset(part.start());
                let mapped =
                    self.mappings[mapping].map_private((offset, len), file, at, huge_pages);
                mapped.map_err(|source| MemoryError::File {
                    bytes: part.len(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Where the byte at `gpa`, in RAM, is in a file that holds all regions one after the other.
    #[must_use]
    pub fn file_offset(&self, gpa: u64) -> u64 {
        let below =
            |region: &RamRegion| gpa.min(region.gpa.end()).saturating_sub(region.gpa.start());
        self.regions.iter().map(below).sum()
    }

    /// The parts of `range` whose content still is that of a file, ascending: nobody has written there, and nothing was released.
    ///
    /// # Errors
    /// If the kernel does not say which pages were written (/proc/self/pagemap).
    pub fn unwritten(&self, range: GpaRange) -> io::Result<Vec<GpaRange>> {
        let mut unwritten = Vec::new();
        for (index, part) in self.parts(range) {
            let mapping = &self.mappings[index];
            let Extent { offset, len, .. } = self.extent(0, (index, part));
            if !mapping.has_source(offset, len) {
                continue;
            }
            let pages = self.process.page_map();
            let pages =
                pages.ok_or_else(|| io::Error::other("/proc/self/pagemap cannot be read"))?;
            let start = self.regions[index].gpa.start();
            let runs = mapping.unwritten(pages, offset, len)?.into_iter();
            unwritten.extend(
                runs.filter_map(|run| {
                    GpaRange::new(start + run.start as u64, start + run.end as u64)
                }),
            );
        }
        Ok(unwritten)
    }
}
