//! How long it takes to look through the table of an arena of 1 TiB, and what an arena of 4 TiB costs that nobody
//! touches. Prints one line of JSON a case; needs no KVM.
//!
//! `arena [ROUNDS]`

use std::time::{Duration, Instant};

use hypercall_abi::arena::Layout;
use hypercall_abi::granule::{State, Word};
use vm_memory::{Bytes, GuestAddress};
use vmm::arena::Arena;
use vmm::memory::{Backing, GpaRange, GuestRam};
use vmm::sys::resident_bytes;

const START: u64 = 4 << 30;
const GRANULE: u64 = 2 << 20;
const TIB: u64 = 1 << 40;
/// Frees of this generation are younger than what is looked for.
const YOUNG: u64 = 9;

fn arena(size: u64) -> (GuestRam, Arena) {
    let range = |start, len| GpaRange::new(start, start + len).expect("pages");
    let (ram, gpa) = (range(0, 4096), range(START, size));
    let backing = Backing {
        thp: true,
        ..Backing::default()
    };
    let memory = GuestRam::with_arenas(backing, &[ram], &[gpa]).expect("address space");
    let arena = Arena::new(0, "arena".to_owned(), gpa, GRANULE, memory.memory());
    (memory, arena.expect("an arena"))
}

/// Writes every word of the table: the same state, but every other word is 0 when `half`.
fn fill(memory: &GuestRam, layout: Layout, half: bool) {
    let lazy = Word::new(State::Lazy, YOUNG).raw();
    let word = |n: u64| if half && n % 2 == 1 { 0 } else { lazy };
    let bytes: Vec<u8> = (0..layout.granules())
        .flat_map(|n| word(n).to_le_bytes())
        .collect();
    let at = GuestAddress(START + layout.table());
    memory.memory().write_slice(&bytes, at).expect("the table");
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn measure(name: &str, rounds: usize, action: impl Fn()) {
    let time = |_| {
        let start = Instant::now();
        action();
        start.elapsed()
    };
    let first = time(0).as_secs_f64() * 1e3;
    let later = median((0..rounds).map(time).collect());
    println!("{{\"case\": \"{name}\", \"first_ms\": {first:.3}, \"median_ms\": {later:.3}}}");
}

fn main() {
    let rounds = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(21);
    let before = resident_bytes().unwrap_or(0);
    let (big, untouched) = arena(4 * TIB);
    assert_eq!(untouched.lazy_bytes(), 0);
    let grown = resident_bytes().unwrap_or(0).saturating_sub(before);
    println!("{{\"case\": \"4 TiB untouched\", \"resident_bytes\": {grown}}}");
    drop((untouched, big));

    let (memory, arena) = arena(TIB);
    let layout = arena.place().layout;
    let count = || assert!(arena.stats().scans_total > 0);
    let look = || assert!(arena.take(&mut 0, YOUNG - 1, u64::MAX).is_none());
    measure("1 TiB, count, untouched", rounds, count);
    measure("1 TiB, search, untouched", rounds, look);
    fill(&memory, layout, true);
    measure("1 TiB, count, half lazy", rounds, count);
    measure("1 TiB, search, half lazy, too young", rounds, look);
    fill(&memory, layout, false);
    measure("1 TiB, search, all lazy, too young", rounds, look);
    measure("1 TiB, take and give back all", rounds, || {
        drop(arena.take(&mut 0, YOUNG, u64::MAX));
    });
}
