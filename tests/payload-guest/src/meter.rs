//! Guests for measurements: one measures itself, the other is measured.

use ebb_hypercall_abi::{Operation, PAGE_SIZE};

use crate::calls::{Calls, MAX_BATCH};
use crate::cpu::{Ram, barrier, halt, now, send};
use crate::random::Random;
use crate::ranges::TestRange;
use crate::records::WordMemory;
use crate::{Parameters, map, marker};

/// Computations in one report.
const SAMPLES: usize = 31;

/// Measures the same computation forever. After [`marker::READY`], sends the median of each `SAMPLES` computations in cycles
/// of the time stamp counter.
pub fn run(mut ram: Ram) -> ! {
    send(marker::READY);
    loop {
        let mut times = [0; SAMPLES];
        for time in &mut times {
            let start = now();
            compute(&mut ram);
            *time = now().wrapping_sub(start);
        }
        times.sort_unstable();
        send(times[SAMPLES / 2]);
    }
}

/// Some arithmetic on 64 pages.
fn compute(ram: &mut Ram) {
    let mut value = 1u64;
    for round in 0..20_000u64 {
        let address = map::TEST_MEMORY + (round % 64) * PAGE_SIZE;
        value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ram.load(address);
        ram.store(address, value);
    }
}

/// Pages of a scattered range.
const RANGE_PAGES: u64 = 4;
/// Pages from the start of one range to the next.
const RANGE_STRIDE: u64 = 8;

/// Frees scattered ranges of touched memory. Then spins and makes a hypercall without effect, until none of the ranges has its
/// content any more. Sends [`marker::READY`] when everything is freed and [`marker::TAKEN`] at the end. The other vCPUs halt.
pub fn caller(mut ram: Ram, parameters: &Parameters, index: u64) {
    barrier(&ram, 0, parameters.vcpus);
    if index != 0 {
        halt();
    }
    let mut calls = Calls::new(ram, index);
    let mut random = Random::new(parameters.seed);
    let mut batch = [TestRange {
        gpa: 0,
        pages: RANGE_PAGES as u32,
        lazy: true,
        generation: 0,
    }; MAX_BATCH];
    let ranges = parameters.operations / MAX_BATCH as u64 * MAX_BATCH as u64;
    for range in 0..ranges {
        let gpa = map::TEST_MEMORY + range * RANGE_STRIDE * PAGE_SIZE;
        (0..RANGE_PAGES).for_each(|page| ram.store(gpa + page * PAGE_SIZE, range));
        let entry = (range % MAX_BATCH as u64) as usize;
        batch[entry].gpa = gpa;
        if entry == MAX_BATCH - 1 {
            let by = calls.transport(&mut random);
            // Ranges that are refused stay in use, so the query below does not count them.
            let _ = calls.batch(by, Operation::LazyFreeBatch, &batch);
        }
    }
    send(marker::READY);
    let mut left = true;
    while left {
        for _ in 0..64 {
            let start = now();
            while now().wrapping_sub(start) < 20_000 {
                core::hint::spin_loop();
            }
            let by = calls.transport(&mut random);
            let _ = Calls::one(by, Operation::Features, 0, 1);
        }
        left = calls
            .query(calls.transport(&mut random))
            .is_ok_and(|(lazy, _)| lazy > 0);
    }
    send(marker::TAKEN);
    // Not power off: the test still asks the monitor for its counters.
    halt();
}
