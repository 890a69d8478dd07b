//! Guests that lie: notes, tables, sections and descriptors that were changed at random, before and while they are read.
//!
//! What must hold: nothing panics, each call loads a bounded number of words, and what is found lies where it was looked
//! for. `EBB_HOSTILE_ROUNDS` is for longer runs; each round has a seed of its own, which a failure names.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::*;

const ROUNDS: u64 = 150;
/// A walk is one load a level, and a word.
const LOADS_OF_WORD: u64 = 5 + 1;
/// The pointer to the section, and the section.
const LOADS_OF_SECTION: u64 = 2 * LOADS_OF_WORD;
/// Type and order.
const LOADS_OF_DESCRIPTOR: u64 = 2 * LOADS_OF_WORD;
/// A page has a possible head for each order; one of them may be on a list.
const LOADS_OF_BLOCK: u64 = LOADS_OF_SECTION + 16 * LOADS_OF_DESCRIPTOR + 2 * LOADS_OF_WORD;
/// Release and version, and a walk.
const LOADS_OF_NAMES: u64 = 5 + 18;

/// SplitMix64, which needs no crate.
struct Random(AtomicU64);

impl Random {
    fn next(&self) -> u64 {
        let state = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&self, end: u64) -> u64 {
        self.next() % end
    }

    fn of<T: Copy>(&self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A word as a table, a section or a descriptor might have it, or none of that.
    fn word(&self, machine: &Machine) -> u64 {
        let flags = self.of(&[0, 1, 7, 0x63, 0x81, 0xe3, 0x87, 1 << 63 | 0x63, 0xfff]);
        let place = self.of(&[
            machine.root(),
            self.below(RAM) & !0xfff,
            RAM - PAGE,
            RAM,
            1 << 51,
            0x000f_ffff_ffff_f000,
            0xffff_f385_c000_0000,
            0xffff_8a7f_9000_1000,
            u64::MAX << 12,
        ]);
        match self.below(8) {
            0 => self.next(),
            1 => self.of(&[0, 1 << 63, u64::MAX, u64::MAX - 7, 0x1_ffff_ffff]),
            2 => self.below(20),
            3 => 0xf000_0000 | self.below(2) << 32,
            _ => place | flags,
        }
    }
}

/// Memory that another program changes while it is read: now and then a load returns something else.
struct Changing<'a> {
    machine: &'a Machine,
    random: &'a Random,
    /// One load in so many is a lie; 0: none.
    lies: u64,
}

impl ReadGuest for Changing<'_> {
    fn load(&self, gpa: u64) -> Option<u64> {
        let word = self.machine.memory.load(gpa);
        let is_lie = self.lies != 0 && self.random.below(self.lies) == 0;
        word.map(|word| {
            if is_lie {
                self.random.word(self.machine)
            } else {
                word
            }
        })
    }
}

fn lying_text(random: &Random) -> String {
    let mut lines: Vec<_> = random
        .of(&[NOTE_6_1, NOTE_6_12])
        .lines()
        .map(String::from)
        .collect();
    for _ in 0..random.below(4) {
        let index = random.below(lines.len() as u64) as usize;
        let key = lines[index]
            .split('=')
            .next()
            .unwrap_or_default()
            .to_owned();
        let number = random.of(&[
            0,
            1,
            7,
            8,
            9,
            63,
            64,
            1 << 31,
            1 << 32,
            1 << 62,
            1 << 63,
            u64::MAX,
            random.next(),
        ]);
        lines[index] = match random.below(6) {
            0 => format!("{key}={number:x}"),
            1 => format!("{key}={}", number.cast_signed()),
            2 => format!("{key}={number:#x}"),
            3 => String::new(),
            4 => format!("{key}="),
            _ => key,
        };
    }
    lines.join("\n")
}

/// Changes some of the words that are there.
fn lie(machine: &mut Machine, random: &Random) {
    for _ in 0..random.below(8) {
        let page = random.below(RAM / PAGE);
        let order = random.of(&[0, 4, 8, 9, 10, 11, 15, 63, 64, u64::MAX]);
        let word = random.word(machine);
        match random.below(7) {
            0 => machine.set_section(random.below(16), word),
            1 => machine.describe(page, word as u32, order),
            2 => machine.free(page >> 9 << 9, order),
            5 => machine.link(page >> 9 << 9, word, word),
            3 => machine.memory.set(
                machine.root() + random.of(&[0, 256, 276, 487, 511]) * 8,
                word,
            ),
            4 => {
                let (va, leaf) = (
                    0xffff_f385_c000_0000 + page * 64,
                    random.of(&[Leaf::Kib4, Leaf::Mib2]),
                );
                machine.map(va, word & 0x000f_ffff_ffe0_0000, leaf);
            }
            _ => {
                let entry = machine.descriptor_entry(page, Leaf::Mib2);
                machine.memory.set(entry, word);
            }
        }
    }
}

fn any_range(random: &Random) -> GpaRange {
    let start = match random.below(8) {
        0 => random.next() & !0xfff,
        1 => random.of(&[0, RAM - PAGE, RAM, 1 << 46, 1 << 52, u64::MAX << 13]),
        _ => random.below(RAM) & !0xfff,
    };
    let len = random.of(&[1, 2, 15, 512, 1024, 1 << 15, 1 << 18]) * PAGE;
    GpaRange::new(start, start.saturating_add(len) & !0xfff).unwrap_or(pages(0, 1))
}

/// Looks for free memory, and checks what is said of it.
fn look(kernel: &GuestKernel, memory: &Changing<'_>, random: &Random) {
    let within = any_range(random);
    let order = random.of(&[0, 3, 4, 5, 8, 9, 9, 9, 10, 11, 16, 64, u32::MAX]);
    let mut found = Vec::new();
    let loads = &memory.machine.memory;
    loads.loads();
    let end = kernel.find_free(memory, within, order, &mut found);
    let looks = (128 << 20 >> 12) >> order.min(20);
    assert!(loads.loads() <= LOADS_OF_BLOCK + looks * LOADS_OF_DESCRIPTOR);
    assert!(
        within.start() < end && end <= within.end(),
        "{within:?}, {end:#x}"
    );
    let mut at = within.start();
    for piece in found {
        let unit = PAGE << order;
        assert!(
            at <= piece.start() && piece.end() <= end,
            "{piece:?} of {within:?}"
        );
        assert!(piece.start().is_multiple_of(unit) && piece.end().is_multiple_of(unit));
        at = piece.end();
        let part = range(piece.start(), unit);
        assert!(
            memory.lies != 0 || kernel.is_free(memory, part),
            "{part:?} is found and not free"
        );
    }
    loads.loads();
    let _ = kernel.is_free(memory, any_range(random));
    assert!(loads.loads() <= LOADS_OF_BLOCK);
    let _ = kernel.is_unchanged(memory);
    assert!(loads.loads() <= LOADS_OF_NAMES);
    let _ = is_poisoned(memory, any_range(random));
    assert!(loads.loads() <= 4);
}

fn round(seed: u64) {
    let random = Random(AtomicU64::new(seed));
    let leaf = random.of(&[Leaf::Kib4, Leaf::Mib2, Leaf::Gib1]);
    let mut machine = Machine::new(random.of(&[NOTE_6_1, NOTE_6_12]), leaf);
    let kernel = accept(&machine);
    lie(&mut machine, &random);
    for _ in 0..4 {
        let memory = Changing {
            machine: &machine,
            random: &random,
            lies: random.of(&[0, 1, 2, 10, 100]),
        };
        look(&kernel, &memory, &random);
    }
    machine.text = lying_text(&random);
    machine.write_note();
    let memory = Changing {
        machine: &machine,
        random: &random,
        lies: random.of(&[0, 0, 10, 1000]),
    };
    machine.memory.loads();
    let accepted = GuestKernel::accept(&memory, machine.note());
    let of_text = 2 * PAGE / 8;
    assert!(
        machine.memory.loads() <= of_text + 2 * LOADS_OF_NAMES + LOADS_OF_BLOCK + LOADS_OF_WORD
    );
    if let Ok(kernel) = accepted {
        look(&kernel, &memory, &random);
    }
}

#[test]
fn guests_that_lie_are_read_in_bounded_time() {
    let rounds =
        std::env::var("EBB_HOSTILE_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    for seed in 0..rounds {
        catch_unwind(AssertUnwindSafe(|| round(seed))).unwrap_or_else(|panic| {
            eprintln!("in round {seed}");
            resume_unwind(panic)
        });
    }
}
