//! How much of the lazily free memory the host still holds.

use std::time::{Duration, Instant};

use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::ReleasePages;

/// After this time the answer is an estimate.
const LOOK_TIME: Duration = Duration::from_millis(10);

/// Blocks are looked at in steps of this many, a prime, so that any part of them is spread over all.
const STRIDE: u64 = 1_000_003;

/// Bytes of `ram`, the addresses of `pages`, that are lazily free according to `lazy` and that the host still holds. All
/// blocks are looked at, or, after [`LOOK_TIME`], a part of them that stands for all.
pub fn resident_bytes(lazy: &LazyMemory, pages: &dyn ReleasePages, ram: &[GpaRange]) -> u64 {
    let stats = lazy.snapshot();
    let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
    let blocks: u64 = ram.iter().map(|ram| count(*ram)).sum();
    let start = Instant::now();
    let (mut seen, mut held) = (0, 0);
    for index in 0..blocks {
        let block = nth(ram, index * STRIDE % blocks);
        let states = [
            Sweep::new(Pieces::Any, u64::MAX),
            Sweep::unmapped(Pieces::Any, u64::MAX),
            Sweep::discarded(),
        ];
        for sweep in states {
            let mut sweep = block.map_or(sweep.clone(), |block| sweep.within(block));
            while let Some(range) = lazy.next_range(&mut sweep, BLOCK_SIZE) {
                seen += range.len();
                held += pages.held(range).unwrap_or(0);
            }
        }
        if start.elapsed() > LOOK_TIME {
            let all = u128::from(held) * u128::from(tracked) / u128::from(seen.max(1));
            return u64::try_from(all).unwrap_or(u64::MAX);
        }
    }
    held
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
