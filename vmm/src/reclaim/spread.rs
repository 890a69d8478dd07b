//! Blocks in an order such that any part of them stands for all.

use ebb_core::range::{BLOCK_SIZE, GpaRange};

/// So many blocks are looked at before an estimate from them is taken, however long that takes.
pub const LEAST: usize = 16;

/// The blocks that `ram` meets, each one once, those of any part of the way spread over all of it.
pub fn blocks(ram: &[GpaRange]) -> impl Iterator<Item = GpaRange> {
    let blocks: u64 = ram.iter().map(|ram| count(*ram)).sum();
    let stride = stride(blocks);
    (0..blocks).filter_map(move |index| nth(ram, index * stride % blocks))
}

/// A step that meets each of `blocks` blocks, and is far from any simple part of them: near the golden ratio.
fn stride(blocks: u64) -> u64 {
    let mut stride = (blocks / 1000 * 618 + blocks % 1000 * 618 / 1000).max(1);
    while divisor(stride, blocks) > 1 {
        stride += 1;
    }
    stride
}

/// The greatest common divisor.
const fn divisor(mut a: u64, mut b: u64) -> u64 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Number of blocks that `range` meets.
fn count(range: GpaRange) -> u64 {
    range.end().div_ceil(BLOCK_SIZE) - range.start() / BLOCK_SIZE
}

/// Block number `index` of those that `ram` meets.
fn nth(ram: &[GpaRange], mut index: u64) -> Option<GpaRange> {
    for range in ram {
        if index < count(*range) {
            let start = (range.start() / BLOCK_SIZE + index) * BLOCK_SIZE;
            return GpaRange::new(start, start + BLOCK_SIZE);
        }
        index -= count(*range);
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_block_once_and_a_part_from_everywhere() {
        let range = |start: u64, end: u64| GpaRange::new(start << 21, end << 21).unwrap();
        let ram = [range(0, 1000), range(2000, 5000)];
        let all: Vec<u64> = blocks(&ram).map(|block| block.start() >> 21).collect();
        assert_eq!(all.len(), 4000);
        let set: BTreeSet<u64> = all.iter().copied().collect();
        assert!(set.into_iter().eq((0..1000).chain(2000..5000)));
        let low = all[..400].iter().filter(|block| **block < 1000).count();
        assert!((80..120).contains(&low), "{low}");
        assert_eq!(blocks(&[]).count(), 0);
        for few in 1..200 {
            let met: BTreeSet<u64> = blocks(&[range(0, few)]).map(GpaRange::start).collect();
            assert_eq!(met.len() as u64, few);
        }
    }
}
