//! The tracker of lazily free memory, by the size of the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebb_core::generation::VmGeneration;
use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

use super::Arguments;
use crate::BenchError;
use crate::results::{Results, median};

const GIB: u64 = 1 << 30;
const MIB: f64 = (1 << 20) as f64;

/// Every other page of this many bytes is reused: 16 million pages at 128 GiB.
const MAX_REUSED: u64 = 128 * GIB;

/// GiB of the guests whose tracker is measured.
const SIZES: [u64; 4] = [1, 64, 1024, 4096];

/// What one step of an operation does under the tracker's lock at most.
const STEP: u64 = 128 << 20;

/// Descriptors of the largest batch of a guest.
const BATCH: usize = 1023;

/// vCPUs that call without end while an order is carried out.
const CALLERS: usize = 4;

/// Adds what the tracker costs.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<(), BenchError> {
    let mut given_up = 0;
    for round in 0..arguments.runs {
        for (case, gib) in [("1 GiB", 1), ("all", arguments.gib)] {
            given_up = given_up.max(reuse(case, gib * GIB, results));
        }
        for gib in SIZES.into_iter().filter(|&gib| gib <= 4 * arguments.gib) {
            size(gib, results);
        }
        steps(results);
        delays(results);
        eprintln!("round {} of {}", round + 1, arguments.runs);
    }
    results.lower("given_up_bytes", given_up as f64);
    let [large, small] = ["all", "1 GiB"].map(|case| results.median("tracker", case, "reuse"));
    if let (Some(large), Some(small)) = (large, small) {
        results.lower("op_slowdown", large / small);
    }
    for (name, case, metric) in [
        ("book_mib", "all", "memory"),
        ("lock_us", "a step", "lock held"),
        ("order_ms", "4 vCPUs call", "order"),
    ] {
        if let Some(value) = results.median("tracker", case, metric) {
            results.lower(name, value);
        }
    }
    Ok(())
}

/// Frees a whole guest, and reuses every other page. Returns the number of bytes that the tracker has lost.
fn reuse(case: &str, size: u64, results: &mut Results) -> u64 {
    let lazy = freed(size);
    let pages = size.min(MAX_REUSED) / PAGE_SIZE / 2;
    let start = Instant::now();
    for page in 0..pages {
        lazy.reuse(&[page_at(2 * page)]);
    }
    let time = start.elapsed().as_nanos() as f64 / pages as f64;
    results.add(("tracker", case), ("reuse", "ns"), time);
    let stats = lazy.snapshot();
    let memory = stats.tracker_bytes as f64 / MIB;
    results.add(("tracker", case), ("memory", "MiB"), memory);
    let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
    size - pages * PAGE_SIZE - tracked
}

/// Memory of the tracker, and the time of a sweep that finds nothing, with each block whole and with each block split.
fn size(gib: u64, results: &mut Results) {
    let case = format!("{gib} GiB");
    let lazy = freed(gib * GIB);
    let mut add = |metric, lazy: &LazyMemory| {
        let [memory, time] = metric;
        let bytes = lazy.snapshot().tracker_bytes as f64;
        results.add(("tracker", &case), (memory, "MiB"), bytes / MIB);
        let start = Instant::now();
        lazy.peek(&mut Sweep::unmapped(Pieces::Any, u64::MAX), u64::MAX);
        let elapsed = start.elapsed().as_secs_f64() * 1e3;
        results.add(("tracker", &case), (time, "ms"), elapsed);
    };
    add(["memory, whole blocks", "sweep, whole blocks"], &lazy);
    for block in 0..gib * GIB / BLOCK_SIZE {
        lazy.reuse(&[page_at(block * (BLOCK_SIZE / PAGE_SIZE))]);
    }
    add(["memory, split blocks", "sweep, split blocks"], &lazy);
}

/// The longest time that one step holds the tracker's lock, over the calls that cost most. Each call here is one step. A
/// call that the host interrupts takes longer, so this is the median of each call.
fn steps(results: &mut Results) {
    const ROUNDS: usize = 200;
    let step = range(0, STEP);
    let lazy = worst();
    let free = || lazy.free(&[step]);
    let look = || lazy.peek(&mut Sweep::unmapped(Pieces::Any, u64::MAX), u64::MAX);
    let survey = || lazy.survey(step);
    let mut slowest = times(ROUNDS, free).max(times(ROUNDS, look));
    slowest = slowest.max(times(ROUNDS, survey));
    // What a change splits and joins: all blocks of a step, made and dropped maps included.
    let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
    let (mut split, mut joined) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS / 20 {
        lazy.free(&[step]);
        for page in 0..STEP / PAGE_SIZE / 2 {
            lazy.reuse(&[page_at(2 * page)]);
        }
        joined.push(micros(|| lazy.free(&[step])));
        for page in 0..STEP / PAGE_SIZE / 2 {
            lazy.reuse(&[page_at(2 * page)]);
        }
        joined.push(micros(|| lazy.reuse(&[step])));
        lazy.free(&[step]);
        split.push(micros(|| lazy.reuse(&[page_at(1)])));
        lazy.reset();
    }
    for times in [split, joined] {
        slowest = slowest.max(median(&times).unwrap_or(0.0));
    }
    results.add(("tracker", "a step"), ("lock held", "us"), slowest);
}

/// The longest time that an order for 1 GiB takes while vCPUs do nothing but the call that costs most. The order finds its
/// chunks and lets each go: so all of the time is the tracker's, and the host's scheduler's.
fn delays(results: &mut Results) {
    let lazy = worst();
    let batch = vec![range(0, STEP); BATCH];
    // What the order takes is behind what the vCPUs name.
    lazy.free(&[range(GIB, 2 * GIB)]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    lazy.free(&batch);
                }
            });
        }
        thread::sleep(Duration::from_millis(100));
        let order = || {
            let mut sweep = Sweep::new(Pieces::Blocks, u64::MAX).within(range(GIB, 2 * GIB));
            while let Some(chunk) = lazy.take_chunk(&mut sweep, 16 << 20) {
                drop(chunk);
            }
        };
        let longest = (0..50).map(|_| micros(order) / 1e3).fold(0.0, f64::max);
        done.store(true, Ordering::Relaxed);
        results.add(("tracker", "4 vCPUs call"), ("order", "ms"), longest);
    });
}

/// A tracker of one step's memory, each block of which is split: every other page is discarded, the others are lazy. To
/// free all of it takes long and changes nothing.
fn worst() -> LazyMemory {
    let lazy = freed(STEP);
    let mut sweep = Sweep::new(Pieces::Any, u64::MAX);
    while let Some(chunk) = lazy.take_chunk(&mut sweep, PAGE_SIZE) {
        if (chunk.range().start() / PAGE_SIZE).is_multiple_of(2) {
            chunk.discarded();
        }
    }
    lazy
}

/// A tracker of `size` bytes that are all lazily free.
fn freed(size: u64) -> LazyMemory {
    let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
    lazy.free(&[range(0, size)]);
    lazy
}

/// The median time of `call`, in microseconds.
fn times<T>(rounds: usize, call: impl Fn() -> T) -> f64 {
    let times: Vec<f64> = (0..rounds).map(|_| micros(&call)).collect();
    median(&times).unwrap_or(0.0)
}

fn micros<T>(call: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    std::hint::black_box(call());
    start.elapsed().as_secs_f64() * 1e6
}

fn page_at(index: u64) -> GpaRange {
    range(index * PAGE_SIZE, (index + 1) * PAGE_SIZE)
}

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).expect("a range of whole pages")
}
