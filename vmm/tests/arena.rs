//! What an arena costs that nobody uses. Alone in its process, so that the process's memory is the arena's.

use ebb_core::range::GpaRange;
use ebb_vmm::arena::Arena;
use ebb_vmm::memory::{Backing, GuestRam};

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;

/// Resident bytes of this process.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn an_arena_of_four_tebibytes_that_is_not_touched_takes_no_more_than_32_mib() {
    let before = resident();
    let ram = GpaRange::new(0, 4096).unwrap();
    let gpa = GpaRange::new(START, START + (4 << 40)).unwrap();
    let backing = Backing {
        thp: true,
        ..Backing::default()
    };
    let memory = GuestRam::with_arenas(backing, &[ram], &[gpa]).unwrap();
    let arena = Arena::new(0, "heap".to_owned(), gpa, 2 * MIB, memory.memory()).unwrap();
    for _ in 0..2 {
        assert!(arena.take(&mut 0, u64::MAX, u64::MAX).is_none());
        assert_eq!(arena.stats().lazy_bytes, 0);
    }
    arena.reset();
    let grown = resident().saturating_sub(before);
    println!("{grown} bytes");
    assert!(grown <= 32 * MIB, "{grown} bytes");
}
