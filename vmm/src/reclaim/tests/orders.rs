//! Several orders at once, and the stop: who goes first, and how soon.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use ebb_core::generation::{Gate, NoKick, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages, Released};

use crate::reclaim::{Order, Outcome, Reach, ReclaimTuning, Reclaimer, Until};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).unwrap()
}

/// Memory that releases everything whose size is a multiple of `unit`, and calls `then` with the number of each call.
struct Memory {
    unit: u64,
    calls: AtomicU64,
    then: OnceLock<Box<dyn Fn(u64) + Send + Sync>>,
    /// The lengths of the ranges of all calls.
    lengths: Mutex<Vec<u64>>,
}

impl Memory {
    fn new(unit: u64) -> Arc<Self> {
        Arc::new(Self {
            unit,
            calls: AtomicU64::new(0),
            then: OnceLock::new(),
            lengths: Mutex::default(),
        })
    }
}

impl ReleasePages for Memory {
    fn can_mark_free(&self) -> bool {
        true
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn max_batch(&self) -> usize {
        1
    }

    fn release(&self, ranges: &[GpaRange], _: Release) -> Released {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        self.then.get().inspect(|then| then(call));
        let lengths: Vec<u64> = ranges.iter().map(|range| range.len()).collect();
        self.lengths.lock().unwrap().extend_from_slice(&lengths);
        let whole = |len: &u64| {
            if len.is_multiple_of(self.unit) {
                *len
            } else {
                0
            }
        };
        Released {
            bytes: lengths.iter().map(whole).collect(),
            calls: 1,
            ..Released::default()
        }
    }
}

struct Scene {
    lazy: Arc<LazyMemory>,
    gate: Arc<Gate>,
    memory: Arc<Memory>,
    reclaimer: Arc<Reclaimer>,
}

fn scene(unit: u64) -> Scene {
    let generation = Arc::new(VmGeneration::default());
    let gate = Arc::new(Gate::new(1, Arc::clone(&generation), Box::new(NoKick)));
    let lazy = Arc::new(LazyMemory::new(generation));
    let memory = Memory::new(unit);
    let tuning = ReclaimTuning {
        slice: 1,
        ..ReclaimTuning::default()
    };
    let pages = Arc::clone(&memory) as _;
    let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, Arc::clone(&gate), tuning);
    Scene {
        lazy,
        gate,
        memory,
        reclaimer: Arc::new(reclaimer),
    }
}

impl Scene {
    /// In call number `call` the reclaimer is told to stop.
    fn stop_in_call(&self, call: u64) {
        let reclaimer = Arc::downgrade(&self.reclaimer);
        let stop = move |number| {
            if number == call {
                reclaimer.upgrade().unwrap().stop();
            }
        };
        assert!(self.memory.then.set(Box::new(stop)).is_ok());
    }

    fn in_background(&self) -> Outcome {
        self.reclaimer.discard(Order {
            bytes: u64::MAX,
            reach: Reach::Fragments,
            newest: u64::MAX,
            urgent: false,
        })
    }

    fn free_pages(&self, pages: u64) {
        let page = |index| range(2 * index * PAGE_SIZE, (2 * index + 1) * PAGE_SIZE);
        self.lazy.free(&(0..pages).map(page).collect::<Vec<_>>());
    }
}

#[test]
fn urgent_blocks_go_before_fragments_that_have_begun() {
    let scene = scene(PAGE_SIZE);
    scene.free_pages(100);
    // A vCPU that does not come out: three of four slices miss their pause, and each of those costs a rest of 20 ms.
    let _inside = scene.gate.enter(0);
    thread::scope(|scope| {
        let background = scope.spawn(|| scene.in_background());
        while scene.memory.calls.load(Ordering::Relaxed) == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        scene.lazy.free(&[range(GIB, GIB + 32 * MIB)]);
        let urgent = scene.reclaimer.reclaim(32 * MIB);
        let left = scene.lazy.snapshot().lazy_bytes;
        scene.reclaimer.stop();
        assert_eq!((urgent.bytes, urgent.cut_short), (32 * MIB, false));
        assert!(left > 0, "the fragments went first");
        assert!(background.join().unwrap().cut_short);
    });
}

#[test]
fn the_stop_ends_a_pass_over_blocks_after_the_step_of_each_worker() {
    let scene = scene(PAGE_SIZE);
    scene.lazy.free(&[range(0, 8 * GIB)]);
    scene.stop_in_call(3);
    let outcome = scene.in_background();
    let calls = scene.memory.calls.load(Ordering::Relaxed);
    // Each worker may have been in a step.
    assert!((3..3 + 4).contains(&calls), "{calls} calls");
    assert!(outcome.cut_short && outcome.bytes > 0, "{outcome:?}");
    let after = scene.reclaimer.reclaim(GIB);
    assert_eq!((after.bytes, after.calls, after.cut_short), (0, 0, true));
    assert_eq!(scene.lazy.snapshot().reclaiming_bytes, 0);
}

#[test]
fn an_order_that_must_end_early_says_what_it_has_taken() {
    let scene = scene(PAGE_SIZE);
    scene.lazy.free(&[range(0, 64 * MIB)]);
    let calls = || scene.memory.calls.load(Ordering::Relaxed) >= 3;
    let until = Until {
        deadline: None,
        other: Some(&calls),
    };
    let outcome = scene.reclaimer.reclaim_until(u64::MAX, until);
    assert_eq!((outcome.calls, outcome.cut_short), (3, true));
    let stats = scene.lazy.snapshot();
    assert_eq!(stats.discarded_bytes, outcome.bytes);
    let late = scene
        .reclaimer
        .reclaim_until(PAGE_SIZE, Until::after(Some(Duration::ZERO)));
    assert_eq!((late.bytes, late.cut_short), (0, true));
    let rest = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!((rest.bytes, rest.cut_short), (stats.lazy_bytes, false));
}

#[test]
fn a_chunk_is_never_larger_than_16_mib() {
    let scene = scene(PAGE_SIZE);
    scene.lazy.free(&[range(0, 8 * GIB)]);
    assert_eq!(scene.reclaimer.reclaim(u64::MAX).bytes, 8 * GIB);
    let largest = scene.memory.lengths.lock().unwrap().iter().max().copied();
    assert!(largest <= Some(16 * MIB), "{largest:?}");
    let chunks: u64 = scene.reclaimer.snapshot().chunks.iter().sum();
    assert_eq!(chunks, scene.memory.calls.load(Ordering::Relaxed));
}

#[test]
fn the_gate_is_not_closed_for_pieces_that_the_host_would_keep() {
    let scene = scene(BLOCK_SIZE);
    scene.free_pages(50);
    scene.lazy.free(&[range(GIB, GIB + 3 * MIB)]);
    assert_eq!(scene.in_background().bytes, BLOCK_SIZE);
    assert_eq!(scene.reclaimer.reclaim(MIB).bytes, 0);
    assert_eq!(scene.gate.stats().closings_total, 0);
    assert_eq!(scene.memory.calls.load(Ordering::Relaxed), 1);
}
