//! Each vCPU writes records into all memory that is not lazily free, and frees and reuses its slots at random
//! while the host reclaims. What is in use must be there, before each free and in sweeps; what comes back from
//! a reuse must be what was there or zero.

use ebb_hypercall_abi::stubs::Transport;
use ebb_hypercall_abi::{Error, Operation, PAGE_SIZE, Success};

use crate::calls::{BATCH, Calls};
use crate::cpu::{Ram, barrier, now, say};
use crate::random::Random;
use crate::slots::{BIG, Slot, deal};
use crate::stamp::{Found, look, write};
use crate::{COUNTS, Counts, Parameters, map, marker};

/// Operations between two sweeps of a vCPU over all of its slots.
const SWEEP: u64 = 1 << 14;

/// How rarely a slot's turn is made use of. The rare ones stay free for long enough to be invalidated first and
/// discarded later.
const COLD: [u64; 8] = [1, 2, 1, 200, 1, 1, 2, 50];

/// Queries that the first vCPU makes after the host has taken most, so that the host's side can look.
const LINGER: u64 = 300;

/// One vCPU's part.
struct Life<'a> {
    ram: Ram,
    calls: Calls,
    random: Random,
    slots: &'a mut [Slot],
    generation: u64,
    counts: Counts,
}

/// Runs the part of the vCPU `index`; the first one speaks for all.
pub fn run(ram: Ram, parameters: &Parameters, index: u64) {
    let vcpus = parameters.vcpus;
    let slots = place_slots(parameters, index);
    let mut life = Life {
        ram,
        calls: Calls::new(ram, index),
        random: Random::new(parameters.seed + index),
        slots,
        generation: 1,
        counts: Counts::default(),
    };
    life.write_all();
    barrier(&ram, 0, vcpus);
    if index == 0 {
        say(marker::READY);
    }
    let mut next_sweep = SWEEP;
    while life.counts.operations < parameters.operations {
        life.turn();
        if life.counts.operations >= next_sweep {
            next_sweep += SWEEP;
            life.sweep();
        }
    }
    life.sweep();
    life.all(Operation::LazyFree);
    barrier(&ram, 1, vcpus);
    if index == 0 {
        life.wait_for_the_host(parameters.ram);
    }
    barrier(&ram, 2, vcpus);
    let zero = life.counts.reused_zero;
    life.all(Operation::Reuse);
    life.counts.zero_at_end = life.counts.reused_zero - zero;
    publish(&ram, life.counts);
    barrier(&ram, 3, vcpus);
    if index == 0 {
        say(marker::COUNTS);
        (0..COUNTS as u64)
            .for_each(|word| say(sum(&ram, word).load(core::sync::atomic::Ordering::Acquire)));
    }
}

/// The place where all vCPUs add up a word of their counts.
fn sum(ram: &Ram, word: u64) -> &core::sync::atomic::AtomicU64 {
    ram.shared(64 + word)
}

fn publish(ram: &Ram, counts: Counts) {
    for (word, count) in counts.to_words().into_iter().enumerate() {
        sum(ram, word as u64).fetch_add(count, core::sync::atomic::Ordering::AcqRel);
    }
}

/// The slots of the vCPU `index`, at their place in the guest's memory.
fn place_slots<'a>(parameters: &Parameters, index: u64) -> &'a mut [Slot] {
    let first = core::ptr::with_exposed_provenance_mut::<Slot>(
        (map::SLOTS + index * map::SLOTS_SIZE) as usize,
    );
    let room = map::SLOTS_SIZE as usize / size_of::<Slot>();
    let mut count = 0;
    deal(
        parameters.seed,
        (index, parameters.vcpus),
        parameters.ram,
        |slot| {
            if count < room {
                // SAFETY: inside this vCPU's own room in the guest's memory, aligned as its start is.
                unsafe { first.add(count).write(slot) };
                count += 1;
            }
        },
    );
    // SAFETY: `count` slots were written there, and nobody else uses the room.
    unsafe { core::slice::from_raw_parts_mut(first, count) }
}

impl Life<'_> {
    fn write_all(&mut self) {
        for index in 0..self.slots.len() {
            self.write(index);
        }
    }

    /// Writes a slot anew.
    fn write(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.generation = self.generation;
        slot.lazy = false;
        for page in 0..u64::from(slot.pages) {
            write(&mut self.ram, slot.gpa + page * PAGE_SIZE, slot.generation);
        }
    }

    /// A slot in use must be as it was written.
    fn verify(&mut self, index: usize) {
        let slot = self.slots[index];
        for page in 0..u64::from(slot.pages) {
            match look(&self.ram, slot.gpa + page * PAGE_SIZE, slot.generation) {
                Found::Intact => self.counts.kept += 1,
                _ => self.counts.lost += 1,
            }
        }
    }

    /// A slot that has just been reused is as it was, or zero, page by page.
    fn verify_reused(&mut self, index: usize) {
        let slot = self.slots[index];
        for page in 0..u64::from(slot.pages) {
            match look(&self.ram, slot.gpa + page * PAGE_SIZE, slot.generation) {
                Found::Intact => self.counts.reused_intact += 1,
                Found::Zero => self.counts.reused_zero += 1,
                Found::Foreign(bytes) => self.counts.foreign_bytes += bytes,
            }
        }
    }

    fn sweep(&mut self) {
        for index in 0..self.slots.len() {
            if !self.slots[index].lazy {
                self.verify(index);
            }
        }
    }

    /// Frees or reuses some slots, and often does the opposite at once: what is handed back for a moment only
    /// is what a reclaim is most likely to be busy with.
    fn turn(&mut self) {
        let wanted = match self.random.below(4) {
            0 => 1,
            _ => 2 + self.random.below(BATCH as u64 - 1) as usize,
        };
        let (mut chosen, mut count) = ([0; BATCH], 0);
        let len = self.slots.len();
        let start = self.random.below(len as u64) as usize;
        let lazy = self.slots[start].lazy;
        for step in 0..len {
            let index = (start + step) % len;
            let slot = self.slots[index];
            let rare = if slot.pages >= BIG {
                16
            } else {
                COLD[index % COLD.len()]
            };
            if count == wanted {
                break;
            }
            if slot.lazy == lazy && self.random.below(rare) == 0 {
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
            self.slots[index].lazy = true;
        }
        match self.call(Operation::LazyFree, chosen) {
            Ok(Success::Done) => {}
            // Part of it stays in use, and may be reused all the same.
            Err(Error::NoSpace) => self.counts.refused += 1,
            _ => self.counts.bad_statuses += 1,
        }
    }

    /// Takes slots back and writes them anew, unless this is the `last` time.
    fn reuse(&mut self, chosen: &[usize], last: bool) {
        match self.call(Operation::Reuse, chosen) {
            Ok(Success::Done | Success::LastRange) => {}
            _ => self.counts.bad_statuses += 1,
        }
        self.generation += 1;
        for &index in chosen {
            self.verify_reused(index);
            if last {
                self.slots[index].lazy = false;
            } else {
                self.write(index);
            }
        }
    }

    /// Makes the call for one slot alone, and a batch for several, by either transport.
    fn call(&mut self, what: Operation, chosen: &[usize]) -> Result<Success, Error> {
        self.counts.operations += chosen.len() as u64;
        self.counts.calls += 1;
        let by: Transport = self.calls.transport(&mut self.random);
        if let [only] = chosen {
            let slot = self.slots[*only];
            return Calls::one(by, what, slot.gpa, slot.pages.into());
        }
        self.counts.batches += 1;
        let mut batch = [self.slots[chosen[0]]; BATCH];
        for (entry, &index) in batch.iter_mut().zip(chosen) {
            *entry = self.slots[index];
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
        while next < self.slots.len() {
            let (mut chosen, mut count) = ([0; BATCH], 0);
            while next < self.slots.len() && count < BATCH {
                if self.slots[next].lazy == lazy {
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

    /// Waits until the host has taken seven eighths of what is free, and a moment longer.
    fn wait_for_the_host(&mut self, ram: u64) {
        let wanted = (ram - map::FREE) / PAGE_SIZE / 8 * 7;
        let mut linger = LINGER;
        let mut said = false;
        while linger > 0 {
            let by = self.calls.transport(&mut self.random);
            match self.calls.query(by) {
                Ok((_, discarded)) if discarded >= wanted => {
                    if !said {
                        say(marker::TAKEN);
                        said = true;
                    }
                    linger -= 1;
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
