//! Memory with known content, to find pages that were lost or swapped.

use ebb_guest_agent::memory::PAGE_SIZE;

/// 64-bit words of a page.
const PAGE_WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Pages of pseudo-random words that depend on the page number. No two pages are alike, so the kernel cannot merge them,
/// and a page that was lost, zeroed or swapped with another is found.
pub struct PatternPages {
    words: Vec<u64>,
    seed: u64,
}

/// The first page whose content is wrong.
#[derive(Debug, PartialEq, Eq)]
pub struct LostPage {
    pub page: usize,
}

impl PatternPages {
    /// Fills as many whole pages as fit into `bytes`. `None` if there is not enough memory.
    pub fn fill(bytes: usize, seed: u64) -> Option<Self> {
        let pages = bytes / PAGE_SIZE;
        let mut words = Vec::new();
        words.try_reserve_exact(pages * PAGE_WORDS).ok()?;
        for page in 0..pages {
            words.extend(page_words(seed, page).take(PAGE_WORDS));
        }
        Some(Self { words, seed })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    /// Reads every word again. Returns a checksum of all words.
    pub fn verify(&self) -> Result<u64, LostPage> {
        let mut sum = self.seed;
        for (page, words) in self.words.chunks_exact(PAGE_WORDS).enumerate() {
            if !words
                .iter()
                .copied()
                .eq(page_words(self.seed, page).take(PAGE_WORDS))
            {
                return Err(LostPage { page });
            }
            sum = words.iter().fold(sum, |sum, word| mix(sum ^ word));
        }
        Ok(sum)
    }
}

/// Allocates `bytes`, checks that each page is zero, writes a stamp into each, reads all stamps again and frees the memory.
/// Returns the number of pages.
pub fn stamp_fresh_pages(bytes: usize, round: u64) -> Result<u64, LostPage> {
    let mut words = vec![0_u64; bytes / PAGE_SIZE * PAGE_WORDS];
    let stamp = |page: usize| mix(round ^ mix(page as u64 + 1)) | 1;
    for (page, words) in words.chunks_exact_mut(PAGE_WORDS).enumerate() {
        if std::mem::replace(&mut words[PAGE_WORDS / 2], stamp(page)) != 0 {
            return Err(LostPage { page });
        }
    }
    let mut pages = words.chunks_exact(PAGE_WORDS).enumerate();
    match pages.find(|(page, words)| words[PAGE_WORDS / 2] != stamp(*page)) {
        Some((page, _)) => Err(LostPage { page }),
        None => Ok((words.len() / PAGE_WORDS) as u64),
    }
}

/// The words of a page, by xorshift64: fast, and never zero.
fn page_words(seed: u64, page: usize) -> impl Iterator<Item = u64> {
    let mut state = mix(seed ^ mix(page as u64 + 1)) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// The finalizer of `SplitMix64`.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 8 * PAGE_SIZE;

    fn pages() -> PatternPages {
        PatternPages::fill(BYTES + PAGE_SIZE - 1, 7).unwrap()
    }

    #[test]
    fn intact_pages_have_one_checksum_for_each_seed() {
        let pages = pages();
        assert_eq!(pages.bytes(), BYTES);
        let sum = pages.verify().unwrap();
        assert_eq!(PatternPages::fill(BYTES, 7).unwrap().verify(), Ok(sum));
        assert_ne!(PatternPages::fill(BYTES, 8).unwrap().verify(), Ok(sum));
    }

    #[test]
    fn zeroed_changed_and_swapped_pages_are_found() {
        let damage: [fn(&mut [u64]); 3] = [
            |words| words[5 * PAGE_WORDS..6 * PAGE_WORDS].fill(0),
            |words| words[6 * PAGE_WORDS - 1] ^= 1,
            |words| words.copy_within(3 * PAGE_WORDS..4 * PAGE_WORDS, 5 * PAGE_WORDS),
        ];
        for damage in damage {
            let mut pages = pages();
            damage(&mut pages.words);
            assert_eq!(pages.verify(), Err(LostPage { page: 5 }));
        }
    }

    #[test]
    fn more_than_the_available_memory_is_refused() {
        assert!(PatternPages::fill(usize::MAX / 2, 1).is_none());
    }
}
