//! Which pages this process has: /proc/self/pagemap, and its `PAGEMAP_SCAN` (Linux 6.7).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`, see linux/fs.h.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// The page is in memory.
const PRESENT: u64 = 1 << 3;
/// The page is swapped out.
const SWAPPED: u64 = 1 << 4;
/// The page is the zero page, which takes no memory.
const ZERO: u64 = 1 << 5;

/// The page is a part of a huge page that is mapped as one.
const HUGE: u64 = 1 << 6;

/// Bits of an entry of the file itself (Linux, Documentation/admin-guide/mm/pagemap.rst): the page is in memory, is swapped out, is
/// a file's or shared.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;

/// Runs of pages in one answer.
const RUNS: usize = 64;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Scan>() == 96);

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    end: u64,
    categories: u64,
}

/// The pages of this process.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens it. An older kernel refuses the first [`PageMap::held`] only.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// How many bytes of private memory from `address` on, `len` in all, are in memory or swapped out; the zero page does
    /// not count. Both are multiples of the page size.
    ///
    /// # Errors
    /// Those of ioctl(2): `ENOTTY` before Linux 6.7.
    pub fn held(&self, address: usize, len: usize) -> io::Result<usize> {
        self.count(address, len, ZERO, PRESENT | SWAPPED)
    }

    /// How many bytes of `parts`, addresses of private memory in ascending order, are held as [`PageMap::held`] says. All that lies
    /// between them is looked at, too.
    ///
    /// # Errors
    /// As for [`PageMap::held`].
    pub fn held_of(&self, mut parts: &[Range<usize>]) -> io::Result<usize> {
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
            return Ok(0);
        };
        let mut held = 0;
        self.scan(first.start..last.end, ZERO, PRESENT | SWAPPED, |run| {
            while let [part, rest @ ..] = parts {
                let common = part.start.max(run.start)..part.end.min(run.end);
                held += common.len();
                if part.end > run.end {
                    break;
                }
                parts = rest;
            }
        })?;
        Ok(held)
    }

    /// The parts of these bytes, ascending and apart, that lie in huge pages that are mapped as such.
    ///
    /// # Errors
    /// As for [`PageMap::held`].
    pub fn huge(&self, address: usize, len: usize) -> io::Result<Vec<Range<usize>>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        self.scan(
            address..address + len,
            ZERO | HUGE,
            PRESENT,
            |run| match parts.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => parts.push(run),
            },
        )?;
        Ok(parts)
    }

    /// For each page of private memory from `address` on, `len` bytes in all, whether this process has its own content there: in
    /// memory or swapped out, and not the page of a file. The zero page counts. Both are multiples of the page size.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn is_private(&self, address: usize, len: usize) -> io::Result<Vec<bool>> {
        const ENTRY: usize = 8;
        let mut entries = vec![0; len / 4096 * ENTRY];
        self.0
            .read_exact_at(&mut entries, (address / 4096 * ENTRY) as u64)?;
        let (entries, _) = entries.as_chunks::<ENTRY>();
        let is_private = |entry: &[u8; ENTRY]| {
            let entry = u64::from_ne_bytes(*entry);
            entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0
        };
        Ok(entries.iter().map(is_private).collect())
    }

    /// How many bytes have one of the categories `any` and all of `mask`: `ZERO` in it means "not the zero page".
    fn count(&self, address: usize, len: usize, mask: u64, any: u64) -> io::Result<usize> {
        let mut bytes = 0;
        self.scan(address..address + len, mask, any, |run| bytes += run.len())?;
        Ok(bytes)
    }

    /// Gives `each` the runs of pages, in ascending order, that [`PageMap::count`] counts.
    fn scan(
        &self,
        addresses: Range<usize>,
        mask: u64,
        any: u64,
        mut each: impl FnMut(Range<usize>),
    ) -> io::Result<()> {
        let (mut at, end) = (addresses.start as u64, addresses.end as u64);
        let mut runs = [Run::default(); RUNS];
        while at < end {
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                start: at,
                end,
                vec: runs.as_mut_ptr().expose_provenance() as u64,
                vec_len: RUNS as u64,
                category_inverted: ZERO,
                category_mask: mask,
                category_anyof_mask: any,
                return_mask: any,
                ..Scan::default()
            };
            // SAFETY: the kernel writes `walk_end` of `scan`, and as many elements of `runs` as it has. It reads page tables
            // and changes nothing.
            let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let Ok(found) = usize::try_from(found) else {
                return Err(io::Error::last_os_error());
            };
            for run in runs.iter().take(found) {
                // They are addresses of this process.
                each(run.start as usize..run.end as usize);
            }
            // It always gets on; if it did not, this would not end.
            at = scan.walk_end.max(at + 4096);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use ebb_core::release::Release;

    use super::*;
    use crate::sys::Mapping;
    use crate::sys::mapping::MappingKind;

    const PAGE: usize = 4096;

    #[test]
    fn pages_with_content_are_held_and_others_are_not() {
        let mapping = Mapping::new(2 << 20, 0, MappingKind::Small).unwrap();
        mapping.set_transparent_huge_pages(false).ok();
        let map = PageMap::open().unwrap();
        let held = |first, pages| map.held(mapping.address() + first * PAGE, pages * PAGE);
        match held(0, 512) {
            Err(error) => return assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
            Ok(bytes) => assert_eq!(bytes, 0),
        }
        // More runs than one answer holds.
        for page in (0..400).step_by(2) {
            mapping.populate_part(page * PAGE, PAGE).unwrap();
        }
        assert_eq!(held(0, 512).unwrap(), 200 * PAGE);
        assert_eq!(held(1, 4).unwrap(), 2 * PAGE);
        mapping.release(0, 100 * PAGE, Release::Discard).unwrap();
        assert_eq!(held(0, 512).unwrap(), 150 * PAGE);
        assert_eq!(held(401, 111).unwrap(), 0);
        // Of pages 100, 102 and so on up to 398: a part with three of them, one with none, one that is a page, one to the end.
        let parts = [(99, 105), (105, 106), (106, 107), (107, 512)];
        let parts = parts.map(|(start, end)| {
            let at = |page| mapping.address() + page * PAGE;
            at(start)..at(end)
        });
        for (of, pages) in [
            (0..1, 3),
            (0..2, 3),
            (1..2, 0),
            (1..3, 1),
            (0..4, 150),
            (0..0, 0),
        ] {
            assert_eq!(map.held_of(&parts[of]).unwrap(), pages * PAGE);
        }
        assert_eq!(map.huge(mapping.address(), 512 * PAGE).unwrap(), []);
    }

    #[test]
    fn pages_of_a_file_are_private_once_they_are_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE as u64).unwrap();
        let mut mapping = Mapping::new(10 * PAGE, 0, MappingKind::Small).unwrap();
        let fd = std::os::fd::AsFd::as_fd(&file);
        mapping.map_private((0, 8 * PAGE), fd, 0, false).unwrap();
        let map = PageMap::open().unwrap();
        let private = || {
            let is_private = map.is_private(mapping.address(), 10 * PAGE).unwrap();
            let pages = (0..).zip(is_private);
            pages
                .filter_map(|(page, it)| it.then_some(page))
                .collect::<Vec<usize>>()
        };
        let unwritten = || mapping.unwritten(&map, 0, 10 * PAGE).unwrap();
        assert!(private().is_empty());
        let first = std::ptr::with_exposed_provenance_mut::<u8>(mapping.address());
        // SAFETY: it lies in the mapping. What is read only is in memory, and still the file's.
        let first = unsafe { AtomicU8::from_ptr(first) };
        assert_eq!(first.load(Ordering::Relaxed), 0);
        assert!(mapping.is_present(0).unwrap());
        mapping.populate_part(3 * PAGE, 2 * PAGE).unwrap();
        mapping.populate_part(9 * PAGE, PAGE).unwrap();
        assert_eq!(private(), [3, 4, 9]);
        assert_eq!(unwritten(), [0..3 * PAGE, 5 * PAGE..8 * PAGE]);
        mapping
            .release(4 * PAGE, 2 * PAGE, Release::Discard)
            .unwrap();
        assert_eq!(private(), [3, 9]);
        assert_eq!(unwritten(), [0..3 * PAGE, 6 * PAGE..8 * PAGE]);
    }
}
