//! How long the gate was closed: a histogram.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::count;

/// Buckets of [`Pauses`].
pub const PAUSE_BUCKETS: usize = 20;

/// Pauses by length: bucket `i` counts those shorter than 2^i microseconds and not shorter than half of
/// that; the last one also counts everything longer.
#[derive(Debug, Default)]
pub struct Pauses {
    buckets: [AtomicU64; PAUSE_BUCKETS],
    total_us: AtomicU64,
    longest_us: AtomicU64,
}

impl Pauses {
    /// Counts one pause.
    pub fn record(&self, pause: Duration) {
        let micros = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        count(&self.buckets[bucket(micros)], 1);
        count(&self.total_us, micros);
        self.longest_us.fetch_max(micros, Ordering::Relaxed);
    }

    /// The histogram.
    #[must_use]
    pub fn buckets(&self) -> [u64; PAUSE_BUCKETS] {
        std::array::from_fn(|index| self.buckets[index].load(Ordering::Relaxed))
    }

    /// All pauses together, in microseconds.
    #[must_use]
    pub fn total_us(&self) -> u64 {
        self.total_us.load(Ordering::Relaxed)
    }

    /// The longest one, in microseconds.
    #[must_use]
    pub fn longest_us(&self) -> u64 {
        self.longest_us.load(Ordering::Relaxed)
    }
}

fn bucket(micros: u64) -> usize {
    let bits = (u64::BITS - micros.leading_zeros()) as usize;
    bits.min(PAUSE_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        for (micros, want) in [(0, 0), (1, 1), (2, 2), (3, 2), (100, 7), (128, 8)] {
            assert_eq!(bucket(micros), want, "{micros}");
        }
        assert_eq!(bucket(u64::MAX), PAUSE_BUCKETS - 1);
        let pauses = Pauses::default();
        pauses.record(Duration::from_micros(100));
        pauses.record(Duration::from_micros(7));
        assert_eq!((pauses.buckets()[7], pauses.buckets()[3]), (1, 1));
        assert_eq!((pauses.total_us(), pauses.longest_us()), (107, 100));
    }
}
