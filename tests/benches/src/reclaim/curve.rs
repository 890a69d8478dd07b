//! Scattered ranges under running vCPUs: interrupts and pauses by the size of a slice.

use std::time::Duration;

use ebb_core::generation::GateStats;
use ebb_core::release::Release;
use ebb_vmm::reclaim::{Mode, Order, Outcome, Reach, ReclaimTuning, Reclaimer};

use super::Arguments;
use crate::counters::{Measured, above, measure as count};
use crate::results::{Metric, Results};
use crate::rig::{Ranges, Rig};
use ebb_harness::error::{Context, Error, Result};

/// One of the four CPUs of the nested machine is left to the reclaimer.
const VCPUS: usize = 3;

/// The settings of `ebb run` by default.
const DEFAULT: &str = "default";

/// Memory is invalidated, and discarded later.
const INVALIDATE: &str = "invalidate";
const DISCARD: &str = "discard";
/// Memory is discarded without having been invalidated, as under sudden pressure.
const DIRECT: &str = "direct";

const IPIS: Metric = ("ipis", "/range");
const IDLE: Metric = ("idle-ipis", "/range");
const KICKS: Metric = ("kicks", "/range");
const PAUSE: Metric = ("pause", "ms");
const LONGEST: Metric = ("pause-longest", "ms");
const TIME: Metric = ("time", "us/range");

const ALL: Order = Order {
    bytes: u64::MAX,
    reach: Reach::Fragments,
    newest: u64::MAX,
    urgent: true,
};

/// Bytes of a range.
const RANGE: u64 = 64 << 10;

/// Ranges of `size` bytes, far apart.
const fn scattered(size: u64, count: u64) -> Ranges {
    Ranges {
        size,
        stride: 256 << 10,
        count,
    }
}

/// A slice ends by its number of ranges only, and is rested for as long as it took.
const fn tuning(slice: usize) -> ReclaimTuning {
    ReclaimTuning {
        mode: Mode::Off,
        pause: Duration::from_secs(10),
        slice,
        share: 50,
    }
}

/// At least so many discards of ranges that were invalidated before, and that every vCPU has flushed since.
///
/// # Errors
/// The machine does not do what it should, or the kernel does not count.
pub(crate) fn quiescent(discards: u64, results: &mut Results) -> Result<()> {
    let count = discards.min(512);
    let rig = Rig::start(VCPUS, scattered(RANGE, count), false)?;
    let reclaimer = rig.reclaimer(tuning(ReclaimTuning::default().slice));
    let (mut flushes, mut discarded) = (0, 0);
    let case = ("ebb", "quiescent");
    while discarded < discards {
        rig.free()?;
        reclaimer.invalidate(ALL);
        let found = step(&rig, || reclaimer.discard(ALL))?;
        let kvm = found.measured.found.kvm;
        results.add(
            case,
            ("flush-requests", ""),
            kvm.remote_tlb_flush_requests as f64,
        );
        results.add(case, ("flushes", ""), kvm.remote_tlb_flush as f64);
        flushes += kvm.remote_tlb_flush_requests;
        discarded += count;
    }
    eprintln!("reclaim: {flushes} flush requests for {discarded} quiescent ranges");
    results.lower(
        "discard_flushes_per_10k",
        flushes as f64 * 1e4 / discarded as f64,
    );
    Ok(())
}

/// The curve over slices, the default settings, and one call each under running vCPUs.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    for &slice in &arguments.slices {
        // Small slices take long on an emulated machine, and what each costs hardly depends on their number.
        let max = arguments.ranges;
        let count = (slice as u64 * 16).clamp(64.min(max), max);
        let name = format!("slice-{slice:03}");
        rounds(&name, (count, tuning(slice)), arguments.runs, results)?;
    }
    if !arguments.quick {
        // Each slice is short and rested for long, so that a round takes time.
        let (count, default) = (arguments.ranges.min(128), ReclaimTuning::default());
        rounds(DEFAULT, (count, default), arguments.runs.min(3), results)?;
        one_by_one((VCPUS, RANGE), arguments.runs, results)?;
    }
    let ReclaimTuning {
        pause,
        slice,
        share,
        ..
    } = ReclaimTuning::default();
    results.note(format!(
        "slice-N: pause=10 s, share=50, so that a slice ends by its number of ranges only; default: pause={pause:?}, \
         slice={slice}, share={share}; all of it with {VCPUS} vCPUs"
    ));
    compare(results)
}

/// Rounds of `count` ranges with these settings.
fn rounds(
    name: &str,
    (count, tuning): (u64, ReclaimTuning),
    runs: u32,
    results: &mut Results,
) -> Result<()> {
    let rig = Rig::start(VCPUS, scattered(RANGE, count), false)?;
    let reclaimer = rig.reclaimer(tuning);
    for _ in 0..runs {
        round(&rig, &reclaimer, name, results)?;
    }
    let longest = rig.gate.stats().longest_pause_us as f64 / 1e3;
    results.add(("ebb", &case(name, "all")), LONGEST, longest);
    eprintln!("reclaim: {name}: longest pause {longest:.1} ms");
    Ok(())
}

fn case(name: &str, step: &str) -> String {
    format!("{name}/{step}")
}

fn round(rig: &Rig, reclaimer: &Reclaimer, name: &str, results: &mut Results) -> Result<()> {
    let mut add = |what: &str, found: &Step| found.add(("ebb", &case(name, what)), results);
    rig.free()?;
    add(INVALIDATE, &step(rig, || reclaimer.invalidate(ALL))?);
    add(DISCARD, &step(rig, || reclaimer.discard(ALL))?);
    rig.free()?;
    add(DIRECT, &step(rig, || reclaimer.discard(ALL))?);
    Ok(())
}

/// One madvise for each range of `size` bytes, the vCPUs in the guest: what it costs without the gate.
///
/// # Errors
/// As for [`quiescent`].
pub(crate) fn one_by_one(
    (vcpus, size): (usize, u64),
    rounds: u32,
    results: &mut Results,
) -> Result<()> {
    let rig = Rig::start(vcpus, scattered(size, 64), false)?;
    let all = rig.ranges().all();
    let name = format!("{vcpus} vCPUs, {} KiB each", size >> 10);
    let mut measure = |what: &str, how: Release| -> Result<()> {
        let mut bytes = Ok(0);
        let found = step(&rig, || {
            let each = all.iter().map(|range| rig.ram.release_range(*range, how));
            bytes = each.sum();
            Outcome {
                bytes: *bytes.as_ref().unwrap_or(&0),
                ..Outcome::default()
            }
        })?;
        found.add(("madvise", &case(&name, what)), results);
        bytes.context("madvise").map(drop)
    };
    for _ in 0..rounds {
        rig.touch()?;
        measure(INVALIDATE, Release::MarkFree)?;
        measure(DISCARD, Release::Discard)?;
        rig.touch()?;
        measure(DIRECT, Release::Discard)?;
    }
    let above = above_idle(results, ("madvise", &case(&name, DIRECT)));
    results.lower(
        &format!("madvise_ipis_per_range_{vcpus}_vcpus"),
        above.context("no rounds")?,
    );
    Ok(())
}

/// What one step has cost.
struct Step {
    measured: Measured,
    before: GateStats,
    after: GateStats,
    ranges: f64,
}

/// Measures an action that takes all ranges of the machine.
fn step(rig: &Rig, action: impl FnOnce() -> Outcome) -> Result<Step> {
    let before = rig.gate.stats();
    let mut after = before;
    let measured = count(rig.owner, || {
        let outcome = action();
        after = rig.gate.stats();
        if outcome.bytes == rig.ranges().bytes() {
            Ok(())
        } else {
            Err(Error::new(format!(
                "not all ranges were taken: {outcome:?}"
            )))
        }
    })?;
    Ok(Step {
        measured,
        before,
        after,
        ranges: rig.ranges().count as f64,
    })
}

impl Step {
    fn kicks(&self) -> f64 {
        (self.after.kicks_total - self.before.kicks_total) as f64 / self.ranges
    }

    /// Flushes of KVM that interrupted somebody, function calls and our kicks.
    fn ipis(&self) -> f64 {
        let found = self.measured.found;
        (found.kvm.remote_tlb_flush + found.calls) as f64 / self.ranges + self.kicks()
    }

    fn add(&self, case: (&'static str, &str), results: &mut Results) {
        let idle = self.measured.idle;
        let noise = (idle.kvm.remote_tlb_flush + idle.calls) as f64 / self.ranges;
        results.add(case, IPIS, self.ipis());
        results.add(case, IDLE, noise);
        results.add(case, KICKS, self.kicks());
        let time = self.measured.time.as_secs_f64() * 1e6 / self.ranges;
        results.add(case, TIME, time);
        let pauses = |stats: &GateStats| stats.pauses.iter().sum::<u64>();
        let count = pauses(&self.after) - pauses(&self.before);
        if count > 0 {
            let total = (self.after.pause_us_total - self.before.pause_us_total) as f64 / 1e3;
            results.add(case, PAUSE, total / count as f64);
        }
    }
}

/// The median of a case's interrupts for each range, less those of the idle machine.
fn above_idle(results: &Results, (system, case): (&str, &str)) -> Option<f64> {
    let found = results.median(system, case, IPIS.0)?;
    Some(above(found, results.median(system, case, IDLE.0)?))
}

fn compare(results: &mut Results) -> Result<()> {
    let default_slice = ReclaimTuning::default().slice;
    let mut found = false;
    for (name, suffix) in [
        (format!("slice-{default_slice:03}"), ""),
        ("slice-128".to_owned(), "_slice_128"),
        (DEFAULT.to_owned(), "_default"),
    ] {
        let of = |step| above_idle(results, ("ebb", &case(&name, step)));
        let [Some(invalidate), Some(discard), Some(direct)] = [INVALIDATE, DISCARD, DIRECT].map(of)
        else {
            continue;
        };
        found = true;
        let worst = invalidate.max(discard).max(direct);
        for (step, value) in [
            ("", worst),
            ("_invalidate", invalidate),
            ("_discard", discard),
            ("_both_steps", invalidate + discard),
            ("_direct", direct),
        ] {
            results.lower(&format!("ipis_per_range{step}{suffix}"), value);
        }
    }
    if found {
        Ok(())
    } else {
        Err(Error::new("the curve has no point at the default slice"))
    }
}
