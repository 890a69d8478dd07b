//! The size of chunks, found by the time that they take.

use std::time::Duration;

use ebb_core::range::BLOCK_SIZE;

/// Time that a chunk should take, and so how long a reuse may have to wait for one. Longer only if a call takes that long
/// whatever its size.
const CHUNK_TIME: Duration = Duration::from_millis(1);

/// Maximum size of a chunk in bytes.
const MAX_CHUNK: u64 = 256 << 20;

/// Finds the size of chunks such that one takes about [`CHUNK_TIME`], whatever the page size and the host.
///
/// If smaller chunks are not faster, the call itself takes the time: it interrupts every running vCPU, which takes
/// milliseconds on an emulated or a crowded host. Smaller chunks would then not help a reuse and slow down reclaim, so a
/// chunk may take 4 times as long as a call takes anyway.
pub(super) struct Pace {
    /// Size of the next chunk in bytes.
    pub size: u64,
    /// Size of the last chunk in bytes, and the time that it took.
    last: (u64, Duration),
    /// Time that a call takes whatever its size; 0 as long as that is not known.
    call: Duration,
}

impl Pace {
    /// Begins with chunks of `size` bytes.
    pub const fn new(size: u64) -> Self {
        Self {
            size,
            last: (0, Duration::ZERO),
            call: Duration::ZERO,
        }
    }

    /// A chunk of `len` bytes took `took`.
    pub fn learn(&mut self, len: u64, took: Duration) {
        let (last_len, last_took) = self.last;
        if len <= last_len / 2 && took >= last_took * 3 / 4 {
            self.call = took;
        }
        self.call = self.call.min(took);
        self.last = (len, took);
        let aim = CHUNK_TIME.max(self.call * 4);
        if took > aim {
            self.size = (self.size / 2).max(BLOCK_SIZE);
        } else if len == self.size && took < aim * 2 / 5 {
            self.size = (self.size * 2).min(MAX_CHUNK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn chunks_aim_at_a_millisecond() {
        let next = |chunk, len, micros| {
            let mut pace = Pace::new(chunk);
            pace.learn(len, Duration::from_micros(micros));
            pace.size
        };
        assert_eq!(next(8 * MIB, 8 * MIB, 20), 16 * MIB);
        assert_eq!(
            next(8 * MIB, 4096, 20),
            8 * MIB,
            "a smaller chunk says little"
        );
        assert_eq!(next(8 * MIB, 8 * MIB, 700), 8 * MIB);
        assert_eq!(next(8 * MIB, 8 * MIB, 1500), 4 * MIB);
        assert_eq!(next(2 * MIB, 2 * MIB, 90_000), 2 * MIB);
        assert_eq!(next(MAX_CHUNK, MAX_CHUNK, 20), MAX_CHUNK);
    }

    /// The sizes of chunks where a call takes `call` and a MiB takes `mib` microseconds.
    fn sizes(call: u64, mib: u64) -> Vec<u64> {
        let mut pace = Pace::new(8 * MIB);
        let mut step = || {
            let took = call + pace.size / MIB * mib;
            pace.learn(pace.size, Duration::from_micros(took));
            pace.size / MIB
        };
        (0..12).map(|_| step()).collect()
    }

    #[test]
    fn calls_that_take_long_by_themselves_do_not_make_chunks_small() {
        // Quick calls: a millisecond, no more.
        assert!(sizes(4, 80)[6..].iter().all(|size| *size == 8));
        assert!(sizes(100, 400)[6..].iter().all(|size| *size == 2));
        // Slow calls: most of the time goes to the pages.
        assert!(sizes(15_000, 500)[6..].iter().all(|size| *size >= 16));
        // Two calls took long for another reason, as the next ones show.
        let mut pace = Pace::new(8 * MIB);
        for took in [4000, 4000, 300, 300, 650, 650, 1300] {
            pace.learn(pace.size, Duration::from_micros(took));
        }
        assert!(pace.size <= 16 * MIB, "{}", pace.size);
    }
}
