//! Calls as fast as the guest can make them: good, bad and meaningless ones.

use ebb_hypercall_abi::{Attributes, Operation, PAGE_SIZE};

use crate::calls::Calls;
use crate::cpu::{Ram, say};
use crate::random::Random;
use crate::stamp::Memory;
use crate::{Parameters, map, marker};

/// Small ranges that the good calls free and reuse, in turn and with gaps: enough to fill the monitor's book.
const RANGES: u64 = 16 << 10;

/// Never returns.
pub fn run(mut ram: Ram, parameters: &Parameters) -> ! {
    let mut random = Random::new(parameters.seed);
    let calls = Calls::new(ram, 0);
    let pages = (parameters.ram - map::FREE) / PAGE_SIZE;
    // The guest touches nothing new from here on: what grows then is the monitor.
    for page in 0..pages {
        ram.store(map::FREE + page * PAGE_SIZE, page);
    }
    say(marker::READY);
    loop {
        let by = calls.transport(&mut random);
        let (gpa, pages, attributes) = arguments(&mut random, parameters.ram);
        // The status is of no interest: what it does to the monitor is.
        let _ = Calls::raw(by, gpa, pages, attributes);
    }
}

/// One call: as often good as bad.
fn arguments(random: &mut Random, ram: u64) -> (u64, u64, u64) {
    let of = |operation| Attributes::new(operation).encode();
    let ranges = RANGES.min((ram - map::FREE) / (2 * PAGE_SIZE));
    let range = map::FREE + 2 * PAGE_SIZE * random.below(ranges);
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
        // The block holds whatever the last query has left there.
        13 => (map::BLOCKS, 4, of(Operation::ReuseBatch)),
        14 => (range, 1, 0xebb0_0000 | random.below(1 << 16)),
        _ => (
            random.below(u64::MAX),
            random.below(u64::MAX),
            random.below(u64::MAX),
        ),
    }
}
