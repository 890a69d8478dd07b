//! `ebb-guest bench`: what freeing and taking back a granule costs, beside what it costs without an arena.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::steps;
use ebb_guest_agent::arena::{Arena, Granule};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes between two touches.
const PAGE: usize = 4096;
/// Pairs that are timed together.
const PAIRS: u32 = 100_000;
/// Pairs between two looks at the clock.
const BETWEEN_LOOKS: u32 = 1000;
/// Blocks that are timed one by one; the median counts.
const ROUNDS: usize = 41;

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let result = match *words {
        [device] => measure(Path::new(device)),
        [device, "pairs", seconds] => repeat(Path::new(device), seconds, true),
        [device, "spin", seconds] => repeat(Path::new(device), seconds, false),
        _ => {
            eprintln!(
                "bench takes a device, for instance /dev/dax0.0, and perhaps pairs or spin, and seconds"
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

fn measure(device: &Path) -> Result<String, String> {
    let arena = Arena::open(device).map_err(|error| error.to_string())?;
    let mut granule = arena.claim().ok_or("the arena is full; end who uses it")?;
    touch(granule.bytes(), 1);
    let size = granule.bytes().len();
    let (mut granule, pair_ns, pair_cycles) = pairs(granule);
    let mut touched = Vec::new();
    for round in 0..ROUNDS {
        let start = Instant::now();
        granule = granule.lazy_free().reuse().0;
        touch(granule.bytes(), round as u8);
        touched.push(start.elapsed());
    }
    let plain = Plain::new(size).map_err(|error| format!("mmap: {error}"))?;
    let mut dropped = Vec::new();
    for round in 0..ROUNDS {
        let start = Instant::now();
        plain
            .drop_and_touch(round as u8)
            .map_err(|error| format!("madvise: {error}"))?;
        dropped.push(start.elapsed());
    }
    let (touched, dropped) = (median(touched), median(dropped));
    let instructions = steps::of_a_pair(device)?;
    Ok(format!(
        "bench: pair_ns={pair_ns:.1} pair_cycles={pair_cycles:.0} pair_instructions={instructions:.1} pair_touch_ns={} dontneed_touch_ns={} \
         pair_vs_dontneed={:.1}",
        touched.as_nanos(),
        dropped.as_nanos(),
        dropped.as_secs_f64() / touched.as_secs_f64(),
    ))
}

/// Frees and reuses a granule for so long, or else only looks at the clock as often.
fn repeat(device: &Path, seconds: &str, pairs: bool) -> Result<String, String> {
    let number = seconds.parse::<f64>().ok();
    let time = number.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let time = time.ok_or_else(|| format!("{seconds} is no number of seconds"))?;
    let arena = Arena::open(device).map_err(|error| error.to_string())?;
    let mut granule = arena.claim().ok_or("the arena is full; end who uses it")?;
    touch(granule.bytes(), 1);
    let (start, mut count) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        for _ in 0..if pairs { BETWEEN_LOOKS } else { 0 } {
            granule = granule.lazy_free().reuse().0;
            count += 1;
        }
    }
    Ok(format!("bench: pairs={count}"))
}

/// Nanoseconds, and cycles of the time stamp counter, of one `lazy_free` and `reuse`.
fn pairs(mut granule: Granule<'_>) -> (Granule<'_>, f64, f64) {
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
    for page in bytes.chunks_exact_mut(PAGE) {
        std::hint::black_box(page)[0] = value;
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// As much memory of the process's own.
struct Plain {
    start: *mut u8,
    len: usize,
}

impl Plain {
    fn new(len: usize) -> rustix::io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE)? };
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    fn drop_and_touch(&self, value: u8) -> rustix::io::Result<()> {
        // SAFETY: the whole of a mapping of our own, of which nobody holds a reference.
        unsafe { madvise(self.start.cast(), self.len, Advice::LinuxDontNeed)? };
        // SAFETY: as long as the mapping, and the only reference to it.
        touch(
            unsafe { std::slice::from_raw_parts_mut(self.start, self.len) },
            value,
        );
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody uses it any more. A failure leaks it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}
