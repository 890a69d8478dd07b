//! The rate of the host's time stamp counter. QEMU passes the counter on to the nested machine.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Length of one measurement.
const MEASUREMENT: Duration = Duration::from_millis(20);

/// Number of measurements. Their median ignores those that the host interrupted.
const RUNS: usize = 5;

/// Ticks of the time stamp counter per millisecond.
#[must_use]
pub fn tsc_khz() -> u64 {
    let mut rates = [0; RUNS];
    for rate in &mut rates {
        let (start, ticks) = (Instant::now(), ticks());
        sleep(MEASUREMENT);
        let ticks = self::ticks().wrapping_sub(ticks);
        *rate = u64::try_from(u128::from(ticks) * 1_000_000 / start.elapsed().as_nanos())
            .unwrap_or(u64::MAX);
    }
    rates.sort_unstable();
    rates[RUNS / 2]
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_runs_at_a_rate_that_processors_have() {
        let khz = tsc_khz();
        assert!((500_000..10_000_000).contains(&khz), "{khz}");
    }
}
