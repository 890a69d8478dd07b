//! A program that allocates, touches and frees, and counts what its kernel had to do: the subject of `ebb-bench malloc`.
//!
//! `ebb-churn THREADS SECONDS` prints `churn: ops=N seconds=S shootdowns=N faults=N`. An operation is a block allocated, a byte
//! written to each of its pages, and an older one freed. Shootdowns are function call and TLB interrupts of all processors;
//! faults are page faults of this process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Sizes of blocks, in bytes.
const SIZES: [usize; 5] = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20];
/// Blocks that a thread holds.
const HELD: usize = 16;
const PAGE: usize = 4096;

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) as usize % bound
    }
}

fn churn(seed: u64, done: &AtomicBool) -> u64 {
    let (mut random, mut operations) = (Random(seed), 0);
    let mut blocks: Vec<Vec<u8>> = (0..HELD).map(|_| Vec::new()).collect();
    while !done.load(Ordering::Relaxed) {
        let size = SIZES[random.below(SIZES.len())];
        let mut block: Vec<u8> = Vec::with_capacity(size);
        for page in block.spare_capacity_mut().chunks_mut(PAGE) {
            page[0].write(operations as u8);
        }
        // The older block is freed here.
        blocks[random.below(HELD)] = std::hint::black_box(block);
        operations += 1;
    }
    operations
}

/// The sum of the lines CAL and TLB of /proc/interrupts.
fn shootdowns() -> u64 {
    let text = std::fs::read_to_string("/proc/interrupts").expect("/proc/interrupts");
    let lines = text.lines().map(str::trim_start);
    lines
        .filter(|line| line.starts_with("CAL:") || line.starts_with("TLB:"))
        .flat_map(|line| line.split_whitespace().skip(1))
        .map_while(|word| word.parse::<u64>().ok().or(Some(0)))
        .sum()
}

/// Minor faults, the tenth word of /proc/self/stat.
fn faults() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("/proc/self/stat");
    let (_, behind_name) = text.rsplit_once(')').expect("a name in parentheses");
    let word = behind_name.split_whitespace().nth(7);
    word.and_then(|word| word.parse().ok()).expect("a number")
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [threads, seconds] = words.as_slice() else {
        panic!("ebb-churn THREADS SECONDS");
    };
    let threads: u64 = threads.parse().expect("a number of threads");
    let seconds: f64 = seconds.parse().expect("a number of seconds");
    let done = AtomicBool::new(false);
    let (start, before, faults_before) = (Instant::now(), shootdowns(), faults());
    let operations: u64 = thread::scope(|scope| {
        let done = &done;
        let workers: Vec<_> = (1..=threads)
            .map(|seed| scope.spawn(move || churn(seed, done)))
            .collect();
        thread::sleep(Duration::from_secs_f64(seconds));
        done.store(true, Ordering::Relaxed);
        let done = workers.into_iter().map(|worker| worker.join());
        done.map(|count| count.expect("a thread")).sum()
    });
    println!(
        "churn: ops={operations} seconds={:.3} shootdowns={} faults={}",
        start.elapsed().as_secs_f64(),
        shootdowns() - before,
        faults() - faults_before
    );
}
