use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ebb_core::range::PAGE_SIZE;
use ebb_core::release::Release;
use ebb_hypercall_abi::granule::{State, Word};
use ebb_hypercall_abi::shared_word;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{Backing, GuestRam};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 2 * MIB;
const START: u64 = 4 << 30;

fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(start, start + len).unwrap()
}

/// A machine with one arena of `size` bytes, and that arena.
fn arena(size: u64) -> (GuestRam, Arena) {
    let gpa = range(START, size);
    let ram = GuestRam::with_arenas(Backing::default(), &[range(0, PAGE_SIZE)], &[gpa]).unwrap();
    let arena = Arena::new(3, "heap".to_owned(), gpa, GRANULE, ram.memory()).unwrap();
    (ram, arena)
}

/// The guest's side of a word.
fn word(arena: &Arena, index: u64) -> GuestAddress {
    GuestAddress(START + arena.place().layout.table() + 8 * index)
}

fn set(arena: &Arena, index: u64, state: State, generation: u64) {
    let raw = Word::new(state, generation).raw();
    let at = word(arena, index);
    arena.memory.store(raw, at, Ordering::Release).unwrap();
}

fn state(arena: &Arena, index: u64) -> Option<State> {
    let raw = arena.memory.load(word(arena, index), Ordering::Acquire);
    Word::from_raw(raw.unwrap()).state()
}

#[test]
fn the_header_is_there_and_the_generation_follows() {
    let (_ram, arena) = arena(64 * MIB);
    let header = || {
        let mut bytes = [0; 128];
        let at = GuestAddress(START);
        arena.memory.read_slice(&mut bytes, at).unwrap();
        let (words, _) = bytes.as_chunks::<8>();
        Header::from_words(std::array::from_fn(|n| u64::from_le_bytes(words[n])))
    };
    let found = header();
    assert_eq!(found.check(64 * MIB), Ok(arena.place().layout));
    assert_eq!((found.name(), found.index, found.gpa), ("heap", 3, START));
    arena.publish(77);
    assert_eq!(header().generation, 77);
}

#[test]
fn what_is_no_memory_is_no_arena() {
    let (ram, arena) = arena(64 * MIB);
    let make = |gpa| Arena::new(0, String::new(), gpa, GRANULE, ram.memory()).map(drop);
    for gpa in [range(8 << 30, 64 * MIB), range(START, GRANULE)] {
        let error = make(gpa).unwrap_err().to_string();
        assert!(
            error.contains("is not guest memory, or too small"),
            "{error}"
        );
    }
    assert!(!ram.is_ram(arena.place().gpa) && ram.is_ram(range(0, PAGE_SIZE)));
}

#[test]
fn what_was_free_is_discarded_after_a_restore() {
    let (_ram, arena) = arena(64 * MIB);
    let free = [
        (2, State::Lazy),
        (3, State::Reclaiming),
        (4, State::Discarded),
        (6, State::Lazy),
    ];
    for (index, state) in free {
        set(&arena, index, state, 5);
    }
    let at = word(&arena, 5);
    arena.memory.store(0xff_u64, at, Ordering::Relaxed).unwrap();
    let ranges = free.map(|(index, _)| range(START + index * GRANULE, GRANULE));
    assert_eq!(arena.free(), ranges);
    arena.restore();
    for (index, _) in free {
        assert_eq!(state(&arena, index), Some(State::Discarded), "{index}");
    }
    assert_eq!([1, 5].map(|n| state(&arena, n)), [Some(State::InUse), None]);
    let stats = arena.stats();
    let bytes = (stats.discarded_bytes, stats.reclaimed_bytes_total);
    assert_eq!(bytes, (4 * GRANULE, 0));
    // What is freed from now on is older than what is freed later.
    set(&arena, 3, State::Lazy, 0);
    assert!(arena.take(&mut 0, 0, GRANULE).is_some());
}

#[test]
fn lazy_granules_go_to_the_host_and_come_back_by_a_call() {
    let (ram, arena) = arena(64 * MIB);
    for index in 1..5 {
        set(&arena, index, State::Lazy, 2);
        let at = GuestAddress(START + index * GRANULE);
        arena
            .memory
            .store(0x1234_u64, at, Ordering::Relaxed)
            .unwrap();
    }
    assert_eq!(arena.stats().lazy_bytes, 4 * GRANULE);
    let mut cursor = 0;
    assert!(arena.take(&mut cursor, 9, GRANULE - 1).is_none());
    let taken = arena.take(&mut cursor, 9, 3 * GRANULE + 1).unwrap();
    assert_eq!(taken.ranges(), [range(START + GRANULE, 3 * GRANULE)]);
    ram.release_range(taken.ranges()[0], Release::Discard)
        .unwrap();
    taken.finish(&[3 * GRANULE]);
    let stats = arena.stats();
    assert_eq!(
        (stats.lazy_bytes, stats.discarded_bytes),
        (GRANULE, 3 * GRANULE)
    );
    let content = |index: u64| {
        let at = GuestAddress(START + index * GRANULE);
        arena.memory.load::<u64>(at, Ordering::Relaxed).unwrap()
    };
    assert_eq!((content(1), content(4)), (0, 0x1234));
    // Any part of a granule names it.
    arena.reuse(range(START + 3 * GRANULE - PAGE_SIZE, GRANULE));
    let states = [1, 2, 3, 4].map(|index| state(&arena, index).unwrap());
    assert_eq!(
        states,
        [State::Discarded, State::InUse, State::InUse, State::Lazy]
    );
    let stats = arena.stats();
    assert_eq!(
        (stats.discarded_bytes, stats.reused_bytes_total),
        (GRANULE, 2 * GRANULE)
    );
    assert_eq!((stats.reuse_calls_total, stats.reuse_waits_total), (2, 0));
    arena.reset();
    assert_eq!(
        (1..5)
            .filter(|&index| state(&arena, index) != Some(State::InUse))
            .count(),
        0
    );
}

#[test]
fn a_part_that_the_host_would_not_take_is_lazy_again() {
    let (_ram, arena) = arena(64 * MIB);
    set(&arena, 5, State::Lazy, 2);
    let taken = arena.take(&mut 0, 9, u64::MAX).unwrap();
    taken.finish(&[GRANULE - PAGE_SIZE]);
    assert_eq!(state(&arena, 5), Some(State::Lazy));
    let stats = arena.stats();
    assert_eq!((stats.discarded_bytes, stats.reclaimed_bytes_total), (0, 0));
}

#[test]
fn calls_name_granules_behind_the_head_and_not_too_many() {
    let (_ram, arena) = arena(4 << 30);
    let (first, most) = (START + GRANULE, REUSE_MAX_GRANULES * GRANULE);
    for (good, start, len) in [
        (true, first, PAGE_SIZE),
        (true, first, most),
        (true, START + (4 << 30) - GRANULE, GRANULE),
        (false, START, GRANULE),
        (false, first - PAGE_SIZE, 2 * PAGE_SIZE),
        (false, first, most + PAGE_SIZE),
        (false, first + PAGE_SIZE, most),
        (false, START + (4 << 30) - GRANULE, 2 * GRANULE),
        (false, 0, PAGE_SIZE),
    ] {
        assert_eq!(
            arena.may_reuse(range(start, len)),
            good,
            "{start:#x} {len:#x}"
        );
    }
    set(&arena, 0, State::Lazy, 0);
    arena.reuse(range(START, GRANULE));
    arena.reset();
    assert_eq!(
        state(&arena, 0),
        Some(State::Lazy),
        "the head is left alone"
    );
}

/// A guest that writes nonsense to the table, as fast as it can, while the monitor takes, counts and reuses.
#[test]
fn a_guest_that_scribbles_over_the_table_harms_nobody_else() {
    let (ram, arena) = arena(256 * MIB);
    let done = AtomicBool::new(false);
    let granules = arena.place().layout.granules();
    thread::scope(|scope| {
        for seed in [1_u64, 2] {
            let (arena, done) = (&arena, &done);
            scope.spawn(move || {
                let mut random = seed;
                while !done.load(Ordering::Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(seed);
                    // Mostly words that mean something.
                    let raw = if random >> 60 == 0 {
                        random
                    } else {
                        random >> 40 & 0x303
                    };
                    let at = word(arena, (random >> 32) % granules);
                    arena.memory.store(raw, at, Ordering::Relaxed).unwrap();
                }
            });
        }
        // On a crowded host it may take the guest a while to begin.
        for round in (0..).take_while(|&n| n < 200 || arena.stats().reclaimed_bytes_total == 0) {
            let mut cursor = 0;
            while let Some(taken) = arena.take(&mut cursor, u64::MAX, 16 * GRANULE) {
                let inside = |r: &GpaRange| arena.may_reuse(range(r.start(), PAGE_SIZE));
                assert!(taken.ranges().iter().all(inside));
                let bytes: Vec<u64> = taken
                    .ranges()
                    .iter()
                    .map(|r| ram.release_range(*r, Release::Discard).unwrap())
                    .collect();
                taken.finish(&bytes);
            }
            arena.reuse(range(START + (round % 100 + 1) * GRANULE, 8 * GRANULE));
            assert!(arena.stats().lazy_bytes <= granules * GRANULE);
        }
        done.store(true, Ordering::Relaxed);
    });
    arena.reset();
    let stats = arena.stats();
    assert_eq!(
        (stats.lazy_bytes, stats.discarded_bytes),
        (0, 0),
        "{stats:?}"
    );
}

/// A guest that keeps to the rules never loses what it has written after it took a granule back.
#[test]
fn nothing_is_lost_while_everything_is_taken() {
    let (ram, arena) = arena(16 * MIB);
    let done = AtomicBool::new(false);
    let indices = arena.place().layout.first()..arena.place().layout.granules();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut cursor = 0;
                while let Some(taken) = arena.take(&mut cursor, u64::MAX, 3 * GRANULE) {
                    let bytes: Vec<u64> = taken
                        .ranges()
                        .iter()
                        .map(|r| ram.release_range(*r, Release::Discard).unwrap())
                        .collect();
                    taken.finish(&bytes);
                }
            }
        });
        let len = usize::try_from(arena.place().layout.granules()).unwrap();
        let words = GuestWords::new(Arc::clone(&arena.memory), word(&arena, 0).0, len).unwrap();
        let taken = || arena.stats().reclaimed_bytes_total > 0;
        for round in (1..).take_while(|&n| n < 2000_u64 || !taken()) {
            for index in indices.clone() {
                let at = GuestAddress(START + index * GRANULE);
                arena.memory.store(round, at, Ordering::Relaxed).unwrap();
                let free = |word: &AtomicU64| shared_word::free(word, round);
                assert_eq!(words.with(index as usize, free), Some(true));
            }
            for index in indices.clone() {
                let at = GuestAddress(START + index * GRANULE);
                let call = || arena.reuse(range(at.0, GRANULE));
                words.with(index as usize, |word| shared_word::reuse(word, call));
                let old = arena.memory.load::<u64>(at, Ordering::Relaxed).unwrap();
                assert!(old == round || old == 0, "{old}");
                arena.memory.store(!round, at, Ordering::Relaxed).unwrap();
                thread::yield_now();
                let new = arena.memory.load::<u64>(at, Ordering::Relaxed).unwrap();
                assert_eq!(new, !round, "granule {index} was taken while in use");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
