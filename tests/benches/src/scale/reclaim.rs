//! Reclaim: how soon an urgent order and the stop are heard, how long a chunk takes, and what huge pages keep resident.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebb_core::generation::{Gate, NoKick, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages};
use ebb_harness::error::{Context, Result};
use ebb_vmm::memory::{Backing, GuestRam};
use ebb_vmm::reclaim::{EntryHook, Order, Reach, ReclaimTuning, Reclaimer};

use super::Arguments;
use crate::BenchError;
use crate::results::Results;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Fragments of the order in the background.
const FRAGMENTS: u64 = 10_000;

/// Bytes of the urgent order.
const URGENT: u64 = 32 * MIB;

/// How long the guest runs between two exits.
const IN_GUEST: Duration = Duration::from_micros(50);

/// Measures all.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<(), BenchError> {
    let mut late = 0.0f64;
    for round in 0..arguments.runs {
        let urgent = urgent()?;
        results.add(("reclaim", "beside fragments"), ("urgent", "ms"), urgent);
        for (case, fragments) in [("blocks", false), ("fragments", true)] {
            let stop = stop(fragments)?;
            results.add(("reclaim", case), ("stop", "ms"), stop);
        }
        late = late.max(chunks(results)?);
        let least = least_chunk()?;
        results.add(("madvise", "a block of small pages"), ("p99", "us"), least);
        let resident = resident()?;
        results.add(
            ("reclaim", "a page of each huge page"),
            ("resident / in use", ""),
            resident,
        );
        eprintln!("round {} of {}", round + 1, arguments.runs);
    }
    let worst = |case, metric| {
        let samples = results.of("reclaim", case, metric);
        samples.iter().copied().fold(0.0, f64::max)
    };
    let resident = worst("a page of each huge page", "resident / in use");
    let urgent = worst("beside fragments", "urgent");
    let stop = worst("blocks", "stop").max(worst("fragments", "stop"));
    results.lower("urgent_ms", urgent);
    results.lower("stop_ms", stop);
    results.lower("chunk_p99_us", late);
    results.lower("thp_rss", resident);
    Ok(())
}

/// A machine with one vCPU, which does nothing but exit and enter.
struct Machine {
    ram: Arc<GuestRam>,
    lazy: Arc<LazyMemory>,
    gate: Arc<Gate>,
    reclaimer: Reclaimer,
}

impl Machine {
    fn new(size: u64, thp: bool) -> Result<Self> {
        let backing = Backing {
            thp,
            ..Backing::default()
        };
        let ram = GuestRam::allocate(backing, &[range(0, size)]).context("guest memory")?;
        let ram = Arc::new(ram);
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::new(1, Arc::clone(&generation), Box::new(NoKick)));
        let lazy = Arc::new(LazyMemory::with_huge_pages(generation));
        let pages = Arc::clone(&ram) as _;
        let tuning = ReclaimTuning::default();
        let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, Arc::clone(&gate), tuning);
        Ok(Self {
            ram,
            lazy,
            gate,
            reclaimer,
        })
    }

    fn populate(&self, range: GpaRange) -> Result<()> {
        self.ram.populate(range).context("guest memory")
    }

    /// Runs `test` beside the vCPU.
    fn beside_vcpu<T>(&self, test: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    self.reclaimer.before_entry();
                    let inside = self.gate.enter(0);
                    let start = Instant::now();
                    while start.elapsed() < IN_GUEST {
                        std::hint::spin_loop();
                    }
                    drop(inside);
                }
            });
            let result = test();
            done.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Takes everything in the background.
    fn take_all(&self) {
        self.reclaimer.discard(Order {
            bytes: u64::MAX,
            reach: Reach::Fragments,
            newest: u64::MAX,
            urgent: false,
        });
    }

    /// Every other page of the first 80 MiB is lazy.
    fn free_fragments(&self) -> Result<()> {
        let all = range(0, 2 * FRAGMENTS * PAGE_SIZE);
        self.populate(all)?;
        let page = |index| range(2 * index * PAGE_SIZE, (2 * index + 1) * PAGE_SIZE);
        self.lazy
            .free(&(0..FRAGMENTS).map(page).collect::<Vec<_>>());
        Ok(())
    }

    fn has_begun(&self) -> bool {
        let stats = self.lazy.snapshot();
        stats.discarded_bytes + stats.reclaiming_bytes > 0
    }
}

/// An urgent order of whole blocks while fragments are taken. Returns its time in ms.
fn urgent() -> Result<f64> {
    let machine = Machine::new(GIB, false)?;
    machine.free_fragments()?;
    machine.beside_vcpu(|| {
        thread::scope(|scope| {
            scope.spawn(|| machine.take_all());
            wait_until(|| machine.has_begun());
            let blocks = range(512 * MIB, 512 * MIB + URGENT);
            machine.populate(blocks)?;
            machine.lazy.free(&[blocks]);
            let start = Instant::now();
            let taken = machine.reclaimer.reclaim(URGENT).bytes;
            let time = milliseconds(start.elapsed());
            machine.reclaimer.stop();
            (taken == URGENT)
                .then_some(time)
                .context("the urgent order took less")
        })
    })
}

/// A stop while blocks or fragments are taken. Returns the time in ms until the reclaim has ended.
fn stop(fragments: bool) -> Result<f64> {
    let machine = Machine::new(2 * GIB, false)?;
    if fragments {
        machine.free_fragments()?;
    } else {
        let all = range(0, 2 * GIB);
        machine.populate(all)?;
        machine.lazy.free(&[all]);
    }
    let time = machine.beside_vcpu(|| {
        thread::scope(|scope| {
            let reclaim = scope.spawn(|| machine.take_all());
            wait_until(|| machine.has_begun());
            let start = Instant::now();
            machine.reclaimer.stop();
            let ended = reclaim.join().is_ok();
            ended.then(|| milliseconds(start.elapsed()))
        })
    });
    let left = machine.lazy.snapshot().lazy_bytes;
    let time = time.context("the reclaim has panicked")?;
    (left > 0).then_some(time).context("the stop came too late")
}

/// Untouched memory, then as much in small pages, several times. Returns the time in microseconds below which 99 % of the
/// chunks are, rounded up to a power of two.
fn chunks(results: &mut Results) -> Result<f64> {
    let machine = Machine::new(2 * GIB, false)?;
    for _ in 0..3 {
        let (untouched, populated) = (range(0, GIB), range(GIB, 2 * GIB));
        machine.populate(populated)?;
        machine.lazy.free(&[untouched, populated]);
        machine.reclaimer.reclaim(u64::MAX);
        machine.lazy.reuse(&[range(0, 2 * GIB)]);
    }
    let histogram = machine.reclaimer.snapshot().chunks;
    let all: u64 = histogram.iter().sum();
    let mut seen = 0;
    let bucket = histogram.iter().position(|count| {
        seen += count;
        seen * 100 >= all * 99
    });
    let bound = 2f64.powi(bucket.context("no chunks")? as i32);
    results.add(
        ("reclaim", "untouched, then small pages"),
        ("chunk p99 below", "us"),
        bound,
    );
    Ok(bound)
}

/// What the least chunk takes that there could be, one block, on this host and with what else it does now. Returns the time
/// in microseconds below which 99 % are.
fn least_chunk() -> Result<f64> {
    let machine = Machine::new(GIB, false)?;
    machine.populate(range(0, GIB))?;
    let mut times = Vec::new();
    for at in (0..GIB).step_by(BLOCK_SIZE as usize) {
        let start = Instant::now();
        let released = machine
            .ram
            .release_range(range(at, at + BLOCK_SIZE), Release::Discard);
        times.push(start.elapsed());
        released.context("madvise")?;
    }
    times.sort_unstable();
    Ok(milliseconds(times[times.len() * 99 / 100]) * 1e3)
}

/// 1 GiB in huge pages is freed and discarded, and the guest takes one page of each block back, with which the host brings
/// back the block. Returns what is resident after a reclaim of everything, in parts of what is in use.
fn resident() -> Result<f64> {
    let machine = Machine::new(GIB, true)?;
    let all = range(0, GIB);
    machine.populate(all)?;
    machine.lazy.free(&[all]);
    machine.reclaimer.reclaim(u64::MAX);
    let blocks = (0..GIB).step_by(BLOCK_SIZE as usize);
    let pages: Vec<GpaRange> = blocks.map(|at| range(at, at + PAGE_SIZE)).collect();
    machine.lazy.reuse(&pages);
    for page in &pages {
        machine.populate(*page)?;
    }
    machine.reclaimer.reclaim(u64::MAX);
    let held = machine.ram.held(all).context("what the host holds")?;
    Ok(held as f64 / (pages.len() as u64 * PAGE_SIZE) as f64)
}

fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_micros(50));
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).expect("a range of whole pages")
}
