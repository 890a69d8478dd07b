//! What the host's kernel counts: interrupts between processors, and KVM's flushes.

use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Result};
use ebb_harness::host::{KvmCounters, kvm_counters};

/// Where the kernel counts interrupts.
const INTERRUPTS: &str = "/proc/interrupts";

/// The kernel's counters at one moment, or what has been added between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Of one machine.
    pub kvm: KvmCounters,
    /// Function call interrupts on all processors: flushes, and threads woken on idle processors.
    pub calls: u64,
}

impl Counters {
    /// Reads them for the machine of the process `pid`.
    ///
    /// # Errors
    /// A counter is not there: none is taken for 0.
    pub fn read(pid: u32) -> Result<Self> {
        Ok(Self {
            kvm: kvm_counters(pid)?,
            calls: function_calls()?,
        })
    }

    /// What has been added since `before`.
    #[must_use]
    pub const fn since(self, before: Self) -> Self {
        let (a, b) = (self.kvm, before.kvm);
        Self {
            kvm: KvmCounters {
                remote_tlb_flush: a.remote_tlb_flush - b.remote_tlb_flush,
                remote_tlb_flush_requests: a.remote_tlb_flush_requests
                    - b.remote_tlb_flush_requests,
                exits: a.exits - b.exits,
            },
            calls: self.calls - before.calls,
        }
    }
}

/// Function call interrupts so far, on all processors.
///
/// # Errors
/// The kernel does not say.
fn function_calls() -> Result<u64> {
    let text = std::fs::read_to_string(INTERRUPTS).context(INTERRUPTS)?;
    parse_function_calls(&text).context(format_args!("{INTERRUPTS} has no line CAL"))
}

fn parse_function_calls(interrupts: &str) -> Option<u64> {
    let mut lines = interrupts.lines();
    let counts = lines.find_map(|line| line.trim_start().strip_prefix("CAL:"))?;
    let counts: Vec<u64> = counts
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    (!counts.is_empty()).then(|| counts.iter().sum())
}

/// What an action has added to the counters, and what just as long a time has added right after it.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// With the action.
    pub found: Counters,
    /// Without.
    pub idle: Counters,
    /// How long each took.
    pub time: Duration,
}

/// Runs `action`, and then waits for as long as it took.
///
/// # Errors
/// Those of the action and of [`Counters::read`].
pub fn measure(pid: u32, action: impl FnOnce() -> Result<()>) -> Result<Measured> {
    let (start, before) = (Instant::now(), Counters::read(pid)?);
    action()?;
    let (time, after) = (start.elapsed(), Counters::read(pid)?);
    std::thread::sleep(time);
    Ok(Measured {
        found: after.since(before),
        idle: Counters::read(pid)?.since(after),
        time,
    })
}

/// How far `found` lies above the noise; 0 when it does not.
#[must_use]
pub const fn above(found: f64, noise: f64) -> f64 {
    (found - noise).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_calls_of_all_processors_are_added_up() {
        let text = "           CPU0       CPU1\n  0:         41          0   IO-APIC   2-edge      timer\n\
                    RES:        100        200   Rescheduling interrupts\n\
                    CAL:         11         31   Function call interrupts\n\
                    TLB:          7          8   TLB shootdowns\n";
        assert_eq!(parse_function_calls(text), Some(42));
        assert_eq!(parse_function_calls("RES: 1 2 Rescheduling\n"), None);
        assert_eq!(
            parse_function_calls("CAL: Function call interrupts\n"),
            None
        );
        assert!(function_calls().is_ok());
    }

    #[test]
    fn differences_and_noise() {
        let counters = |flushes, requests, exits, calls| Counters {
            kvm: KvmCounters {
                remote_tlb_flush: flushes,
                remote_tlb_flush_requests: requests,
                exits,
            },
            calls,
        };
        let added = counters(5, 9, 100, 20).since(counters(4, 2, 90, 5));
        assert_eq!(added, counters(1, 7, 10, 15));
        assert!((above(7.5, 2.5) - 5.0).abs() < 1e-9);
        assert!(above(2.0, 2.5).abs() < 1e-9);
    }
}
