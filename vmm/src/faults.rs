//! Counts and logs what guests do wrong. The rate of log lines is limited, so no guest can flood the log.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Faults that are logged before the rate is limited.
const BURST: u32 = 8;

/// After the burst, at most one line is logged in this time.
const PERIOD: Duration = Duration::from_secs(1);

/// From so many lines on it is [`LONG_PERIOD`]: a guest may go on for months, and nobody may look after the log.
const MANY: u32 = 1000;

/// As [`PERIOD`].
const LONG_PERIOD: Duration = Duration::from_secs(60);

/// The faults of one device or one interface. The first eight are logged, then at most one a second, and after a thousand one a
/// minute, with the number of faults that were not logged.
#[derive(Debug)]
pub struct GuestFaults {
    device: String,
    count: AtomicU64,
    lines: Mutex<Lines>,
}

impl GuestFaults {
    /// Starts with no faults. `device` is the device's name in the log.
    #[must_use]
    pub fn new(device: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            count: AtomicU64::new(0),
            lines: Mutex::default(),
        }
    }

    /// Counts one fault, and logs it if the rate allows.
    pub fn report(&self, what: impl Display) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let admitted = self
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .admit(Instant::now());
        match admitted {
            Some(0) => tracing::warn!("{}: {what}", self.device),
            Some(left_out) => {
                tracing::warn!("{}: {what} ({left_out} more not logged)", self.device);
            }
            None => {}
        }
    }

    /// Number of faults so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// The lines that were logged.
#[derive(Debug, Default)]
struct Lines {
    written: u32,
    last: Option<Instant>,
    left_out: u64,
}

impl Lines {
    /// Asks for a line at `now`. Returns how many faults were left out since the last line; `None` if this one must be
    /// left out too.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let period = if self.written < MANY {
            PERIOD
        } else {
            LONG_PERIOD
        };
        let rested = self
            .last
            .is_none_or(|last| now.saturating_duration_since(last) >= period);
        if self.written >= BURST && !rested {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.written = self.written.saturating_add(1);
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_one_line_a_second() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let written = (0..100_000)
            .filter(|n| {
                lines
                    .admit(start + Duration::from_micros(n * 100))
                    .is_some()
            })
            .count();
        // Ten seconds of flood.
        assert!((8..=8 + 10).contains(&written), "{written}");
    }

    #[test]
    fn a_month_of_faults_does_not_fill_a_disk() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let month = (0..30 * 24 * 3600).map(|second| start + Duration::from_secs(second));
        let written = month.filter(|now| lines.admit(*now).is_some()).count();
        assert!((43_000..45_000).contains(&written), "{written}");
    }

    #[test]
    fn every_fault_is_counted() {
        let faults = GuestFaults::new("device");
        for _ in 0..2 * BURST {
            faults.report("a fault");
        }
        assert_eq!(faults.count(), u64::from(2 * BURST));
    }

    #[test]
    fn what_was_left_out_is_told() {
        let mut lines = Lines::default();
        let start = Instant::now();
        for _ in 0..BURST + 5 {
            lines.admit(start);
        }
        assert_eq!(lines.admit(start + PERIOD), Some(5));
        assert_eq!(lines.admit(start + PERIOD * 2), Some(0));
    }
}
