//! Skips attempts after attempts that failed.

/// Says which attempts to make. After a failure some attempts are skipped: 1 after the first, twice as many after each
/// further one, up to a maximum. A success starts over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backoff {
    /// Failures after a success that cause no attempt to be skipped.
    tolerance: u32,
    /// How many of them are left.
    tolerated: u32,
    /// Attempts to skip from now on.
    skip: u32,
    /// Attempts to skip after the next failure.
    next: u32,
    /// At most this many attempts are skipped in a row.
    most: u32,
}

impl Backoff {
    /// At most this many attempts are skipped in a row, unless something else is said.
    const MAX_SKIPPED: u32 = 64;

    /// Nothing has failed yet; each failure counts.
    pub const fn new() -> Self {
        Self::tolerant(0)
    }

    /// Nothing has failed yet; after a success, `tolerance` failures do not count.
    pub const fn tolerant(tolerance: u32) -> Self {
        Self {
            tolerance,
            tolerated: tolerance,
            skip: 0,
            next: 1,
            most: Self::MAX_SKIPPED,
        }
    }

    /// At most `most` attempts are skipped in a row.
    pub const fn skipping_at_most(self, most: u32) -> Self {
        Self { most, ..self }
    }

    /// Returns true if the attempt that is due should be made. If not, it counts as skipped.
    pub const fn is_due(&mut self) -> bool {
        let due = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        due
    }

    /// The attempt was in vain.
    pub fn failed(&mut self) {
        if self.tolerated > 0 {
            self.tolerated -= 1;
            return;
        }
        self.skip = self.next;
        self.next = (self.next * 2).min(self.most);
    }

    /// The attempt was a success.
    pub const fn succeeded(&mut self) {
        *self = Self::tolerant(self.tolerance).skipping_at_most(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many attempts are skipped before the next one.
    fn skipped(backoff: &mut Backoff) -> u32 {
        let mut skipped = 0;
        while !backoff.is_due() {
            skipped += 1;
        }
        skipped
    }

    #[test]
    fn each_failure_doubles_what_is_skipped_up_to_a_bound() {
        let mut backoff = Backoff::new();
        assert_eq!(skipped(&mut backoff), 0);
        let mut fail = || {
            backoff.failed();
            skipped(&mut backoff)
        };
        let skipped: [u32; 9] = std::array::from_fn(|_| fail());
        assert_eq!(skipped, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn the_bound_may_be_lower_and_stays() {
        let mut backoff = Backoff::new().skipping_at_most(2);
        for _ in 0..2 {
            backoff.succeeded();
            let skipped: [u32; 4] = std::array::from_fn(|_| {
                backoff.failed();
                skipped(&mut backoff)
            });
            assert_eq!(skipped, [1, 2, 2, 2]);
        }
    }

    #[test]
    fn a_success_starts_over() {
        let mut backoff = Backoff::new();
        for _ in 0..5 {
            backoff.failed();
            skipped(&mut backoff);
        }
        backoff.succeeded();
        assert_eq!((skipped(&mut backoff), skipped(&mut backoff)), (0, 0));
        backoff.failed();
        assert_eq!(skipped(&mut backoff), 1);
    }

    #[test]
    fn only_failures_in_a_row_beyond_the_tolerated_ones_count() {
        let mut backoff = Backoff::tolerant(2);
        for _ in 0..2 {
            let skipped: [u32; 5] = std::array::from_fn(|_| {
                backoff.failed();
                skipped(&mut backoff)
            });
            assert_eq!(skipped, [0, 0, 1, 2, 4]);
            backoff.succeeded();
        }
    }
}
