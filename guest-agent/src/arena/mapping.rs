//! The mapping of an arena's device.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{major, minor};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::memory::{HUGE_PAGE_SIZE, PAGE_SIZE, map_anonymous};

/// Size in bytes of a dax device. Tests use regular files instead of devices.
pub fn size(file: &File) -> io::Result<usize> {
    let metadata = file.metadata()?;
    let size = if metadata.file_type().is_char_device() {
        let device = metadata.rdev();
        let path = format!("/sys/dev/char/{}:{}/size", major(device), minor(device));
        let text = std::fs::read_to_string(path)?;
        text.trim().parse().map_err(io::Error::other)?
    } else {
        metadata.len()
    };
    usize::try_from(size).map_err(io::Error::other)
}

/// An arena's memory, shared with other processes and with the monitor. Unmapped on drop.
///
/// Children do not inherit it: they would write into their parent's heap.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: words are accessed atomically only, and bytes by the owner of their granule only, see `Mapping::bytes`.
unsafe impl Send for Mapping {}
// SAFETY: the same.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, at least one page, where huge pages are possible.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        if len < PAGE_SIZE {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let reserved = map_anonymous(len, HUGE_PAGE_SIZE, ProtFlags::empty(), flags)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces the mapping that was made for this.
        let start = unsafe { mmap(reserved, len, prot, flags, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { start, len };
        // SAFETY: the whole of our own mapping. A child that accesses it faults.
        unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontFork)? };
        Ok(mapping)
    }

    /// Address of the first byte.
    pub const fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The word at `offset`.
    ///
    /// # Panics
    /// When `offset` is not a multiple of 8 or lies outside. The check of the header excludes that.
    #[inline]
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset <= self.len - 8);
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`. All sides use atomics.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The bytes of a granule. Only for its owner, who must not hold two such slices of a granule at once.
    ///
    /// # Panics
    /// When they lie outside.
    #[expect(
        clippy::mut_from_ref,
        reason = "each granule has one owner, which is not the mapping"
    )]
    pub fn bytes(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping. The caller owns the granule, and processes do not touch the granules of others.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own, and every reference into it borrows from `self`. An error only leaks it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
