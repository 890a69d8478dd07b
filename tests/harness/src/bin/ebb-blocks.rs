//! A program that knows nothing of Ebb: threads that allocate, check and free blocks.
//!
//! `ebb-blocks THREADS ROUNDS`. Each block holds its own number; zeroed ones are checked to be zero. Prints what it did; a wrong
//! byte ends it with an error.

use std::sync::atomic::{AtomicU64, Ordering};
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

/// Does as many rounds; all blocks are right at the end.
fn work(thread: u64, rounds: usize) {
    let mut random = Random(thread * 2 + 0x9E37_79B9);
    let mut blocks = Vec::new();
    for _ in 0..rounds {
        churn(&mut blocks, &mut random);
    }
    blocks.iter().for_each(Block::check);
}

fn main() {
    let words: Vec<usize> = std::env::args()
        .skip(1)
        .map(|word| word.parse().expect("a number"))
        .collect();
    let &[threads, rounds] = words.as_slice() else {
        panic!("ebb-blocks THREADS ROUNDS");
    };
    thread::scope(|scope| {
        for thread in 0..threads as u64 {
            scope.spawn(move || work(thread, rounds));
        }
    });
    println!("blocks: {rounds} rounds of {threads} threads");
}
