//! Checks that no content is lost: each vCPU frees and reuses its ranges at random while the host reclaims.
//!
//! A range in use must hold the records that were written last, which is checked before each free and in regular sweeps. After
//! a reuse, each page must hold its old records or zeroes. Then it is written again.

use ebb_hypercall_abi::stubs::Transport;
use ebb_hypercall_abi::{Error, Operation, PAGE_SIZE, Success};

use crate::calls::{Calls, MAX_BATCH};
use crate::cpu::{Ram, barrier, now, send};
use crate::random::Random;
use crate::ranges::{LARGE_RANGE, TestRange, assign};
use crate::records::{self, PageContent};
use crate::{COUNTS, Counts, Parameters, map, marker};

/// Operations of a vCPU between two sweeps over all of its ranges.
const SWEEP_INTERVAL: u64 = 1 << 14;

/// A range is freed or reused in one of this many of its turns, by its index. The rarely used ones stay free for long enough to
/// be invalidated and later discarded.
const TURNS: [u64; 8] = [1, 2, 1, 200, 1, 1, 2, 50];

/// Queries that the first vCPU still makes after the host has discarded most pages, to give the test time to look.
const EXTRA_QUERIES: u64 = 300;

/// The test on one vCPU.
struct VcpuTest<'a> {
    ram: Ram,
    calls: Calls,
    random: Random,
    ranges: &'a mut [TestRange],
    generation: u64,
    counts: Counts,
}

/// Runs the test on vCPU `index`. vCPU 0 reports to the host.
pub fn run(ram: Ram, parameters: &Parameters, index: u64) {
    let vcpus = parameters.vcpus;
    let ranges = place_ranges(parameters, index);
    let mut test = VcpuTest {
        ram,
        calls: Calls::new(ram, index),
        random: Random::new(parameters.seed + index),
        ranges,
        generation: 1,
        counts: Counts::default(),
    };
    test.write_all();
    barrier(&ram, 0, vcpus);
    if index == 0 {
        send(marker::READY);
    }
    let mut next_sweep = SWEEP_INTERVAL;
    while test.counts.operations < parameters.operations {
        test.turn();
        if test.counts.operations >= next_sweep {
            next_sweep += SWEEP_INTERVAL;
            test.sweep();
        }
    }
    test.sweep();
    test.all(Operation::LazyFree);
    barrier(&ram, 1, vcpus);
    if index == 0 {
        test.wait_for_the_host(parameters.ram);
    }
    barrier(&ram, 2, vcpus);
    let zero = test.counts.reused_zero;
    test.all(Operation::Reuse);
    test.counts.zero_at_end = test.counts.reused_zero - zero;
    publish(&ram, test.counts);
    barrier(&ram, 3, vcpus);
    if index == 0 {
        send(marker::COUNTS);
        (0..COUNTS as u64)
            .for_each(|word| send(sum(&ram, word).load(core::sync::atomic::Ordering::Acquire)));
    }
}

/// The shared word in which the vCPUs add up a word of their counts.
fn sum(ram: &Ram, word: u64) -> &core::sync::atomic::AtomicU64 {
    ram.shared(64 + word)
}

fn publish(ram: &Ram, counts: Counts) {
    for (word, count) in counts.to_words().into_iter().enumerate() {
        sum(ram, word as u64).fetch_add(count, core::sync::atomic::Ordering::AcqRel);
    }
}

/// Writes the ranges of vCPU `index` to their place in the guest's memory.
fn place_ranges<'a>(parameters: &Parameters, index: u64) -> &'a mut [TestRange] {
    let first = core::ptr::with_exposed_provenance_mut::<TestRange>(
        (map::RANGES + index * map::RANGES_SIZE) as usize,
    );
    let room = map::RANGES_SIZE as usize / size_of::<TestRange>();
    let mut count = 0;
    assign(
        parameters.seed,
        (index, parameters.vcpus),
        parameters.ram,
        |range| {
            if count < room {
                // SAFETY: inside this vCPU's array, which is aligned.
                unsafe { first.add(count).write(range) };
                count += 1;
            }
        },
    );
    // SAFETY: `count` ranges were written there, and only this vCPU uses the array.
    unsafe { core::slice::from_raw_parts_mut(first, count) }
}

impl VcpuTest<'_> {
    fn write_all(&mut self) {
        for index in 0..self.ranges.len() {
            self.write(index);
        }
    }

    /// Writes new records into a range.
    fn write(&mut self, index: usize) {
        let range = &mut self.ranges[index];
        range.generation = self.generation;
        range.lazy = false;
        for page in 0..u64::from(range.pages) {
            records::write(
                &mut self.ram,
                range.gpa + page * PAGE_SIZE,
                range.generation,
            );
        }
    }

    /// Checks a range in use: it must hold its records.
    fn verify(&mut self, index: usize) {
        let range = self.ranges[index];
        for page in 0..u64::from(range.pages) {
            match records::check(&self.ram, range.gpa + page * PAGE_SIZE, range.generation) {
                PageContent::Intact => self.counts.kept += 1,
                _ => self.counts.lost += 1,
            }
        }
    }

    /// Checks a range that was just reused: each page must hold its records or zeroes.
    fn verify_reused(&mut self, index: usize) {
        let range = self.ranges[index];
        for page in 0..u64::from(range.pages) {
            match records::check(&self.ram, range.gpa + page * PAGE_SIZE, range.generation) {
                PageContent::Intact => self.counts.reused_intact += 1,
                PageContent::Zero => self.counts.reused_zero += 1,
                PageContent::Foreign(bytes) => self.counts.foreign_bytes += bytes,
            }
        }
    }

    fn sweep(&mut self) {
        for index in 0..self.ranges.len() {
            if !self.ranges[index].lazy {
                self.verify(index);
            }
        }
    }

    /// Frees or reuses some ranges. Often reuses freed ranges soon, because a reclaim is then most likely to meet the reuse.
    fn turn(&mut self) {
        let wanted = match self.random.below(4) {
            0 => 1,
            _ => 2 + self.random.below(MAX_BATCH as u64 - 1) as usize,
        };
        let (mut chosen, mut count) = ([0; MAX_BATCH], 0);
        let len = self.ranges.len();
        let start = self.random.below(len as u64) as usize;
        let lazy = self.ranges[start].lazy;
        for step in 0..len {
            let index = (start + step) % len;
            let range = self.ranges[index];
            let turns = if range.pages >= LARGE_RANGE {
                16
            } else {
                TURNS[index % TURNS.len()]
            };
            if count == wanted {
                break;
            }
            if range.lazy == lazy && self.random.below(turns) == 0 {
                chosen[count] = index;
                count += 1;
            }
        }
        let chosen = &chosen[..count];
        if chosen.is_empty() {
            return;
        }
        if lazy {
            self.reuse(chosen, false);
        } else {
            self.free(chosen);
            if self.random.below(2) == 0 {
                for _ in 0..self.random.below(2000) {
                    core::hint::spin_loop();
                }
                self.reuse(chosen, false);
            }
        }
    }

    fn free(&mut self, chosen: &[usize]) {
        for &index in chosen {
            self.verify(index);
            self.ranges[index].lazy = true;
        }
        match self.call(Operation::LazyFree, chosen) {
            Ok(Success::Done) => {}
            // The refused part stays in use. Reusing it has no effect.
            Err(Error::NoSpace) => self.counts.refused += 1,
            _ => self.counts.bad_statuses += 1,
        }
    }

    /// Reuses ranges and writes new records into them, unless this is the `last` time.
    fn reuse(&mut self, chosen: &[usize], last: bool) {
        match self.call(Operation::Reuse, chosen) {
            Ok(Success::Done | Success::LastRange) => {}
            _ => self.counts.bad_statuses += 1,
        }
        self.generation += 1;
        for &index in chosen {
            self.verify_reused(index);
            if last {
                self.ranges[index].lazy = false;
            } else {
                self.write(index);
            }
        }
    }

    /// Makes a single hypercall for one range, or a batch for several, by a random transport.
    fn call(&mut self, what: Operation, chosen: &[usize]) -> Result<Success, Error> {
        self.counts.operations += chosen.len() as u64;
        self.counts.calls += 1;
        let by: Transport = self.calls.transport(&mut self.random);
        if let [only] = chosen {
            let range = self.ranges[*only];
            return Calls::one(by, what, range.gpa, range.pages.into());
        }
        self.counts.batches += 1;
        let mut batch = [self.ranges[chosen[0]]; MAX_BATCH];
        for (entry, &index) in batch.iter_mut().zip(chosen) {
            *entry = self.ranges[index];
        }
        let what = match what {
            Operation::LazyFree => Operation::LazyFreeBatch,
            _ => Operation::ReuseBatch,
        };
        self.calls.batch(by, what, &batch[..chosen.len()])
    }

    /// Frees or reuses everything.
    fn all(&mut self, what: Operation) {
        let lazy = what == Operation::Reuse;
        let mut next = 0;
        while next < self.ranges.len() {
            let (mut chosen, mut count) = ([0; MAX_BATCH], 0);
            while next < self.ranges.len() && count < MAX_BATCH {
                if self.ranges[next].lazy == lazy {
                    chosen[count] = next;
                    count += 1;
                }
                next += 1;
            }
            match &chosen[..count] {
                [] => {}
                chosen if lazy => self.reuse(chosen, true),
                chosen => self.free(chosen),
            }
        }
    }

    /// Waits until the host has discarded seven eighths of the test memory, and for some more queries.
    fn wait_for_the_host(&mut self, ram: u64) {
        let wanted = (ram - map::TEST_MEMORY) / PAGE_SIZE / 8 * 7;
        let mut left = EXTRA_QUERIES;
        let mut reported = false;
        while left > 0 {
            let by = self.calls.transport(&mut self.random);
            match self.calls.query(by) {
                Ok((_, discarded)) if discarded >= wanted => {
                    if !reported {
                        send(marker::TAKEN);
                        reported = true;
                    }
                    left -= 1;
                }
                Ok(_) => {
                    let start = now();
                    while now().wrapping_sub(start) < 100_000 {
                        core::hint::spin_loop();
                    }
                }
                Err(_) => {
                    self.counts.bad_statuses += 1;
                    return;
                }
            }
        }
    }
}
