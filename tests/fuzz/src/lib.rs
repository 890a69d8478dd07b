//! What reads bytes of strangers, as functions of bytes. A target panics if something is wrong, and returns whatever else
//! happens.
//!
//! `cargo xtask fuzz` runs them with libFuzzer (`libfuzzer/`). The unit test runs each with its corpus, changed at random, so
//! that nothing that was found once comes back.

mod bytes;
mod targets;

pub use bytes::Bytes;
pub use targets::{TARGETS, Target};

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    /// Inputs of each target that are made of its corpus.
    const ROUNDS: u64 = 120;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        }

        fn below(&mut self, bound: usize) -> usize {
            self.next() as usize % bound.max(1)
        }
    }

    /// One of `inputs` with some bytes changed, cut, or doubled; or noise.
    fn variant(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
        let mut input = inputs[random.below(inputs.len())].clone();
        if random.below(4) == 0 {
            input = (0..random.below(600))
                .map(|_| random.next() as u8)
                .collect();
        }
        for _ in 0..random.below(6) {
            let (at, byte) = (random.below(input.len()), random.next() as u8);
            match (random.below(4), input.get_mut(at)) {
                (0, _) => input.truncate(at),
                (1, _) => input.extend_from_within(at..),
                (_, Some(place)) => {
                    *place = [byte, 0, 0xff, *place ^ 1 << (byte % 8)][random.below(4)]
                }
                (_, None) => input.push(byte),
            }
        }
        input.truncate(1 << 16);
        input
    }

    #[test]
    fn what_was_found_stays_away() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for target in TARGETS {
            let folder = corpora.join(target.name);
            let entries =
                fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
            let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            files.sort();
            let inputs: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
            assert!(!inputs.is_empty(), "{} has no corpus", target.name);
            let start = Instant::now();
            inputs.iter().for_each(|input| (target.run)(input));
            for seed in 0..ROUNDS {
                let input = variant(&inputs, &mut Random(seed));
                let run = std::panic::AssertUnwindSafe(|| (target.run)(&input));
                std::panic::catch_unwind(run).unwrap_or_else(|panic| {
                    eprintln!("{} with seed {seed}: {input:02x?}", target.name);
                    std::panic::resume_unwind(panic)
                });
            }
            println!("{}: {:?}", target.name, start.elapsed());
        }
    }
}
