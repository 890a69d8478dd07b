//! What is written into pages, and what is found there.
//!
//! A record is an address, a generation and a checksum of both. Each page has one at its beginning and one at
//! its end; every 64th generation fills its pages with them.

use ebb_hypercall_abi::PAGE_SIZE;

/// Bytes of a record.
const RECORD: u64 = 32;

type Words = [u64; 4];

const fn record(address: u64, generation: u64) -> Words {
    let mixed = (address ^ generation.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [address, generation, mixed ^ mixed >> 29, !address]
}

/// Memory that records are written to.
pub trait Memory {
    /// The word at `address`, a multiple of 8.
    fn load(&self, address: u64) -> u64;
    /// Stores a word there.
    fn store(&mut self, address: u64, word: u64);
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The records of the generation.
    Intact,
    /// Zero.
    Zero,
    /// Something else, so many bytes of it.
    Foreign(u64),
}

/// Distance of two records in a page.
const fn step(generation: u64) -> u64 {
    if generation.is_multiple_of(64) {
        RECORD
    } else {
        PAGE_SIZE - RECORD
    }
}

/// Writes the records of `generation` into the page at `page`.
pub fn write(memory: &mut impl Memory, page: u64, generation: u64) {
    let mut at = page;
    while at < page + PAGE_SIZE {
        for (index, word) in record(at, generation).into_iter().enumerate() {
            memory.store(at + 8 * index as u64, word);
        }
        at += step(generation);
    }
}

/// Looks at the records of the page at `page`, which was written in `generation`.
pub fn look(memory: &impl Memory, page: u64, generation: u64) -> Found {
    let (mut records, mut intact, mut zero, mut foreign) = (0, 0, 0, 0);
    let mut at = page;
    while at < page + PAGE_SIZE {
        let expected = record(at, generation);
        let found: Words = core::array::from_fn(|index| memory.load(at + 8 * index as u64));
        records += 1;
        if found == expected {
            intact += 1;
        } else if found == [0; 4] {
            zero += 1;
        } else {
            foreign += found.iter().filter(|&&word| word != 0).count() as u64 * 8;
        }
        at += step(generation);
    }
    if intact == records {
        Found::Intact
    } else if zero == records {
        Found::Zero
    } else {
        // A page that is part one and part the other is torn: the host takes whole pages.
        Found::Foreign(foreign.max(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Page(Vec<u64>);

    impl Memory for Page {
        fn load(&self, address: u64) -> u64 {
            self.0[(address % PAGE_SIZE / 8) as usize]
        }

        fn store(&mut self, address: u64, word: u64) {
            self.0[(address % PAGE_SIZE / 8) as usize] = word;
        }
    }

    #[test]
    fn only_the_same_page_of_the_same_generation_is_intact() {
        for generation in [3, 64] {
            let mut page = Page(vec![0; 512]);
            assert_eq!(look(&page, 0x5000, generation), Found::Zero);
            write(&mut page, 0x5000, generation);
            assert_eq!(look(&page, 0x5000, generation), Found::Intact);
            assert_ne!(look(&page, 0x6000, generation), Found::Intact);
            assert_ne!(look(&page, 0x5000, generation + 64), Found::Intact);
            page.0[509] ^= 1;
            assert_eq!(look(&page, 0x5000, generation), Found::Foreign(32));
            page.0[508..].fill(0);
            assert_eq!(look(&page, 0x5000, generation), Found::Foreign(8), "torn");
        }
        let mut page = Page(vec![0; 512]);
        write(&mut page, 0x5000, 128);
        assert!(page.0.chunks(4).all(|words| words[0] != 0), "all of it");
        page.0[204] ^= 1;
        assert_eq!(look(&page, 0x5000, 128), Found::Foreign(32));
    }
}
