//! The size of chunks, found by the time that they take.

use std::time::Duration;

use ebb_core::range::BLOCK_SIZE;

/// How long a chunk may take, and so how long a reuse may have to wait for one. Longer only if a call takes that long
/// whatever its size.
const CHUNK_TIME: Duration = Duration::from_millis(1);

/// How long a chunk should take: what a busy host adds still fits in [`CHUNK_TIME`].
const AIM: Duration = Duration::from_micros(600);

/// Maximum size of a chunk in bytes.
pub(super) const MAX_CHUNK: u64 = 16 << 20;

/// Assumed cost of a MiB until a slower one was measured: that of pages of 4 KiB on a slow host.
const FIRST_COST: Duration = Duration::from_micros(100);

/// The cost of the slowest MiB is forgotten by this part with each chunk, by half after 22.
const FORGET: u32 = 32;

/// Finds the size of chunks such that one takes about [`AIM`], whatever the page size and the host.
///
/// Memory without pages, or with huge ones, is released in next to no time, and memory in pages of 4 KiB may follow at any
/// moment. So the slowest MiB counts, at once, and is forgotten slowly. A chunk that is half as slow again as
/// those before it may have been disturbed: it counts for the next chunk only, unless that is slow, too.
///
/// A part of the time is the call's own, whatever its size: it interrupts every running vCPU. It shows when two chunks in a
/// row differ in size, and comes on top of [`AIM`]. If even a chunk of one block takes longer than [`CHUNK_TIME`], as on an
/// emulated or a crowded host, small chunks would not help a reuse: then a chunk may take 4 times as long as that.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    size: u64,
    /// Time of the slowest MiB of late.
    cost: Duration,
    /// Time of a MiB of the last chunk, if that may have been disturbed.
    suspect: Option<Duration>,
    /// Time that a chunk of one block takes if nothing disturbs it; 0 as long as that is not known.
    block: Duration,
    /// The call's own part of that.
    call: Duration,
    /// Size of the last chunk in bytes, and the time that it took.
    last: (u64, Duration),
}

impl Pace {
    /// Begins with a chunk of one block.
    pub const fn new() -> Self {
        Self {
            size: BLOCK_SIZE,
            cost: FIRST_COST,
            suspect: None,
            block: Duration::ZERO,
            call: Duration::ZERO,
            last: (0, Duration::ZERO),
        }
    }

    /// Size of the next chunk in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// A chunk of `len` bytes took `took`.
    pub fn learn(&mut self, len: u64, took: Duration) {
        if len == 0 {
            return;
        }
        let was_slow = self.block > CHUNK_TIME;
        if len <= BLOCK_SIZE {
            let before = self.block + self.block / 8;
            self.block = if before.is_zero() {
                took
            } else {
                took.min(before)
            };
        }
        self.learn_call(len, took);
        let slow = self.block > CHUNK_TIME;
        let (fixed, aim) = if slow {
            (self.block, self.block * 3)
        } else {
            (self.call, AIM)
        };
        let cost = per_mib(took.saturating_sub(fixed), len).min(per_mib(aim, BLOCK_SIZE));
        if was_slow == slow {
            self.count(cost);
        } else {
            self.suspect = None;
            self.cost = if slow { cost } else { cost.max(FIRST_COST) };
        }
        let cost = self.suspect.map_or(self.cost, |cost| cost.max(self.cost));
        let fit = aim.as_nanos() * (1 << 20) / cost.as_nanos().max(1);
        let fit = u64::try_from(fit).unwrap_or(u64::MAX) / BLOCK_SIZE * BLOCK_SIZE;
        // Two blocks show what the call takes by itself, if that is not too long.
        let two = fixed + cost * 2 * (BLOCK_SIZE >> 20) as u32;
        let least = if two < CHUNK_TIME { 2 } else { 1 } * BLOCK_SIZE;
        self.size = fit.clamp(least, MAX_CHUNK.min(self.size * 2));
    }

    /// Finds what a call takes by itself from two chunks in a row, one at least twice as large as the other.
    fn learn_call(&mut self, len: u64, took: Duration) {
        let last = std::mem::replace(&mut self.last, (len, took));
        let (small, large) = if len < last.0 {
            ((len, took), last)
        } else {
            (last, (len, took))
        };
        if let Some(times @ 2..) = large.0.checked_div(small.0) {
            let times = u32::try_from(times).unwrap_or(u32::MAX);
            let call = (small.1.saturating_mul(times)).saturating_sub(large.1) / (times - 1);
            self.call = call.min(self.block);
        }
    }

    /// A MiB of the last chunk took `cost`.
    fn count(&mut self, cost: Duration) {
        let confirmed = match self.suspect.take() {
            Some(before) if cost >= before / 2 => cost.min(before),
            None if cost > self.cost * 3 / 2 => {
                self.suspect = Some(cost);
                return;
            }
            Some(_) => cost.min(self.cost),
            None => cost,
        };
        self.cost = confirmed.max(self.cost - self.cost / FORGET);
    }
}

fn per_mib(took: Duration, len: u64) -> Duration {
    let nanos = took.as_nanos() * (1 << 20) / u128::from(len);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Runs `chunks` chunks, of which each call takes `call` and each MiB `mib` microseconds. Returns the sizes in MiB, and
    /// how many took longer than [`CHUNK_TIME`].
    fn run(pace: &mut Pace, chunks: usize, call: u64, mib: u64) -> (Vec<u64>, usize) {
        let mut late = 0;
        let sizes = (0..chunks).map(|_| {
            let size = pace.size();
            let took = Duration::from_micros(call + size / MIB * mib);
            late += usize::from(took > CHUNK_TIME);
            pace.learn(size, took);
            size / MIB
        });
        (sizes.collect(), late)
    }

    #[test]
    fn chunks_aim_at_less_than_a_millisecond() {
        for (mib, want) in [(80, 6), (140, 4), (220, 4), (450, 2)] {
            let (sizes, late) = run(&mut Pace::new(), 100, 4, mib);
            assert_eq!(sizes[0], 2, "nothing is known yet");
            assert_eq!((sizes[99], late), (want, 0), "{mib}: {sizes:?}");
        }
    }

    #[test]
    fn memory_without_pages_does_not_make_the_next_chunk_long() {
        for untouched in [1, 20, 1000] {
            let mut pace = Pace::new();
            let (sizes, late) = run(&mut pace, untouched, 2, 0);
            assert!(sizes.iter().all(|size| *size <= 16), "{sizes:?}");
            assert_eq!(late, 0);
            let (sizes, late) = run(&mut pace, 100, 2, 220);
            assert!(late <= 1, "after {untouched}: {late} {sizes:?}");
        }
    }

    #[test]
    fn huge_pages_make_chunks_as_large_as_they_may_be() {
        let (sizes, late) = run(&mut Pace::new(), 300, 5, 5);
        assert_eq!((sizes[299], late), (16, 0), "{sizes:?}");
    }

    #[test]
    fn one_chunk_that_was_disturbed_is_forgotten() {
        let mut pace = Pace::new();
        run(&mut pace, 10, 4, 80);
        pace.learn(4 * MIB, Duration::from_millis(80));
        assert_eq!(pace.size(), 2 * MIB);
        run(&mut pace, 1, 4, 80);
        assert_eq!(pace.size(), 4 * MIB);
        run(&mut pace, 2, 4, 400);
        assert_eq!(pace.size(), 2 * MIB);
        run(&mut pace, 1, 4, 80);
        assert_eq!(pace.size(), 2 * MIB, "two in a row were no disturbance");
        run(&mut pace, 100, 4, 80);
        assert_eq!(pace.size(), 6 * MIB);
        pace.learn(0, Duration::from_secs(1));
        assert_eq!(pace.size(), 6 * MIB);
    }

    #[test]
    fn a_call_that_takes_a_part_of_it_does_not_make_chunks_small() {
        let mut pace = Pace::new();
        let (sizes, _) = run(&mut pace, 200, 240, 25);
        assert_eq!((sizes[1], sizes[199]), (4, 16), "{sizes:?}");
        let (sizes, late) = run(&mut pace, 100, 240, 220);
        assert_eq!((sizes[99], late), (2, 1), "{sizes:?}");
    }

    #[test]
    fn calls_that_take_long_by_themselves_do_not_make_chunks_small() {
        let mut pace = Pace::new();
        let (sizes, _) = run(&mut pace, 20, 15_000, 500);
        assert!(sizes[3..].iter().all(|size| *size == 16), "{sizes:?}");
        // One slow block was disturbed, as the next ones show.
        let mut pace = Pace::new();
        pace.learn(BLOCK_SIZE, Duration::from_millis(9));
        pace.learn(BLOCK_SIZE, Duration::from_micros(160));
        assert_eq!(pace.size(), 6 * MIB);
    }

    const fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn what_is_slow_counts_at_once_or_is_a_suspect() {
        let mut pace = Pace::new();
        pace.count(us(150));
        assert_eq!((pace.cost, pace.suspect), (us(150), None));
        pace.count(us(1000));
        assert_eq!((pace.cost, pace.suspect), (us(150), Some(us(1000))));
        pace.count(us(300));
        assert_eq!(pace.cost, us(150), "far less than the suspect");
        pace.count(us(32));
        assert_eq!(pace.cost, us(150) - us(150) / FORGET);
    }

    #[test]
    fn a_call_is_known_from_a_small_chunk_after_a_large_one() {
        let mut pace = Pace::new();
        pace.learn(4 * BLOCK_SIZE, us(200 + 400));
        pace.learn(BLOCK_SIZE, us(200 + 100));
        assert_eq!((pace.call, pace.block), (us(200), us(300)));
    }

    #[test]
    fn the_time_of_a_block_grows_by_an_eighth_at_most() {
        let mut pace = Pace::new();
        pace.learn(BLOCK_SIZE, us(800));
        pace.learn(BLOCK_SIZE, us(2000));
        assert_eq!(pace.block, us(900));
    }

    /// Two blocks that take just as long as a chunk may are too much, and one block that does is not slow.
    #[test]
    fn what_takes_just_as_long_as_it_may_is_not_made_longer() {
        let mut pace = Pace::new();
        pace.learn(BLOCK_SIZE, CHUNK_TIME / 2);
        assert_eq!(pace.size(), BLOCK_SIZE);
        let mut pace = Pace::new();
        (0..2).for_each(|_| pace.learn(BLOCK_SIZE, CHUNK_TIME));
        assert_eq!((pace.size(), pace.cost), (BLOCK_SIZE, us(300)));
        pace.learn(2 * BLOCK_SIZE, us(0));
        assert_eq!(pace.cost, us(300) - us(300) / FORGET);
    }

    #[test]
    fn the_slowest_of_slow_chunks_is_forgotten_slowly_too() {
        let mut pace = Pace::new();
        run(&mut pace, 3, 15_000, 500);
        let before = pace.cost;
        assert!(!before.is_zero());
        pace.learn(8 * BLOCK_SIZE, us(15_000));
        assert_eq!(pace.cost, before - before / FORGET);
    }
}
