//! Scattered ranges under running vCPUs: interrupts and pauses by the size of a slice.

use std::time::Duration;

use ebb_core::generation::GateStats;
use ebb_core::release::Release;
use ebb_vmm::reclaim::{Mode, Order, Outcome, Reach, ReclaimTuning, Reclaimer};

use super::Arguments;
use crate::counters::{Measured, above, measure as count};
use crate::rig::{Ranges, Rig};
use crate::samples::{Metric, Samples};
use ebb_harness::error::{Context, Error, Result};

/// One of the four CPUs of the nested machine is left to the reclaimer.
const VCPUS: usize = 3;

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

fn ranges(count: u64) -> Ranges {
    Ranges {
        size: 64 << 10,
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

/// Discards of ranges that were invalidated before, and that every vCPU has flushed since.
pub fn quiescent(arguments: &Arguments, samples: &mut Samples) -> Result<Vec<(String, f64)>> {
    let rounds = if arguments.quick {
        2
    } else {
        10_000 / arguments.ranges + 1
    };
    let rig = Rig::start(VCPUS, ranges(arguments.ranges), false)?;
    let reclaimer = rig.reclaimer(tuning(ReclaimTuning::default().slice));
    let (mut flushes, mut discarded) = (0, 0);
    let case = ("ebb", "quiescent");
    for _ in 0..rounds {
        rig.free()?;
        reclaimer.invalidate(ALL);
        let found = step(&rig, || reclaimer.discard(ALL))?;
        let kvm = found.measured.found.kvm;
        samples.add(
            case,
            ("flush-requests", ""),
            kvm.remote_tlb_flush_requests as f64,
        );
        samples.add(case, ("flushes", ""), kvm.remote_tlb_flush as f64);
        flushes += kvm.remote_tlb_flush_requests;
        discarded += rig.ranges().count;
    }
    eprintln!("reclaim: {flushes} flush requests for {discarded} quiescent ranges");
    let per_10k = flushes as f64 * 1e4 / discarded as f64;
    Ok(vec![("discard_flushes_per_10k".to_owned(), per_10k)])
}

/// The curve over slices, with one call each under running vCPUs beside it.
pub fn measure(arguments: &Arguments, samples: &mut Samples) -> Result<Vec<(String, f64)>> {
    for &slice in &arguments.slices {
        // What a small slice costs hardly depends on their number, and on an emulated machine it is much.
        let most = arguments.ranges;
        let count = (slice as u64 * 16).clamp(64.min(most), most);
        let rig = Rig::start(VCPUS, ranges(count), false)?;
        let reclaimer = rig.reclaimer(tuning(slice));
        for _ in 0..arguments.runs {
            round(&rig, &reclaimer, slice, samples)?;
        }
        let longest = rig.gate.stats().longest_pause_us as f64 / 1e3;
        samples.add(("ebb", &case(slice, "all")), LONGEST, longest);
        eprintln!("reclaim: slices of {slice} ranges: longest pause {longest:.1} ms");
    }
    if !arguments.quick {
        running(samples)?;
    }
    ratios(samples)
}

fn case(slice: usize, step: &str) -> String {
    format!("slice-{slice:03}/{step}")
}

fn round(rig: &Rig, reclaimer: &Reclaimer, slice: usize, samples: &mut Samples) -> Result<()> {
    let mut add = |name: &str, found: &Step| found.add(("ebb", &case(slice, name)), samples);
    rig.free()?;
    add(INVALIDATE, &step(rig, || reclaimer.invalidate(ALL))?);
    add(DISCARD, &step(rig, || reclaimer.discard(ALL))?);
    rig.free()?;
    add(DIRECT, &step(rig, || reclaimer.discard(ALL))?);
    Ok(())
}

/// One madvise a range, the vCPUs in the guest: what it costs without the gate.
fn running(samples: &mut Samples) -> Result<()> {
    let rig = Rig::start(VCPUS, ranges(64), false)?;
    let all = rig.ranges().all();
    let each = |act: &dyn Fn(ebb_core::range::GpaRange) -> Result<u64>| -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for range in &all {
            outcome.bytes += act(*range)?;
        }
        Ok(outcome)
    };
    let mark = |range| {
        rig.ram
            .release_range(range, Release::MarkFree)
            .context("madvise")
    };
    let discard = |range| {
        rig.ram
            .release_range(range, Release::Discard)
            .context("madvise")
    };
    let mut measure = |name: &str, act: &dyn Fn(_) -> Result<u64>| -> Result<()> {
        let mut outcome = Ok(Outcome::default());
        let found = step(&rig, || {
            outcome = each(act);
            *outcome.as_ref().unwrap_or(&Outcome::default())
        })?;
        found.add(("madvise", &format!("running/{name}")), samples);
        eprintln!("reclaim: running, {name}: {:.2} IPIs a range", found.ipis());
        outcome.map(drop)
    };
    rig.touch()?;
    measure(INVALIDATE, &mark)?;
    measure(DISCARD, &discard)?;
    rig.touch()?;
    measure(DIRECT, &discard)
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

    fn add(&self, case: (&'static str, &str), samples: &mut Samples) {
        let idle = self.measured.idle;
        let noise = (idle.kvm.remote_tlb_flush + idle.calls) as f64 / self.ranges;
        samples.add(case, IPIS, self.ipis());
        samples.add(case, IDLE, noise);
        samples.add(case, KICKS, self.kicks());
        let time = self.measured.time.as_secs_f64() * 1e6 / self.ranges;
        samples.add(case, TIME, time);
        let pauses = |stats: &GateStats| stats.pauses.iter().sum::<u64>();
        let count = pauses(&self.after) - pauses(&self.before);
        if count > 0 {
            let total = (self.after.pause_us_total - self.before.pause_us_total) as f64 / 1e3;
            samples.add(case, PAUSE, total / count as f64);
        }
    }
}

fn ratios(samples: &Samples) -> Result<Vec<(String, f64)>> {
    let of = |slice, step| {
        let case = case(slice, step);
        let found = samples.median("ebb", &case, IPIS.0)?;
        Some(above(found, samples.median("ebb", &case, IDLE.0)?))
    };
    let default = ReclaimTuning::default().slice;
    let mut ratios = Vec::new();
    for (slice, suffix) in [(default, String::new()), (128, "_slice_128".to_owned())] {
        let steps = [INVALIDATE, DISCARD, DIRECT].map(|step| of(slice, step));
        let [Some(invalidate), Some(discard), Some(direct)] = steps else {
            continue;
        };
        let worst = invalidate.max(discard).max(direct);
        for (name, value) in [
            ("", worst),
            ("_invalidate", invalidate),
            ("_discard", discard),
            ("_both_steps", invalidate + discard),
            ("_direct", direct),
        ] {
            ratios.push((format!("ipis_per_range{name}{suffix}"), value));
        }
    }
    if ratios.is_empty() {
        return Err(Error::new("the curve has no point at the default slice"));
    }
    Ok(ratios)
}
