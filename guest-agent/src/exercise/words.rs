//! Words whose values depend on who owns them and where they are.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A word whose value is not what was written there.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// What kind of memory it was.
    pub what: &'static str,
    /// The address where it was read.
    pub address: usize,
    /// Words before it.
    pub index: usize,
    /// What was read.
    pub found: u64,
    /// What was written.
    pub expected: u64,
    /// Wrong words in all, in what was read together.
    pub words: u64,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            address,
            index,
            found,
            expected,
            words,
        } = self;
        write!(
            f,
            "LOST: {what}, word {index} at {address:#x}: {found:#018x} instead of {expected:#018x}; {words} words are wrong"
        )
    }
}

/// Whose words they are: no two holdings have the same.
#[derive(Clone, Copy, Debug)]
pub struct Owner(u64);

impl Owner {
    /// Another one than all before.
    pub fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(mix(LAST.fetch_add(1, Ordering::Relaxed)))
    }

    /// The value of a word; never zero.
    pub fn word(self, index: usize) -> u64 {
        (self.0 ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    /// Writes `words`, the first of which is number `first`.
    pub fn fill(self, words: &mut [u64], first: usize) {
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.word(first + index);
        }
    }

    /// Compares them.
    pub fn check(self, what: &'static str, words: &[u64], first: usize) -> Result<(), Wrong> {
        compare(what, words, first, |index| self.word(index))
    }
}

/// Fresh memory: all words are zero.
pub fn check_zero(what: &'static str, words: &[u64]) -> Result<(), Wrong> {
    compare(what, words, 0, |_| 0)
}

fn compare(
    what: &'static str,
    words: &[u64],
    first: usize,
    expected: impl Fn(usize) -> u64,
) -> Result<(), Wrong> {
    // The compiler must not know what was written.
    let words = std::hint::black_box(words);
    let is_wrong = |(at, word): &(usize, &u64)| **word != expected(first + at);
    let mut wrong = words.iter().enumerate().filter(is_wrong);
    match wrong.next() {
        None => Ok(()),
        Some((at, word)) => Err(Wrong {
            what,
            address: std::ptr::from_ref(word) as usize,
            index: first + at,
            found: *word,
            expected: expected(first + at),
            words: 1 + wrong.count() as u64,
        }),
    }
}

/// The finalizer of `SplitMix64`.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The bytes of words, for system calls.
pub fn bytes(words: &[u64]) -> &[u8] {
    // SAFETY: the same memory, as long; any byte is valid.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// The bytes of words, for system calls that write them.
pub fn bytes_mut(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: the same memory, as long, borrowed mutably; any byte is valid in both types.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_words_are_found_and_counted() {
        let (owner, other) = (Owner::new(), Owner::new());
        let mut words = vec![0; 1024];
        assert_eq!(check_zero("zero", &words), Ok(()));
        owner.fill(&mut words, 7);
        assert_eq!(owner.check("own", &words, 7), Ok(()));
        assert_eq!(owner.check("own", &words, 8).unwrap_err().words, 1024);
        assert_eq!(other.check("other", &words, 7).unwrap_err().words, 1024);
        words[512..514].fill(0);
        let wrong = owner.check("own", &words, 7).unwrap_err();
        assert_eq!((wrong.index, wrong.found, wrong.words), (519, 0, 2));
        assert_eq!(wrong.expected, owner.word(519));
        assert_eq!(check_zero("zero", &words).unwrap_err().words, 1022);
        assert!(wrong.to_string().starts_with("LOST: own, word 519 at 0x"));
    }
}
