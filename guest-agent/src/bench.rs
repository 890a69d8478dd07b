//! `ebb-guest bench`: the cost of freeing and reusing a granule, compared with madvise(2) on normal memory.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::instruction_count;
use ebb_guest_agent::arena::{Arena, Granule};
use ebb_guest_agent::memory::{PAGE_SIZE, map_anonymous};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, munmap};

/// Pairs of `lazy_free` and `reuse` that are timed together.
const PAIRS: u32 = 100_000;
/// Pairs before the clock is read again.
const PAIRS_PER_CLOCK_READ: u32 = 1000;
/// Measurements that include touching the memory. The result is their median.
const ROUNDS: usize = 41;

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let result = match *words {
        [device] => measure(Path::new(device)),
        [device, "pairs", seconds] => repeat(Path::new(device), seconds, PAIRS_PER_CLOCK_READ),
        [device, "spin", seconds] => repeat(Path::new(device), seconds, 0),
        _ => {
            eprintln!(
                "usage: ebb-guest bench DEVICE [pairs|spin SECONDS], with a DEVICE such as /dev/dax0.0"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("ebb-guest bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn open(device: &Path) -> Result<Arena, String> {
    Arena::open(device).map_err(|error| error.to_string())
}

/// A granule with all its pages touched.
fn claim(arena: &Arena) -> Result<Granule<'_>, String> {
    let granule = arena.claim();
    let mut granule = granule.ok_or("the arena is full; end a program that uses it")?;
    touch(granule.bytes(), 1);
    Ok(granule)
}

fn measure(device: &Path) -> Result<String, String> {
    let arena = open(device)?;
    let (mut granule, pair_ns, pair_cycles) = time_pairs(claim(&arena)?);
    let mut reused = Vec::new();
    for round in 0..ROUNDS {
        let start = Instant::now();
        granule = granule.lazy_free().reuse().0;
        touch(granule.bytes(), round as u8);
        reused.push(start.elapsed());
    }
    let normal = NormalMemory::new(arena.granule_size());
    let normal = normal.map_err(|error| format!("mmap: {error}"))?;
    let mut discarded = Vec::new();
    for round in 0..ROUNDS {
        let start = Instant::now();
        let done = normal.discard_and_touch(round as u8);
        done.map_err(|error| format!("madvise: {error}"))?;
        discarded.push(start.elapsed());
    }
    let (reused, discarded) = (median(reused), median(discarded));
    let instructions = instruction_count::of_a_pair(device)?;
    Ok(format!(
        "bench: pair_ns={pair_ns:.1} pair_cycles={pair_cycles:.0} pair_instructions={instructions:.1} pair_touch_ns={} dontneed_touch_ns={} \
         pair_vs_dontneed={:.1}",
        reused.as_nanos(),
        discarded.as_nanos(),
        discarded.as_secs_f64() / reused.as_secs_f64(),
    ))
}

/// Makes `pairs` pairs between two readings of the clock, until the time is over.
fn repeat(device: &Path, seconds: &str, pairs: u32) -> Result<String, String> {
    let number = seconds.parse::<f64>().ok();
    let time = number.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let time = time.ok_or_else(|| format!("{seconds} is not a number of seconds"))?;
    let arena = open(device)?;
    let mut granule = claim(&arena)?;
    let (start, mut count) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        for _ in 0..pairs {
            granule = granule.lazy_free().reuse().0;
            count += 1;
        }
    }
    Ok(format!("bench: pairs={count}"))
}

/// Nanoseconds, and cycles of the time stamp counter, of a pair.
fn time_pairs(mut granule: Granule<'_>) -> (Granule<'_>, f64, f64) {
    let (start, cycles) = (Instant::now(), cycles());
    for _ in 0..PAIRS {
        granule = granule.lazy_free().reuse().0;
    }
    let (time, cycles) = (start.elapsed(), self::cycles() - cycles);
    let pairs = f64::from(PAIRS);
    (
        granule,
        time.as_secs_f64() * 1e9 / pairs,
        cycles as f64 / pairs,
    )
}

fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn touch(bytes: &mut [u8], value: u8) {
    for page in bytes.chunks_exact_mut(PAGE_SIZE) {
        std::hint::black_box(page)[0] = value;
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Private anonymous memory.
struct NormalMemory {
    start: *mut u8,
    len: usize,
}

impl NormalMemory {
    fn new(len: usize) -> rustix::io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let start = map_anonymous(len, PAGE_SIZE, prot, MapFlags::PRIVATE)?;
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    fn discard_and_touch(&self, value: u8) -> rustix::io::Result<()> {
        // SAFETY: the whole of our own mapping, to which nobody holds a reference.
        unsafe { madvise(self.start.cast(), self.len, Advice::LinuxDontNeed)? };
        // SAFETY: as long as the mapping, and the only reference to it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start, self.len) };
        touch(bytes, value);
        Ok(())
    }
}

impl Drop for NormalMemory {
    fn drop(&mut self) {
        // SAFETY: our own, and nobody uses it any more. An error only leaks it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}
