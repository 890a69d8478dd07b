//! Zeroed allocations. Pages that are committed again may hold old content, but jemalloc takes them for zero.
//!
//! jemalloc relies on that only for large zeroed allocations. Those are made as plain allocations and zeroed here, except for
//! pages that the same call has just committed and that are known to be zero. jemalloc's own zeroed allocations come from
//! its arena 0, where [`crate::hooks`] zeroes what is committed.

use std::cell::Cell;
use std::ops::Range;

/// Bytes of the largest request that jemalloc serves from a slab. It zeroes those itself. SC_SMALL_MAXCLASS of jemalloc 5.3.
pub const MAX_SLAB_REQUEST: usize = 14336;

thread_local! {
    /// Start and end of the last zero pages that this thread has committed.
    static KNOWN_ZERO: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Says that this thread has committed these bytes and that they are zero.
pub fn set_known_zero(bytes: Range<usize>) {
    KNOWN_ZERO.set((bytes.start, bytes.end));
}

/// To be called before each allocation that [`fill`] will zero.
pub fn clear_known_zero() {
    KNOWN_ZERO.set((0, 0));
}

/// Zeroes a new allocation of this thread, except for the bytes that are known to be zero.
///
/// # Safety
/// The bytes belong to the caller.
pub unsafe fn fill(start: *mut u8, len: usize) {
    let (from, to) = KNOWN_ZERO.get();
    let (first, last) = (start as usize, start as usize + len);
    let (from, to) = (from.clamp(first, last), to.clamp(first, last));
    // Without an overlap, `from` and `to` are both `first` or both `last`.
    for (from, to) in [(first, from), (to.max(from), last)] {
        // SAFETY: inside the allocation.
        unsafe { std::ptr::write_bytes(from as *mut u8, 0, to - from) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Zeroes 100 bytes of ones at the fictive address 1000, of which `known` are known to be zero. Returns what is left.
    fn ones_left(known: Range<usize>) -> Vec<usize> {
        let mut bytes = [1_u8; 100];
        let start = bytes.as_mut_ptr();
        clear_known_zero();
        if !known.is_empty() {
            set_known_zero(start as usize + known.start - 1000..start as usize + known.end - 1000);
        }
        // SAFETY: our own bytes.
        unsafe { fill(start, 100) };
        (0..100).filter(|at| bytes[*at] != 0).collect()
    }

    #[test]
    fn all_but_known_zero_bytes_are_zeroed() {
        assert_eq!(ones_left(0..0), []);
        assert_eq!(ones_left(1010..1020), (10..20).collect::<Vec<_>>());
        assert_eq!(ones_left(900..1050), (0..50).collect::<Vec<_>>());
        assert_eq!(ones_left(1090..2000), (90..100).collect::<Vec<_>>());
        assert_eq!(ones_left(500..600), []);
        assert_eq!(ones_left(1300..1400), []);
        assert_eq!(ones_left(900..2000).len(), 100);
    }
}
