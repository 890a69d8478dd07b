//! How much there is to take.

use std::time::{Duration, Instant};

use ebb_core::range::BLOCK_SIZE;
use ebb_core::release::ReleasePages;

use super::FreeLists;
use crate::reclaim::spread;

/// Bytes that the host holds and that are free in pieces of 2^`order` pages and more, by `source`. All blocks are looked at,
/// or, after `time`, a part of them that stands for all.
pub(in crate::reclaim) fn held_bytes(
    source: &dyn FreeLists,
    pages: &dyn ReleasePages,
    order: u32,
    time: Duration,
) -> u64 {
    let Some(lists) = source.current() else {
        return 0;
    };
    let (start, ram) = (Instant::now(), source.ram());
    let all: u64 = ram.iter().map(|range| range.len()).sum();
    let (mut seen, mut held, mut found) = (0u64, 0u64, Vec::new());
    for (index, block) in spread::blocks(ram).enumerate() {
        lists.find(block, order, &mut found);
        let of_block = found
            .drain(..)
            .filter_map(|range| range.intersection(block));
        held += of_block.filter_map(|range| pages.held(range)).sum::<u64>();
        seen += BLOCK_SIZE;
        if index + 1 >= spread::LEAST && start.elapsed() > time {
            let all = u128::from(held) * u128::from(all) / u128::from(seen);
            return u64::try_from(all).unwrap_or(u64::MAX);
        }
    }
    held
}
