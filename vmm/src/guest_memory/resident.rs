//! How much of the lazily free memory the host still holds.

use std::time::{Duration, Instant};

use ebb_core::lazy::LazyMemory;
use ebb_core::range::GpaRange;
use ebb_core::release::ReleasePages;

use crate::reclaim::spread;

/// After this time the answer is an estimate. A client of the API waits for it.
const LOOK_TIME: Duration = Duration::from_micros(500);

/// Bytes of `ram`, the addresses of `pages`, that are lazily free according to `lazy` and that the host still holds. All
/// blocks are looked at, or, after [`LOOK_TIME`], a part of them that stands for all.
pub fn resident_bytes(lazy: &LazyMemory, pages: &dyn ReleasePages, ram: &[GpaRange]) -> u64 {
    let stats = lazy.snapshot();
    let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
    let start = Instant::now();
    let (mut seen, mut held, mut found) = (0, 0, Vec::new());
    for (index, block) in spread::blocks(ram).enumerate() {
        lazy.ranges_in(block, &mut found);
        seen += found.iter().map(|range| range.len()).sum::<u64>();
        held += pages.held_of(&found);
        if index + 1 >= spread::LEAST && start.elapsed() > LOOK_TIME {
            let all = u128::from(held) * u128::from(tracked) / u128::from(seen.max(1));
            return u64::try_from(all).unwrap_or(u64::MAX);
        }
    }
    held
}
