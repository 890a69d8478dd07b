//! Anonymous memory at a chosen alignment.

use std::ffi::c_void;
use std::ptr::null_mut;

use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// Bytes of a huge page, and of the memory that one page table maps.
pub const HUGE_PAGE_SIZE: usize = 2 << 20;

/// Maps at least `len` bytes of zeroed anonymous memory at a multiple of `align`, a power of two. Allocates nothing.
///
/// # Errors
/// Those of mmap(2).
pub fn map_anonymous(
    len: usize,
    align: usize,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<*mut c_void> {
    let len = len.checked_next_multiple_of(PAGE_SIZE);
    let slack = align.saturating_sub(PAGE_SIZE);
    let (len, total) = len
        .and_then(|len| Some((len, len.checked_add(slack)?)))
        .ok_or(Errno::NOMEM)?;
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe { mmap_anonymous(null_mut(), total, prot, flags)? };
    let before = (start as usize).next_multiple_of(align) - start as usize;
    let aligned = start.wrapping_byte_add(before);
    for (unused, bytes) in [
        (start, before),
        (aligned.wrapping_byte_add(len), slack - before),
    ] {
        if bytes > 0 {
            // SAFETY: a part of the new mapping that nobody has seen yet. An error only leaks address space.
            let _ = unsafe { munmap(unused, bytes) };
        }
    }
    Ok(aligned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_aligned_and_as_long_as_asked() {
        for align in [PAGE_SIZE, HUGE_PAGE_SIZE] {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let memory = map_anonymous(3 * PAGE_SIZE - 1, align, prot, MapFlags::PRIVATE).unwrap();
            assert!((memory as usize).is_multiple_of(align));
            // SAFETY: the last byte of a mapping of our own, which nobody else uses.
            unsafe {
                memory.cast::<u8>().add(3 * PAGE_SIZE - 1).write(1);
                munmap(memory, 3 * PAGE_SIZE).unwrap();
            }
        }
        let too_long = map_anonymous(usize::MAX, 1, ProtFlags::empty(), MapFlags::PRIVATE);
        assert_eq!(too_long, Err(Errno::NOMEM));
    }
}
