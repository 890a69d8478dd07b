//! Records that identify the content of pages.
//!
//! A record is an address, a generation and a checksum of both. Each page has one at its start and one at its end. Every
//! 64th generation fills its pages with records.

use ebb_hypercall_abi::PAGE_SIZE;

/// Bytes of a record.
const RECORD: u64 = 32;

type Words = [u64; 4];

const fn record(address: u64, generation: u64) -> Words {
    let mixed = (address ^ generation.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [address, generation, mixed ^ mixed >> 29, !address]
}

/// Memory that holds records.
pub trait WordMemory {
    /// The word at `address`, a multiple of 8.
    fn load(&self, address: u64) -> u64;
    /// Stores a word there.
    fn store(&mut self, address: u64, word: u64);
}

/// Content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// The expected records.
    Intact,
    /// Zero.
    Zero,
    /// Something else, in this many bytes.
    Foreign(u64),
}

/// Bytes from one record of a page to the next.
const fn step(generation: u64) -> u64 {
    if generation.is_multiple_of(64) {
        RECORD
    } else {
        PAGE_SIZE - RECORD
    }
}

/// Writes the records of `generation` into the page at `page`.
pub fn write(memory: &mut impl WordMemory, page: u64, generation: u64) {
    let mut at = page;
    while at < page + PAGE_SIZE {
        for (index, word) in record(at, generation).into_iter().enumerate() {
            memory.store(at + 8 * index as u64, word);
        }
        at += step(generation);
    }
}

/// Checks the page at `page`, which was written in `generation`.
pub fn check(memory: &impl WordMemory, page: u64, generation: u64) -> PageContent {
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
        PageContent::Intact
    } else if zero == records {
        PageContent::Zero
    } else {
        // Also a mix of records and zeroes, because the host discards whole pages.
        PageContent::Foreign(foreign.max(8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Page(Vec<u64>);

    impl WordMemory for Page {
        fn load(&self, address: u64) -> u64 {
            self.0[(address % PAGE_SIZE / 8) as usize]
        }

        fn store(&mut self, address: u64, word: u64) {
            self.0[(address % PAGE_SIZE / 8) as usize] = word;
        }
    }

    #[test]
    fn only_the_records_of_this_page_and_generation_are_intact() {
        for generation in [3, 64] {
            let mut page = Page(vec![0; 512]);
            assert_eq!(check(&page, 0x5000, generation), PageContent::Zero);
            write(&mut page, 0x5000, generation);
            assert_eq!(check(&page, 0x5000, generation), PageContent::Intact);
            assert_ne!(check(&page, 0x6000, generation), PageContent::Intact);
            assert_ne!(check(&page, 0x5000, generation + 64), PageContent::Intact);
            page.0[509] ^= 1;
            assert_eq!(check(&page, 0x5000, generation), PageContent::Foreign(32));
            page.0[508..].fill(0);
            assert_eq!(
                check(&page, 0x5000, generation),
                PageContent::Foreign(8),
                "partly zero"
            );
        }
        let mut page = Page(vec![0; 512]);
        write(&mut page, 0x5000, 128);
        assert!(
            page.0.chunks(4).all(|words| words[0] != 0),
            "records everywhere"
        );
        page.0[204] ^= 1;
        assert_eq!(check(&page, 0x5000, 128), PageContent::Foreign(32));
    }
}
