//! The reclaimer over memory that refuses some of what it is asked to release.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, NoKick, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages, Released};

use super::order;
use crate::memory::{Backing, GuestRam};
use crate::reclaim::job::MAX_MISSES;
use crate::reclaim::{EntryHook as _, Order, Reach, ReclaimTuning, Reclaimer};

const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).unwrap()
}

fn reclaimer(mib: u64) -> Reclaimer {
    let ram = GuestRam::allocate(Backing::default(), &[range(0, mib * MIB)]).unwrap();
    over(Arc::new(ram), 0, ReclaimTuning::default())
}

fn over(pages: Arc<dyn ReleasePages>, vcpus: usize, tuning: ReclaimTuning) -> Reclaimer {
    let generation = Arc::new(VmGeneration::default());
    let gate = Gate::new(vcpus, Arc::clone(&generation), Box::new(NoKick));
    let lazy = LazyMemory::new(generation);
    Reclaimer::new(Arc::new(lazy), pages, Arc::new(gate), tuning)
}

#[test]
fn blocks_go_first_then_fragments_then_a_piece_of_a_block() {
    let reclaimer = reclaimer(32);
    reclaimer
        .lazy
        .free(&[range(MIB, 7 * MIB), range(9 * MIB, 10 * MIB)]);
    let reclaim = |bytes, reach| reclaimer.discard(order(bytes, reach)).bytes;
    assert_eq!(reclaim(3 * MIB, Reach::Blocks), 2 * MIB);
    assert_eq!(reclaim(9 * MIB, Reach::Blocks), 2 * MIB, "the other block");
    assert_eq!(reclaim(9 * MIB, Reach::Blocks), 0);
    assert_eq!(reclaim(MIB + PAGE_SIZE, Reach::Fragments), MIB + PAGE_SIZE);
    assert_eq!(reclaim(9 * MIB, Reach::Fragments), 2 * MIB - PAGE_SIZE);
    reclaimer.lazy.free(&[range(16 * MIB, 20 * MIB)]);
    assert_eq!(reclaim(MIB, Reach::Fragments), 0);
    assert_eq!(reclaimer.reclaim(MIB).bytes, MIB);
    assert_eq!(reclaimer.reclaim(u64::MAX).bytes, 3 * MIB);
    let stats = reclaimer.lazy.snapshot();
    assert_eq!((stats.lazy_bytes, stats.discarded_bytes), (0, 11 * MIB));
    assert_eq!(stats.reclaimed_bytes_total, 11 * MIB);
}

#[test]
fn what_survived_the_last_reclaim_goes_before_what_is_new() {
    let reclaimer = reclaimer(32);
    reclaimer.lazy.free(&[range(16 * MIB, 20 * MIB)]);
    assert_eq!(reclaimer.reclaim(2 * MIB).bytes, 2 * MIB);
    reclaimer.lazy.free(&[range(0, 4 * MIB)]);
    assert_eq!(reclaimer.reclaim(2 * MIB).bytes, 2 * MIB);
    reclaimer.lazy.reuse(&[range(0, 4 * MIB)]);
    assert_eq!(
        reclaimer.lazy.snapshot().lazy_bytes,
        0,
        "the old range went first"
    );
}

/// Memory whose first page cannot be released. Logs each request.
#[derive(Default)]
struct RefusesFirstPage(Mutex<Vec<(GpaRange, Release)>>);

impl ReleasePages for RefusesFirstPage {
    fn can_mark_free(&self) -> bool {
        true
    }

    fn max_batch(&self) -> usize {
        7
    }

    fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        let bytes = ranges.iter().map(|range| {
            self.0.lock().unwrap().push((*range, how));
            if range.start() == 0 { 0 } else { range.len() }
        });
        let bytes: Vec<_> = bytes.collect();
        let failures = bytes.iter().filter(|bytes| **bytes == 0).count() as u64;
        Released {
            bytes,
            calls: 1,
            failures,
            error: None,
        }
    }
}

#[test]
fn chunks_that_fail_stay_lazy_and_the_others_go() {
    let reclaimer = over(
        Arc::new(RefusesFirstPage::default()),
        0,
        ReclaimTuning::default(),
    );
    reclaimer.lazy.free(&[range(0, 32 * MIB)]);
    let outcome = reclaimer.reclaim(u64::MAX);
    assert_eq!(outcome.bytes + BLOCK_SIZE, 32 * MIB);
    assert!(outcome.calls > 1, "{outcome:?}");
    let lazy = reclaimer.lazy.snapshot();
    assert_eq!((lazy.lazy_bytes, lazy.unmapped_bytes), (BLOCK_SIZE, 0));
    let invalidated = reclaimer.invalidate(order(u64::MAX, Reach::Fragments));
    assert_eq!(invalidated.bytes, 0, "its first block is refused again");
    let stats = reclaimer.snapshot();
    assert_eq!(stats.discard_failures_total, outcome.failures);
    assert_eq!(stats.invalidate_failures_total, 1);
}

#[test]
fn scattered_ranges_go_in_slices_and_unmapped_ones_first() {
    let pages = Arc::new(RefusesFirstPage::default());
    let tuning = ReclaimTuning {
        slice: 20,
        ..ReclaimTuning::default()
    };
    let reclaimer = over(Arc::clone(&pages) as _, 1, tuning);
    let scattered = |index: u64| range(index * MIB, index * MIB + (64 << 10));
    let ranges: Vec<_> = (1..101).map(scattered).collect();
    reclaimer.lazy.free(&ranges);
    let limited = order(30 * (64 << 10), Reach::Fragments);
    assert_eq!(reclaimer.invalidate(limited).bytes, 30 * (64 << 10));
    assert_eq!(reclaimer.lazy.snapshot().unmapped_bytes, 30 * (64 << 10));
    assert_eq!(
        reclaimer.discard(order(u64::MAX, Reach::Blocks)).bytes,
        30 * (64 << 10)
    );
    assert_eq!(reclaimer.reclaim(u64::MAX).bytes, 70 * (64 << 10));
    let stats = reclaimer.snapshot();
    assert_eq!(
        (stats.slice_ranges_total, stats.open_slices_total),
        (130, 0)
    );
    assert!(stats.held_slices_total >= 2 + 2 + 4, "{stats:?}");
    assert_eq!(
        reclaimer.gate.stats().closings_total,
        stats.held_slices_total
    );
    assert_eq!(pages.0.lock().unwrap()[30].1, Release::Discard);
}

#[test]
fn a_vcpu_that_will_not_come_out_costs_interrupts_but_not_progress() {
    let tuning = ReclaimTuning {
        pause: Duration::from_micros(50),
        ..ReclaimTuning::default()
    };
    let reclaimer = over(Arc::new(RefusesFirstPage::default()), 1, tuning);
    let ranges: Vec<_> = (1..9)
        .map(|i| range(i * MIB, i * MIB + PAGE_SIZE))
        .collect();
    reclaimer.lazy.free(&ranges);
    let inside = reclaimer.gate.enter(0);
    let outcome = reclaimer.invalidate(order(u64::MAX, Reach::Fragments));
    assert_eq!(outcome.bytes, 8 * PAGE_SIZE);
    let stats = reclaimer.snapshot();
    assert_eq!((stats.held_slices_total, stats.open_slices_total), (0, 1));
    assert_eq!(reclaimer.gate.stats().missed_total, u64::from(MAX_MISSES));
    let discard = |reach| reclaimer.discard(order(u64::MAX, reach)).bytes;
    assert_eq!(discard(Reach::Blocks), 0, "it may still have translations");
    drop(inside);
    assert_eq!(discard(Reach::Blocks), 8 * PAGE_SIZE);
}

#[test]
fn a_vcpu_that_never_comes_out_is_not_kicked_for_each_slice() {
    let tuning = ReclaimTuning {
        pause: Duration::from_micros(10),
        ..ReclaimTuning::default()
    };
    let reclaimer = over(Arc::new(RefusesFirstPage::default()), 1, tuning);
    let inside = reclaimer.gate.enter(0);
    let one_slice = || {
        reclaimer.lazy.free(&[range(MIB, MIB + PAGE_SIZE)]);
        assert_eq!(reclaimer.reclaim(u64::MAX).bytes, PAGE_SIZE);
        reclaimer.lazy.reset();
        reclaimer.gate.stats().missed_total
    };
    // The first order misses three times, those numbered 2, 4, 8, 16, 32 and 64 once each.
    let missed: [u64; 100] = std::array::from_fn(|_| one_slice());
    assert_eq!((missed[0], missed[1], missed[99]), (3, 4, 9));
    drop(inside);
    while reclaimer.snapshot().held_slices_total == 0 {
        one_slice();
    }
    let inside = reclaimer.gate.enter(0);
    assert_eq!(one_slice(), 9 + 3, "a success starts over");
    drop(inside);
}

#[test]
fn a_vcpu_that_exits_runs_offered_slices() {
    let tuning = ReclaimTuning {
        pause: Duration::from_millis(10),
        slice: 1,
        share: 50,
        ..ReclaimTuning::default()
    };
    let reclaimer = over(Arc::new(RefusesFirstPage::default()), 1, tuning);
    let done = AtomicBool::new(false);
    let vcpu = || {
        while !done.load(Ordering::Relaxed) {
            reclaimer.before_entry();
            let inside = reclaimer.gate.enter(0);
            std::thread::sleep(Duration::from_micros(200));
            drop(inside);
        }
    };
    let taken = || reclaimer.snapshot().passing_slices_total;
    std::thread::scope(|scope| {
        scope.spawn(vcpu);
        let deadline = Instant::now() + Duration::from_secs(20);
        while taken() == 0 && Instant::now() < deadline {
            let pages = (1..9).map(|i| range(i * MIB, i * MIB + PAGE_SIZE));
            reclaimer.lazy.free(&pages.collect::<Vec<_>>());
            assert_eq!(reclaimer.reclaim(u64::MAX).bytes, 8 * PAGE_SIZE);
            reclaimer.lazy.reset();
        }
        done.store(true, Ordering::Relaxed);
    });
    let stats = reclaimer.snapshot();
    assert!(stats.passing_slices_total > 0, "{stats:?}");
    assert!(stats.held_slices_total >= stats.passing_slices_total);
}

#[test]
fn by_age_what_cannot_be_marked_free_is_discarded() {
    for shared in [true, false] {
        let backing = Backing {
            shared,
            ..Backing::default()
        };
        let ram = GuestRam::allocate(backing, &[range(0, 32 * MIB)]).unwrap();
        ram.populate(range(0, 32 * MIB)).unwrap();
        let reclaimer = over(Arc::new(ram), 1, ReclaimTuning::default());
        reclaimer.lazy.free(&[range(MIB, 8 * MIB)]);
        let aged = Order {
            newest: reclaimer.lazy.generation(),
            ..order(u64::MAX, Reach::Fragments)
        };
        reclaimer.lazy.free(&[range(16 * MIB, 20 * MIB)]);
        assert_eq!(reclaimer.invalidate(aged).bytes, 7 * MIB);
        let stats = reclaimer.lazy.snapshot();
        let gone = (stats.unmapped_bytes, stats.discarded_bytes);
        let (marked, discarded) = ((7 * MIB, 0), (0, 7 * MIB));
        assert_eq!(gone, if shared { discarded } else { marked });
        assert_eq!(stats.lazy_bytes, 4 * MIB, "it is too young");
        let ahead = reclaimer
            .invalidate(order(u64::MAX, Reach::Fragments))
            .bytes;
        assert_eq!(ahead, if shared { 0 } else { 4 * MIB });
    }
}

#[test]
fn eager_discards_are_counted_and_not_tracked() {
    let reclaimer = reclaimer(4);
    let outcome = reclaimer.discard_now(&[range(0, MIB), range(3 * MIB, 5 * MIB)]);
    assert_eq!((outcome.bytes, outcome.failures), (MIB, 1));
    let stats = reclaimer.snapshot();
    assert_eq!(
        (stats.eager_bytes_total, stats.discard_failures_total),
        (MIB, 1)
    );
    assert_eq!(reclaimer.lazy.snapshot().ranges, 0);
}
