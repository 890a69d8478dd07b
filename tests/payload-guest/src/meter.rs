//! Guests that are measured, or measure themselves.

use ebb_hypercall_abi::{Operation, PAGE_SIZE};

use crate::calls::{BATCH, Calls};
use crate::cpu::{Ram, barrier, halt, now, say};
use crate::random::Random;
use crate::slots::Slot;
use crate::stamp::Memory;
use crate::{Parameters, map, marker};

/// Pieces of work in one report.
const PIECES: usize = 31;

/// Measures the same piece of work again and again; says, after [`marker::READY`], the median of each
/// `PIECES` in cycles of the time stamp counter. Never returns.
pub fn run(mut ram: Ram) -> ! {
    say(marker::READY);
    loop {
        let mut times = [0; PIECES];
        for time in &mut times {
            let start = now();
            work(&mut ram);
            *time = now().wrapping_sub(start);
        }
        times.sort_unstable();
        say(times[PIECES / 2]);
    }
}

/// Some arithmetic on 64 pages.
fn work(ram: &mut Ram) {
    let mut value = 1u64;
    for round in 0..20_000u64 {
        let address = map::FREE + (round % 64) * PAGE_SIZE;
        value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ram.load(address);
        ram.store(address, value);
    }
}

/// Pages of a scattered range, and how far apart their starts are.
const SCATTERED: u64 = 4;
const APART: u64 = 8;

/// Frees scattered ranges of touched memory; then works for a moment and makes a call that does nothing, again
/// and again, until none of them is with the guest's content any more. The other vCPUs do nothing. Says
/// [`marker::READY`] when everything is freed and [`marker::TAKEN`] at the end, and halts.
pub fn caller(mut ram: Ram, parameters: &Parameters, index: u64) {
    barrier(&ram, 0, parameters.vcpus);
    if index != 0 {
        halt();
    }
    let mut calls = Calls::new(ram, index);
    let mut random = Random::new(parameters.seed);
    let mut batch = [Slot {
        gpa: 0,
        pages: SCATTERED as u32,
        lazy: true,
        generation: 0,
    }; BATCH];
    let ranges = parameters.operations / BATCH as u64 * BATCH as u64;
    for range in 0..ranges {
        let gpa = map::FREE + range * APART * PAGE_SIZE;
        (0..SCATTERED).for_each(|page| ram.store(gpa + page * PAGE_SIZE, range));
        let entry = (range % BATCH as u64) as usize;
        batch[entry].gpa = gpa;
        if entry == BATCH - 1 {
            let by = calls.transport(&mut random);
            // What is not taken is not waited for either: the query below says 0.
            let _ = calls.batch(by, Operation::LazyFreeBatch, &batch);
        }
    }
    say(marker::READY);
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
    say(marker::TAKEN);
    // The monitor is still to be asked what it has counted.
    halt();
}
