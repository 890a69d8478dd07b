//! Zeroed memory where committed pages may hold what they held.
//!
//! jemalloc takes pages that it has decommitted for zero. It uses that for large allocations that must be zero, and only
//! for those: so such allocations are made without that wish and zeroed here, but for what is known to be zero because the
//! call at hand has just got it from the host. jemalloc's own wishes go to its arena 0, which zeroes what it commits.

use std::cell::Cell;
use std::ops::Range;

/// Largest request, in bytes, that jemalloc cuts from a slab: those it zeroes itself. jemalloc 5.3, SC_SMALL_MAXCLASS.
pub const SMALL: usize = 14336;

thread_local! {
    /// What this thread's last commit has got from the host, zero.
    static KNOWN: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// These bytes are zero and nobody's yet.
pub fn remember(bytes: Range<usize>) {
    KNOWN.set((bytes.start, bytes.end));
}

/// Forgets: a new call begins.
pub fn forget() {
    KNOWN.set((0, 0));
}

/// Zeroes what may not be zero of an allocation that this thread has made since [`forget`].
///
/// # Safety
/// The bytes belong to the caller.
pub unsafe fn clear(start: *mut u8, len: usize) {
    let (from, to) = KNOWN.get();
    let (first, last) = (start as usize, start as usize + len);
    let (from, to) = (from.clamp(first, last), to.clamp(first, last));
    // Without an overlap both are at one end, and the two parts are all of it.
    let parts = [(first, from), (to.max(from), last)];
    for (part, end) in parts {
        // SAFETY: inside the allocation.
        unsafe { std::ptr::write_bytes(part as *mut u8, 0, end - part) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left of ones in 100 bytes at `start`, of which `known` are said to be zero.
    fn cleared(known: Range<usize>) -> Vec<usize> {
        let mut bytes = [1_u8; 100];
        let start = bytes.as_mut_ptr();
        forget();
        if !known.is_empty() {
            remember(start as usize + known.start - 1000..start as usize + known.end - 1000);
        }
        // SAFETY: bytes of our own.
        unsafe { clear(start, 100) };
        (0..100).filter(|at| bytes[*at] != 0).collect()
    }

    #[test]
    fn only_what_is_known_to_be_zero_is_left_alone() {
        assert_eq!(cleared(0..0), []);
        assert_eq!(cleared(1010..1020), (10..20).collect::<Vec<_>>());
        assert_eq!(cleared(900..1050), (0..50).collect::<Vec<_>>());
        assert_eq!(cleared(1090..2000), (90..100).collect::<Vec<_>>());
        assert_eq!(cleared(500..600), []);
        assert_eq!(cleared(1300..1400), []);
        assert_eq!(cleared(900..2000).len(), 100);
    }
}
