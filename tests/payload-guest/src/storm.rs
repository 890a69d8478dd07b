//! Makes hypercalls as fast as possible: valid, invalid and random ones.

use ebb_hypercall_abi::{Attributes, Operation, PAGE_SIZE};

use crate::calls::Calls;
use crate::cpu::{Ram, send};
use crate::random::Random;
use crate::records::WordMemory;
use crate::{Parameters, map, marker};

/// Number of pages that valid calls free and reuse. They have gaps between them, so they fill the monitor's tracker.
const RANGES: u64 = 16 << 10;

/// Makes hypercalls forever.
pub fn run(mut ram: Ram, parameters: &Parameters) -> ! {
    let mut random = Random::new(parameters.seed);
    let calls = Calls::new(ram, 0);
    let pages = (parameters.ram - map::TEST_MEMORY) / PAGE_SIZE;
    // Touch all memory now. If the monitor's RSS grows later, the monitor itself has grown.
    for page in 0..pages {
        ram.store(map::TEST_MEMORY + page * PAGE_SIZE, page);
    }
    send(marker::READY);
    loop {
        let by = calls.transport(&mut random);
        let (gpa, pages, attributes) = arguments(&mut random, parameters.ram);
        // Only the effect on the monitor matters.
        let _ = Calls::raw(by, gpa, pages, attributes);
    }
}

/// Arguments of one call, valid in half of the cases.
fn arguments(random: &mut Random, ram: u64) -> (u64, u64, u64) {
    let of = |operation| Attributes::new(operation).encode();
    let ranges = RANGES.min((ram - map::TEST_MEMORY) / (2 * PAGE_SIZE));
    let range = map::TEST_MEMORY + 2 * PAGE_SIZE * random.below(ranges);
    let (free, reuse) = (of(Operation::LazyFree), of(Operation::Reuse));
    match random.below(16) {
        0..4 => (range, 1, free),
        4..7 => (range, 1, reuse),
        7 => (map::BLOCKS, 1, of(Operation::Query)),
        8 => (range + 1, 1, free),
        9 => (range, 0, free),
        10 => (range, u64::MAX, free),
        11 => (ram, 1, free),
        12 => (ram, 1, of(Operation::LazyFreeBatch)),
        // The block holds the answer of the last query.
        13 => (map::BLOCKS, 4, of(Operation::ReuseBatch)),
        14 => (range, 1, 0xebb0_0000 | random.below(1 << 16)),
        _ => (
            random.below(u64::MAX),
            random.below(u64::MAX),
            random.below(u64::MAX),
        ),
    }
}
