//! Closing the gate before 1 to 16 vCPUs that never leave the guest by themselves.

use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Result};
use ebb_harness::wait::LONG;
use ebb_vmm::reclaim::ReclaimTuning;

use crate::results::{Metric, Results};
use crate::rig::{Ranges, Rig};

/// The nested machine has four CPUs, one of which is the reclaimer's: from 4 on, vCPUs wait for each other.
const VCPUS: [usize; 5] = [1, 2, 4, 8, 16];

/// Closings of each kind in a round.
const CLOSINGS: u32 = 10;

const CLOSED: Metric = ("to-closed", "us");
const RETURNED: Metric = ("to-all-back", "us");
const MISSED: Metric = ("missed", "%");

/// Nothing is taken; the guest needs some memory.
const RANGES: Ranges = Ranges {
    size: 64 << 10,
    stride: 256 << 10,
    count: 16,
};

/// Closes and opens, with the default pause and with one that is not missed.
pub fn measure(runs: u32, results: &mut Results) -> Result<()> {
    for vcpus in VCPUS {
        let rig = Rig::start(vcpus, RANGES, false)?;
        let name = format!("closing/{vcpus:02} vCPUs");
        let case = ("ebb", name.as_str());
        for _ in 0..runs {
            let mut missed = 0;
            for _ in 0..CLOSINGS {
                missed += u32::from(rig.gate.hold(ReclaimTuning::default().pause).is_err());
                close(&rig, case, results)?;
            }
            let share = f64::from(missed) * 100.0 / f64::from(CLOSINGS);
            results.add(case, MISSED, share);
        }
        eprintln!("reclaim: the gate was closed before {vcpus} vCPUs");
    }
    Ok(())
}

fn close(rig: &Rig, case: (&str, &str), results: &mut Results) -> Result<()> {
    // Those that the last closing has kicked are back and work.
    thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    let hold = rig.gate.hold(LONG).ok().context("a vCPU is not out")?;
    results.add(case, CLOSED, start.elapsed().as_secs_f64() * 1e6);
    let returns = || rig.gate.stats().returns.iter().sum::<u64>();
    let (before, start) = (returns(), Instant::now());
    drop(hold);
    while returns() == before && start.elapsed() < LONG {
        thread::sleep(Duration::from_micros(50));
    }
    results.add(case, RETURNED, start.elapsed().as_secs_f64() * 1e6);
    Ok(())
}
