//! The kernel's random number generator.

use std::io;

/// Bytes of a block. getrandom(2) returns up to this many in one piece, whatever signals come.
pub const BLOCK: usize = 256;

/// A block of random bytes, good enough for keys.
///
/// # Errors
/// getrandom(2)'s.
pub fn random_block() -> io::Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    // SAFETY: the call writes at most `BLOCK` bytes to `block`.
    let filled = unsafe { libc::getrandom(block.as_mut_ptr().cast(), BLOCK, 0) };
    if filled != BLOCK.cast_signed() {
        return Err(io::Error::last_os_error());
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_blocks_are_equal() {
        assert_ne!(random_block().unwrap(), random_block().unwrap());
    }
}
