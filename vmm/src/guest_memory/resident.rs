//! How much of the lazily free memory the host still holds.

use std::time::{Duration, Instant};

use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::ReleasePages;

use crate::reclaim::spread;

/// After this time the answer is an estimate.
const LOOK_TIME: Duration = Duration::from_millis(10);

/// Bytes of `ram`, the addresses of `pages`, that are lazily free according to `lazy` and that the host still holds. All
/// blocks are looked at, or, after [`LOOK_TIME`], a part of them that stands for all.
pub fn resident_bytes(lazy: &LazyMemory, pages: &dyn ReleasePages, ram: &[GpaRange]) -> u64 {
    let stats = lazy.snapshot();
    let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
    let start = Instant::now();
    let (mut seen, mut held) = (0, 0);
    for block in spread::blocks(ram) {
        let states = [
            Sweep::new(Pieces::Any, u64::MAX),
            Sweep::unmapped(Pieces::Any, u64::MAX),
            Sweep::discarded(),
        ];
        for sweep in states {
            let mut sweep = sweep.within(block);
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
