//! What one reclaim is asked for, and what it did.

use std::ops::AddAssign;
use std::time::Duration;

use ebb_core::release::Released;
use ebb_core::slice::SliceOutcome;

use super::Reach;

/// What to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Maximum number of bytes.
    pub bytes: u64,
    /// How small the pieces may be.
    pub reach: Reach,
    /// Ranges of later generations are not taken. With a bound below `u64::MAX` it is an order by age.
    pub newest: u64,
    /// Someone waits for the memory: the vCPUs may lose ten times their usual share of time.
    pub urgent: bool,
}

/// What one reclaim did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes discarded or marked free.
    pub bytes: u64,
    /// System calls made.
    pub calls: u64,
    /// Parts that the kernel refused: they stay as they were.
    pub failures: u64,
    /// Time it took.
    pub duration: Duration,
    /// It has ended before it was done: because of the stop, its time-out, or other work.
    pub cut_short: bool,
}

/// What one closing of the gate has cost the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pause {
    /// How long they were kept out.
    pub held: Duration,
    /// Number of vCPUs that had to wait for it or were kicked.
    pub disturbed: u64,
    /// They were not out in time.
    pub missed: bool,
}

impl From<&SliceOutcome> for Pause {
    fn from(slice: &SliceOutcome) -> Self {
        Self {
            held: slice.held,
            disturbed: slice.disturbed,
            missed: slice.missed,
        }
    }
}

impl From<&Released> for Outcome {
    fn from(released: &Released) -> Self {
        Self {
            bytes: released.bytes.iter().sum(),
            calls: released.calls,
            failures: released.failures,
            ..Self::default()
        }
    }
}

impl From<&SliceOutcome> for Outcome {
    fn from(slice: &SliceOutcome) -> Self {
        Self {
            bytes: slice.bytes,
            calls: slice.calls,
            failures: slice.failures,
            ..Self::default()
        }
    }
}

impl<T: Into<Self>> AddAssign<T> for Outcome {
    fn add_assign(&mut self, other: T) {
        let other = other.into();
        self.bytes += other.bytes;
        self.calls += other.calls;
        self.failures += other.failures;
        self.duration += other.duration;
        self.cut_short |= other.cut_short;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_add_up() {
        let mut sum = Outcome::default();
        sum += &Released {
            bytes: vec![1, 2],
            calls: 3,
            failures: 4,
            error: None,
        };
        sum += &SliceOutcome {
            bytes: 10,
            calls: 20,
            failures: 30,
            ranges: 99,
            ..SliceOutcome::default()
        };
        sum += Outcome {
            bytes: 100,
            calls: 200,
            failures: 300,
            duration: Duration::from_secs(4),
            cut_short: true,
        };
        let expected = Outcome {
            bytes: 113,
            calls: 223,
            failures: 334,
            duration: Duration::from_secs(4),
            cut_short: true,
        };
        assert_eq!(sum, expected);
    }
}
