//! A program that knows nothing of Ebb: threads that allocate, check and free blocks, and children that inherit them.
//!
//! `ebb-blocks THREADS ROUNDS FORKS`. Each block holds its own number; zeroed ones are checked to be zero; every child checks
//! what it has inherited, writes to all of it, and uses its heap. Prints what it did; a wrong byte ends it with an error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// Sizes, in bytes, from a few to more than a granule.
const SIZES: [usize; 8] = [
    24,
    200,
    3000,
    16 << 10,
    100 << 10,
    700 << 10,
    2 << 20,
    5 << 20,
];
/// Blocks that a thread holds.
const HELD: usize = 24;

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

/// Words of a number, beginning with it.
struct Block {
    number: u64,
    words: Vec<u64>,
}

static NUMBERS: AtomicU64 = AtomicU64::new(1);

impl Block {
    fn new(random: &mut Random) -> Self {
        let bytes = SIZES[random.below(SIZES.len())];
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let mut words = if random.below(2) == 0 {
            let zeroed = vec![0_u64; bytes / 8];
            assert!(
                zeroed.iter().all(|word| *word == 0),
                "calloc of {bytes} is not zero"
            );
            zeroed
        } else {
            Vec::with_capacity(bytes / 8)
        };
        words.clear();
        words.resize(bytes / 8, number);
        Self { number, words }
    }

    fn check(&self) {
        let wrong = self
            .words
            .iter()
            .filter(|word| **word != self.number)
            .count();
        assert_eq!(
            wrong,
            0,
            "words of block {}, {} long",
            self.number,
            self.words.len()
        );
    }
}

fn churn(blocks: &mut Vec<Block>, random: &mut Random) {
    match random.below(3) {
        0 if blocks.len() < HELD => blocks.push(Block::new(random)),
        1 if !blocks.is_empty() => {
            let at = random.below(blocks.len());
            let block = &mut blocks[at];
            block.check();
            block.words.resize(block.words.len() + 1000, block.number);
        }
        _ if !blocks.is_empty() => blocks.swap_remove(random.below(blocks.len())).check(),
        _ => blocks.push(Block::new(random)),
    }
}

/// Two numbers, far apart, that are equal whenever their lock is free.
struct Pair {
    numbers: [Vec<AtomicU64>; 2],
    lock: Vec<AtomicU64>,
}

impl Pair {
    fn new() -> Self {
        let apart = || (0..1 << 17).map(|_| AtomicU64::new(0)).collect();
        Self {
            numbers: [apart(), apart()],
            lock: apart(),
        }
    }

    /// As another thread than the one that forks.
    fn count_until(&self, done: &AtomicBool) {
        while !done.load(Ordering::Relaxed) {
            self.lock[0].store(1, Ordering::SeqCst);
            for number in &self.numbers {
                number[0].fetch_add(1, Ordering::SeqCst);
            }
            self.lock[0].store(0, Ordering::SeqCst);
            std::hint::spin_loop();
        }
    }

    /// In a child: the fork was a cut, so a free lock means equal numbers.
    fn check(&self) {
        let [one, other] = [0, 1].map(|at| self.numbers[at][0].load(Ordering::SeqCst));
        let free = self.lock[0].load(Ordering::SeqCst) == 0;
        assert!(
            !free || one == other,
            "{one} is not {other}, and no thread had the lock"
        );
    }
}

/// Lets the threads end when this one does, by a panic, too.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// In a child: all that was inherited is as it was, can be written, and the heap works.
fn child(blocks: &mut Vec<Block>, random: &mut Random, pair: &Pair) {
    pair.check();
    for block in blocks.iter_mut() {
        block.check();
        block.words.fill(!block.number);
    }
    blocks.clear();
    for _ in 0..200 {
        churn(blocks, random);
    }
}

/// Forks and waits; how the child ended.
fn fork(blocks: &mut Vec<Block>, random: &mut Random, pair: &Pair) -> i32 {
    // SAFETY: the child touches only what this thread has, and ends without running anything else.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        child(blocks, random, pair);
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status
}

fn main() {
    let words: Vec<usize> = std::env::args()
        .skip(1)
        .map(|word| word.parse().expect("a number"))
        .collect();
    let &[threads, rounds, forks] = words.as_slice() else {
        panic!("ebb-blocks THREADS ROUNDS FORKS");
    };
    let done = AtomicBool::new(false);
    let pair = Pair::new();
    let churned: usize = thread::scope(|scope| {
        let (done, pair) = (&done, &pair);
        let _end = End(done);
        scope.spawn(|| pair.count_until(done));
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mut random = Random(thread as u64 * 2 + 0x9E37_79B9);
                    let mut blocks = Vec::new();
                    let mut turns = 0;
                    while turns < rounds || !done.load(Ordering::Relaxed) {
                        churn(&mut blocks, &mut random);
                        turns += 1;
                    }
                    blocks.iter().for_each(Block::check);
                    turns
                })
            })
            .collect();
        let mut random = Random(77);
        let mut blocks = Vec::new();
        for _ in 0..forks {
            for _ in 0..50 {
                churn(&mut blocks, &mut random);
            }
            assert_eq!(fork(&mut blocks, &mut random, pair), 0, "how a child ended");
            blocks.iter().for_each(Block::check);
        }
        done.store(true, Ordering::Relaxed);
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a thread"))
            .sum()
    });
    println!("blocks: {churned} turns, {forks} children");
}
