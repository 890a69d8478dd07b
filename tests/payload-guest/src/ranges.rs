//! Divides the test memory into ranges and assigns them to the vCPUs in turn. So neighbours belong to different vCPUs, and the
//! monitor has to merge and split across them.

use ebb_hypercall_abi::PAGE_SIZE;

use crate::map;
use crate::random::Random;

/// A range of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TestRange {
    /// Address of its first page.
    pub gpa: u64,
    /// Number of pages.
    pub pages: u32,
    /// True if it is lazily free.
    pub lazy: bool,
    /// Generation of its records.
    pub generation: u64,
}

/// Ranges of at least this many pages are freed and reused less often.
pub const LARGE_RANGE: u32 = 512;

/// Calls `each` for the ranges of vCPU `index` of `vcpus`. Most have 1 to 16 pages, one in a hundred 2 to 6 MiB.
pub fn assign(seed: u64, (index, vcpus): (u64, u64), ram: u64, mut each: impl FnMut(TestRange)) {
    let mut random = Random::new(seed);
    let (mut at, mut turn) = (map::TEST_MEMORY, 0);
    while at < ram {
        let pages = match random.below(100) {
            0 => u64::from(LARGE_RANGE) + random.below(1024),
            _ => {
                let max = 1 + random.below(16);
                1 + random.below(max)
            }
        };
        let pages = pages.min((ram - at) / PAGE_SIZE);
        if turn % vcpus == index {
            each(TestRange {
                gpa: at,
                pages: pages as u32,
                lazy: false,
                generation: 0,
            });
        }
        at += pages * PAGE_SIZE;
        turn += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_of_all_vcpus_cover_the_memory_once() {
        const RAM: u64 = 128 << 20;
        let mut ranges = Vec::new();
        for index in 0..4 {
            let before = ranges.len();
            assign(7, (index, 4), RAM, |range| ranges.push(range));
            let room = map::RANGES_SIZE as usize / size_of::<TestRange>();
            assert!((1..room).contains(&(ranges.len() - before)));
        }
        ranges.sort_by_key(|range| range.gpa);
        let mut at = map::TEST_MEMORY;
        for range in &ranges {
            assert_eq!(range.gpa, at);
            at += u64::from(range.pages) * PAGE_SIZE;
        }
        assert_eq!(at, RAM);
        assert!(ranges.iter().any(|range| range.pages >= LARGE_RANGE));
    }
}
