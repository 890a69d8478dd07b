//! The mapping of an arena.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{major, minor};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Bytes of a device of the dax bus, or of a file, which does in tests.
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

const PAGE: usize = 4096;
/// Alignment of an arena's mapping: that of a huge page, which granules and page tables go by.
const ALIGN: usize = 2 << 20;

/// Makes room for `len` bytes in the address space, aligned to [`ALIGN`].
fn reserve(len: usize) -> io::Result<*mut u8> {
    let len = len.next_multiple_of(PAGE);
    let with_slack = len.checked_add(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel finds room.
    let start =
        unsafe { mmap_anonymous(std::ptr::null_mut(), with_slack, ProtFlags::empty(), flags)? };
    let start: *mut u8 = start.cast();
    let lead = start.align_offset(ALIGN);
    let room = start.wrapping_add(lead);
    for (slack, bytes) in [(start, lead), (room.wrapping_add(len), ALIGN - lead)] {
        if bytes > 0 {
            // SAFETY: a part of the new mapping that nobody knows yet.
            unsafe { munmap(slack.cast(), bytes)? };
        }
    }
    Ok(room)
}

/// Memory that is shared with other processes and the monitor, unmapped on drop. A child does not get it: it would write
/// into its parent's heap.
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: words are reached by atomics; bytes are lent to whoever owns their granule, see `Memory::bytes`.
unsafe impl Send for Memory {}
// SAFETY: the same.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps the first `len` bytes of `file`, which are at least a page.
    pub fn map(file: &File, len: usize) -> io::Result<Self> {
        if len < 4096 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let room = reserve(len)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: over a mapping that was made for it.
        let start = unsafe { mmap(room.cast(), len, prot, flags, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = Self { start, len };
        // SAFETY: the whole of a mapping of our own; a child that lacks it faults.
        unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontFork)? };
        Ok(memory)
    }

    /// Where it begins.
    pub const fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The word at `offset`.
    ///
    /// # Panics
    /// When it is not aligned or not there, which the layout's check excludes.
    #[inline]
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset <= self.len - 8);
        // SAFETY: inside the mapping, which is page-aligned and lives as long as `self`; all sides use atomics.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The bytes of a granule, for whoever owns it alone: the caller sees to it that there is one such value.
    ///
    /// # Panics
    /// When they are not there.
    #[expect(
        clippy::mut_from_ref,
        reason = "each granule has one owner, which is not the mapping"
    )]
    pub fn bytes(&self, offset: usize, len: usize) -> &mut [u8] {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping; the caller is the granule's owner, and processes keep to the owners.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody has a part of it any more: all borrow from `self`. A failure leaks it.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
