//! The tracker of lazily free memory, by the size of the guest.

use std::sync::Arc;
use std::time::Instant;

use ebb_core::generation::VmGeneration;
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{GpaRange, PAGE_SIZE};

use super::Arguments;
use crate::BenchError;
use crate::results::Results;

const GIB: u64 = 1 << 30;

/// Every other page of this many bytes is reused: 16 million pages at 128 GiB.
const MAX_REUSED: u64 = 128 * GIB;

/// Frees a whole guest, and reuses every other page.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<(), BenchError> {
    let mut given_up = 0;
    for round in 0..arguments.runs {
        for (case, gib) in [("1 GiB", 1), ("all", arguments.gib)] {
            let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
            let size = gib * GIB;
            lazy.free(&[range(0, size)]);
            let reused = size.min(MAX_REUSED);
            let pages = reused / PAGE_SIZE / 2;
            let start = Instant::now();
            for page in 0..pages {
                let at = 2 * page * PAGE_SIZE;
                lazy.reuse(&[range(at, at + PAGE_SIZE)]);
            }
            let time = start.elapsed().as_nanos() as f64 / pages as f64;
            results.add(("tracker", case), ("reuse", "ns"), time);
            let stats = lazy.snapshot();
            let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
            given_up = given_up.max(size - pages * PAGE_SIZE - tracked);
        }
        eprintln!("round {} of {}", round + 1, arguments.runs);
    }
    results.lower("given_up_bytes", given_up as f64);
    if let (Some(large), Some(small)) = (
        results.median("tracker", "all", "reuse"),
        results.median("tracker", "1 GiB", "reuse"),
    ) {
        results.lower("op_slowdown", large / small);
    }
    Ok(())
}

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).expect("a range of whole pages")
}
