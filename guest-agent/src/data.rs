//! Memory with known content, page by page.

/// Size of the pages that the guest's kernel hands out.
const PAGE: usize = 4096;
/// Words in a page.
const WORDS: usize = PAGE / size_of::<u64>();

/// Pages in which every word is pseudo-random and depends on the page: no two are alike, so nothing can
/// merge them, and a page that was lost, zeroed or swapped for another is noticed.
pub struct Pages {
    words: Vec<u64>,
    seed: u64,
}

/// The first page whose content is not what was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Lost {
    pub page: usize,
}

impl Pages {
    /// As many pages as `bytes` has room for, or `None` when there is not so much memory.
    pub fn fill(bytes: usize, seed: u64) -> Option<Self> {
        let pages = bytes / PAGE;
        let mut words = Vec::new();
        words.try_reserve_exact(pages * WORDS).ok()?;
        for page in 0..pages {
            words.extend(content(seed, page).take(WORDS));
        }
        Some(Self { words, seed })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    /// Reads every word again; a checksum over all of them when they are what was written.
    pub fn verify(&self) -> Result<u64, Lost> {
        let mut sum = self.seed;
        for (page, words) in self.words.chunks_exact(WORDS).enumerate() {
            if !words
                .iter()
                .copied()
                .eq(content(self.seed, page).take(WORDS))
            {
                return Err(Lost { page });
            }
            sum = words.iter().fold(sum, |sum, word| mix(sum ^ word));
        }
        Ok(sum)
    }
}

/// Takes `bytes` of fresh memory, stamps each page, reads all stamps again and lets the memory go; how many pages that
/// were. Fresh memory that is not zero counts as lost, too.
pub fn touch(bytes: usize, round: u64) -> Result<u64, Lost> {
    let mut words = vec![0_u64; bytes / PAGE * WORDS];
    let stamp = |page: usize| mix(round ^ mix(page as u64 + 1)) | 1;
    for (page, words) in words.chunks_exact_mut(WORDS).enumerate() {
        if std::mem::replace(&mut words[WORDS / 2], stamp(page)) != 0 {
            return Err(Lost { page });
        }
    }
    let mut pages = words.chunks_exact(WORDS).enumerate();
    match pages.find(|(page, words)| words[WORDS / 2] != stamp(*page)) {
        Some((page, _)) => Err(Lost { page }),
        None => Ok((words.len() / WORDS) as u64),
    }
}

/// The words of a page.
fn content(seed: u64, page: usize) -> impl Iterator<Item = u64> {
    let mut state = mix(seed ^ mix(page as u64 + 1)) | 1;
    std::iter::repeat_with(move || {
        // xorshift64: three shifts a word, and never zero.
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

    const BYTES: usize = 8 * PAGE;

    fn pages() -> Pages {
        Pages::fill(BYTES + PAGE - 1, 7).unwrap()
    }

    #[test]
    fn what_was_written_is_intact_and_has_one_checksum() {
        let pages = pages();
        assert_eq!(pages.bytes(), BYTES);
        let sum = pages.verify().unwrap();
        assert_eq!(Pages::fill(BYTES, 7).unwrap().verify(), Ok(sum));
        assert_ne!(Pages::fill(BYTES, 8).unwrap().verify(), Ok(sum));
    }

    #[test]
    fn every_damage_is_noticed() {
        let damage: [fn(&mut [u64]); 3] = [
            |words| words[5 * WORDS..6 * WORDS].fill(0),
            |words| words[6 * WORDS - 1] ^= 1,
            |words| words.copy_within(3 * WORDS..4 * WORDS, 5 * WORDS),
        ];
        for damage in damage {
            let mut pages = pages();
            damage(&mut pages.words);
            assert_eq!(pages.verify(), Err(Lost { page: 5 }));
        }
    }

    #[test]
    fn more_than_there_is_is_refused() {
        assert!(Pages::fill(usize::MAX / 2, 1).is_none());
    }
}
