//! Threads free, reuse and verify stamped memory while reclaim runs without rest: memory in use is never lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use ebb_core::generation::{Gate, NoKick, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::{Backing, GuestRam};
use crate::reclaim::{Order, Reach, ReclaimTuning, Reclaimer};

const RAM: u64 = 96 << 20;
const OWNERS: u64 = 3;
/// Number of operations of each owner. Not a time, so that a busy host tests as much as an idle one.
const OPERATIONS: u64 = 1000;

/// A small generator of pseudo-random numbers (xorshift64, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A stamp that is different for each address and round.
fn stamp(page: u64, round: u64) -> [u64; 2] {
    [
        page ^ round,
        (page + round).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
    ]
}

/// A range that one thread owns, and the round of its stamps; 0 if the range is freed.
struct Slot {
    range: GpaRange,
    round: u64,
}

impl Slot {
    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        (self.range.start()..self.range.end()).step_by(PAGE_SIZE as usize)
    }

    fn write(&mut self, memory: &GuestMemoryMmap, round: u64) {
        self.round = round;
        for page in self.pages() {
            let [low, high] = stamp(page, round);
            memory.write_obj(low, GuestAddress(page)).unwrap();
            memory
                .write_obj(high, GuestAddress(page + PAGE_SIZE - 8))
                .unwrap();
        }
    }

    /// Pages that do not hold what was written last.
    fn lost(&self, memory: &GuestMemoryMmap) -> u64 {
        let intact = |page| {
            let low: u64 = memory.read_obj(GuestAddress(page)).unwrap();
            let high: u64 = memory.read_obj(GuestAddress(page + PAGE_SIZE - 8)).unwrap();
            [low, high] == stamp(page, self.round)
        };
        self.pages().filter(|&page| !intact(page)).count() as u64
    }
}

/// Slots of 1 to 16 pages, and a few of some MiB, given to the owners in turn. So neighbours have different owners, and
/// ranges merge and split across them.
fn slots(owner: u64) -> Vec<Slot> {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut at, mut turn, mut slots) = (0, 0, Vec::new());
    while at < RAM {
        let pages = match random.below(200) {
            0..4 => 512 + random.below(1024),
            _ => 1 + random.below(16),
        };
        let end = (at + pages * PAGE_SIZE).min(RAM);
        if turn % OWNERS == owner {
            let range = GpaRange::new(at, end).unwrap();
            slots.push(Slot { range, round: 0 });
        }
        (at, turn) = (end, turn + 1);
    }
    slots
}

/// Acts as a vCPU: touches memory in the guest, and frees and reuses it in exits.
fn own(owner: u64, (lazy, gate): (&LazyMemory, &Gate), memory: &GuestMemoryMmap) -> (u64, u64) {
    let mut random = Random(owner + 1);
    let mut slots = slots(owner);
    let (mut operations, mut lost) = (0, 0);
    for slot in &mut slots {
        slot.write(memory, 1);
    }
    while operations < OPERATIONS {
        let count = slots.len() as u64;
        let slot = &mut slots[random.below(count) as usize];
        operations += 1;
        // Memory that is freed only for a moment is most likely to be reused while a reclaim works on it.
        for round in 0..1 + random.below(4) {
            if slot.round == 0 {
                lazy.reuse(&[slot.range]);
                let _inside = gate.enter(owner as usize);
                slot.write(memory, operations * 4 + round);
            }
            thread::yield_now();
            let inside = gate.enter(owner as usize);
            lost += slot.lost(memory);
            drop(inside);
            if random.below(8) == 0 {
                break;
            }
            slot.round = 0;
            lazy.free(&[slot.range]);
            for _ in 0..random.below(2000) {
                std::hint::spin_loop();
            }
        }
    }
    lost += slots
        .iter()
        .filter(|slot| slot.round != 0)
        .map(|slot| slot.lost(memory))
        .sum::<u64>();
    (operations, lost)
}

#[test]
fn memory_in_use_is_never_lost() {
    let all = GpaRange::new(0, RAM).unwrap();
    let ram = Arc::new(GuestRam::allocate(Backing::default(), &[all]).unwrap());
    let generation = Arc::new(VmGeneration::default());
    let owners = OWNERS as usize;
    let gate = Arc::new(Gate::new(owners, Arc::clone(&generation), Box::new(NoKick)));
    let lazy = Arc::new(LazyMemory::with_huge_pages(generation));
    let tuning = ReclaimTuning {
        pause: Duration::from_millis(1),
        slice: 16,
        share: 50,
        ..ReclaimTuning::default()
    };
    let pages = Arc::clone(&ram) as _;
    let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, Arc::clone(&gate), tuning);
    let done = AtomicBool::new(false);
    let reclaims = AtomicU64::new(0);
    let (operations, lost) = thread::scope(|scope| {
        let owners: Vec<_> = (0..OWNERS)
            .map(|owner| (owner, ram.memory(), (&*lazy, &*gate)))
            .map(|(owner, memory, vm)| scope.spawn(move || own(owner, vm, &memory)))
            .collect();
        scope.spawn(|| {
            let mut random = Random(99);
            while !done.load(Ordering::Relaxed) {
                let bytes = 1 + random.below(8 << 20);
                let done = match random.below(2) {
                    0 => reclaimer.invalidate(Order {
                        bytes,
                        reach: Reach::Fragments,
                        newest: u64::MAX,
                        urgent: true,
                    }),
                    _ => reclaimer.reclaim(bytes),
                };
                if done.bytes == 0 {
                    thread::yield_now();
                }
                reclaims.fetch_add(1, Ordering::Relaxed);
            }
        });
        let results: Vec<_> = owners
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        done.store(true, Ordering::Relaxed);
        let sum = |sum: (u64, u64), one: (u64, u64)| (sum.0 + one.0, sum.1 + one.1);
        results.into_iter().map(Result::unwrap).fold((0, 0), sum)
    });
    let stats = lazy.snapshot();
    println!("{operations} operations, {reclaims:?} reclaims, {stats:?}");
    assert_eq!(lost, 0, "pages lost in {operations} operations");
    assert!(stats.reclaimed_bytes_total > 0, "{stats:?}");
    assert_eq!(stats.reclaiming_bytes, 0);
    assert!(stats.unmapped_bytes_total > 0, "{stats:?}");
    let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
    assert_eq!(
        stats.freed_bytes_total,
        tracked + stats.reused_bytes_total,
        "bytes are conserved"
    );
    let gate = gate.stats();
    assert!(gate.closings_total > gate.missed_total, "{gate:?}");
}
