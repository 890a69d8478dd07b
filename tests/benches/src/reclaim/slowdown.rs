//! What a busy guest notices of a reclaim of fragments that goes on and on.

use std::thread;
use std::time::{Duration, Instant};

use ebb_vmm::reclaim::{Order, Reach, ReclaimTuning};

use super::Arguments;
use crate::results::{Metric, Results, median};
use crate::rig::{Ranges, Rig};
use ebb_harness::error::{Context, Error, Result};

const CASE: (&str, &str) = ("ebb", "fragments");
const RATE: Metric = ("guest-work", "/us");
const ALONE: Metric = ("guest-work-alone", "/us");
const HELD: Metric = ("held", "%");
const TAKEN: Metric = ("ranges", "/s");

const WINDOW: Duration = Duration::from_secs(2);

/// More than the windows of a run take.
const RANGES: Ranges = Ranges {
    size: 64 << 10,
    stride: 128 << 10,
    count: 8192,
};

/// One vCPU works; reclaim goes as it does under pressure, nobody waiting for it.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    let rig = Rig::start(1, RANGES, false)?;
    rig.free()?;
    let pause = Duration::from_micros(arguments.pause);
    let mut ratios = Vec::new();
    for window in 0..arguments.windows {
        // Which is first changes.
        let order = if window % 2 == 0 {
            [true, false]
        } else {
            [false, true]
        };
        let mut rates = [0.0; 2];
        for with in order {
            rates[usize::from(with)] = if with {
                reclaiming(&rig, pause, results)?
            } else {
                work(&rig)?
            };
        }
        let [alone, with] = rates;
        results.add(CASE, RATE, with);
        results.add(CASE, ALONE, alone);
        ratios.push(with / alone);
    }
    let value = median(&ratios).context("no windows")?;
    let held = results
        .median(CASE.0, CASE.1, HELD.0)
        .context("no windows")?;
    results.higher("guest_slowdown_during_reclaim", value);
    results.higher("guest_share_not_held", 1.0 - held / 100.0);
    Ok(())
}

/// Turns of the guest's loop in a microsecond, over one window.
fn work(rig: &Rig) -> Result<f64> {
    let (before, start) = (rig.work(0)?, Instant::now());
    thread::sleep(WINDOW);
    let (after, time) = (rig.work(0)?, start.elapsed());
    Ok(f64::from(after.wrapping_sub(before)) / time.as_secs_f64() / 1e6)
}

fn reclaiming(rig: &Rig, pause: Duration, results: &mut Results) -> Result<f64> {
    let reclaimer = rig.reclaimer(ReclaimTuning {
        pause,
        ..ReclaimTuning::default()
    });
    let order = Order {
        bytes: u64::MAX,
        reach: Reach::Fragments,
        newest: u64::MAX,
        urgent: false,
    };
    let before = rig.gate.stats().pause_us_total;
    let (rate, taken) = thread::scope(|scope| {
        let reclaim = scope.spawn(|| reclaimer.discard(order).bytes);
        let rate = work(rig);
        reclaimer.stop();
        (rate, reclaim.join())
    });
    let held = rig.gate.stats().pause_us_total - before;
    let taken = taken.map_err(|_| Error::new("the reclaim has panicked"))?;
    let left = rig.lazy.snapshot().lazy_bytes;
    if taken == 0 || left == 0 {
        let text = format!("reclaim did not go on: {taken} bytes taken, {left} left");
        return Err(Error::new(text));
    }
    let seconds = WINDOW.as_secs_f64();
    results.add(CASE, HELD, held as f64 / 1e4 / seconds);
    results.add(CASE, TAKEN, (taken / RANGES.size) as f64 / seconds);
    rate
}
