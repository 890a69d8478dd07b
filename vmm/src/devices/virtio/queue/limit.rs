//! Limits of what a device moves: token buckets. Pure but for [`SharedLimiter`]: who asks says what time it is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Rate;

/// A bucket of tokens, one for each byte or request. Whatever its size, a request may begin when there is a token left; what it
/// takes beyond that is a debt, which the bucket fills up first.
#[derive(Debug)]
struct Bucket {
    size: i128,
    /// Time in which `size` tokens come.
    refill: Duration,
    /// Negative: a debt.
    tokens: i128,
    /// Tokens that do not come again.
    burst: i128,
    /// When the tokens were as many as they are; `None`: nothing was taken yet.
    counted: Option<Instant>,
}

impl Bucket {
    /// A full bucket; `None` if `rate` is no limit.
    fn new(rate: Rate) -> Option<Self> {
        let refill = Duration::from_millis(rate.refill_ms);
        (rate.size > 0 && !refill.is_zero()).then(|| Self {
            size: rate.size.into(),
            refill,
            tokens: rate.size.into(),
            burst: rate.burst.into(),
            counted: None,
        })
    }

    /// Adds the tokens that have come by now, in whole ones, so that none is lost or counted twice.
    fn refill(&mut self, now: Instant) {
        let nanos = self.refill.as_nanos().cast_signed();
        let counted = *self.counted.get_or_insert(now);
        let passed = now.saturating_duration_since(counted).as_nanos();
        let passed = passed.min(u64::MAX.into()).cast_signed();
        let due = passed * self.size / nanos;
        if self.tokens + due >= self.size {
            (self.tokens, self.counted) = (self.size, Some(now));
            return;
        }
        self.tokens += due;
        let used = (due * nanos + self.size - 1) / self.size;
        self.counted = Some(counted + duration(used.min(passed)));
    }

    /// Time until there is a token, at least.
    fn delay(&mut self, now: Instant) -> Duration {
        self.refill(now);
        if self.burst > 0 || self.tokens > 0 {
            return Duration::ZERO;
        }
        let missing = 1 - self.tokens;
        duration((missing * self.refill.as_nanos().cast_signed() + self.size - 1) / self.size)
    }

    fn take(&mut self, count: u64) {
        let count = i128::from(count);
        let burst = self.burst.min(count);
        self.burst -= burst;
        self.tokens -= count - burst;
    }
}

/// Nanoseconds, as far as they fit.
fn duration(nanos: i128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The limits of one direction of a device.
#[derive(Debug)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// At most so many bytes, and so many requests. `None` is no limit.
    #[must_use]
    pub fn new(bandwidth: Option<Rate>, operations: Option<Rate>) -> Self {
        Self {
            bandwidth: bandwidth.and_then(Bucket::new),
            operations: operations.and_then(Bucket::new),
        }
    }

    /// Sets another limit, with a full bucket; `None` leaves one as it is.
    pub fn set(&mut self, bandwidth: Option<Rate>, operations: Option<Rate>) {
        if let Some(rate) = bandwidth {
            self.bandwidth = Bucket::new(rate);
        }
        if let Some(rate) = operations {
            self.operations = Bucket::new(rate);
        }
    }

    /// How long the next request has to wait; `None` if it may begin. Does not look at the clock where there is no limit.
    pub fn delay(&mut self) -> Option<Duration> {
        if self.bandwidth.is_none() && self.operations.is_none() {
            return None;
        }
        let delay = self.delay_at(Instant::now());
        (!delay.is_zero()).then_some(delay)
    }

    fn delay_at(&mut self, now: Instant) -> Duration {
        let buckets = [&mut self.bandwidth, &mut self.operations];
        let delays = buckets.into_iter().flatten().map(|it| it.delay(now));
        delays.max().unwrap_or_default()
    }

    /// A request has begun that moves so many bytes.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bandwidth) = &mut self.bandwidth {
            bandwidth.take(bytes);
        }
        if let Some(operations) = &mut self.operations {
            operations.take(1);
        }
    }
}

/// A limiter that an operator changes while a device uses it, by a clone of it.
#[derive(Clone, Debug)]
pub struct SharedLimiter(Arc<Mutex<Limiter>>);

impl SharedLimiter {
    /// How long a device waits for it at most: others may have been set meanwhile.
    const LOOK: Duration = Duration::from_millis(500);

    /// As [`Limiter::new`].
    #[must_use]
    pub fn new(bandwidth: Option<Rate>, operations: Option<Rate>) -> Self {
        Self(Arc::new(Mutex::new(Limiter::new(bandwidth, operations))))
    }

    /// As [`Limiter::set`].
    pub fn set(&self, bandwidth: Option<Rate>, operations: Option<Rate>) {
        self.lock().set(bandwidth, operations);
    }

    /// As [`Limiter::delay`], but never long: ask again after it.
    #[must_use]
    pub fn delay(&self) -> Option<Duration> {
        self.lock().delay().map(|delay| delay.min(Self::LOOK))
    }

    /// As [`Limiter::take`].
    pub fn take(&self, bytes: u64) {
        self.lock().take(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, Limiter> {
        // Whole after each of its methods.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(bandwidth: &str, operations: &str) -> Limiter {
        let rate = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
        Limiter::new(rate(bandwidth), rate(operations))
    }

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn no_limit_is_none() {
        for (bandwidth, operations) in [("", ""), ("0", "0"), ("100/0", "5/0")] {
            let mut limiter = limiter(bandwidth, operations);
            limiter.take(u64::MAX);
            assert_eq!(limiter.delay(), None, "{bandwidth} {operations}");
        }
    }

    #[test]
    fn a_bucket_empties_and_fills() {
        let now = Instant::now();
        let mut limiter = limiter("1000/1000", "");
        assert_eq!(limiter.delay_at(now), Duration::ZERO);
        limiter.take(999);
        assert_eq!(limiter.delay_at(now), Duration::ZERO);
        // The last token is enough to begin; the rest is a debt.
        limiter.take(101);
        assert_eq!(limiter.delay_at(now), ms(101));
        assert_eq!(limiter.delay_at(now + ms(100)), ms(1));
        assert_eq!(limiter.delay_at(now + ms(101)), Duration::ZERO);
        limiter.take(1);
        assert_eq!(limiter.delay_at(now + ms(101)), ms(1));
        // It is never more than full.
        assert_eq!(limiter.delay_at(now + ms(60_000)), Duration::ZERO);
        limiter.take(1000);
        assert_eq!(limiter.delay_at(now + ms(60_000)), ms(1));
    }

    #[test]
    fn a_burst_comes_first_and_once() {
        let now = Instant::now();
        let mut limiter = limiter("10/1000+100", "");
        limiter.take(100);
        limiter.take(10);
        assert_eq!(limiter.delay_at(now), ms(100));
        assert_eq!(limiter.delay_at(now + ms(9000)), Duration::ZERO);
        limiter.take(10);
        assert_eq!(limiter.delay_at(now + ms(9000)), ms(100));
    }

    #[test]
    fn the_stricter_limit_counts() {
        let now = Instant::now();
        let mut limiter = limiter("1M/1000", "2/1000");
        limiter.take(10);
        limiter.take(10);
        assert_eq!(limiter.delay_at(now), ms(500));
        limiter.take(2 << 20);
        assert!(limiter.delay_at(now) > ms(1000));
    }

    proptest! {
        /// Whatever is asked for and when: over any time no more begins than size, burst, what came meanwhile, and the last
        /// request's debt; and a request that has waited as long as it was told begins.
        #[test]
        fn no_more_than_the_rate_and_no_less(
            size in 1..10_000_u64,
            refill in 1..10_000_u64,
            burst in 0..1000_u64,
            requests in prop::collection::vec((1..5000_u64, 0..50_u64), 1..200),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(&format!("{size}/{refill}+{burst}"), "");
            let (mut now, mut taken) = (start, 0);
            for (count, pause) in requests {
                now += ms(pause);
                now += limiter.delay_at(now);
                prop_assert_eq!(limiter.delay_at(now), Duration::ZERO);
                let came = (now - start).as_nanos() * u128::from(size) / u128::from(refill * 1_000_000);
                prop_assert!(u128::from(taken) <= u128::from(size + burst) + came);
                limiter.take(count);
                taken += count;
            }
        }
    }
}
