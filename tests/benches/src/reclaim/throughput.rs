//! Reclaim of touched memory from a live machine, compared with a plain madvise of as much memory that no machine
//! has ever had, and of as much that a machine has whose vCPUs are out: what KVM's own mappings cost.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_core::range::GpaRange;
use ebb_core::release::Release;
use ebb_vmm::reclaim::ReclaimTuning;
use ebb_vmm::sys::{Mapping, MappingKind};

use super::Arguments;
use crate::results::{Metric, Results};
use crate::rig::{FIRST, Ranges, Rig};
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::LONG;

const RATE: Metric = ("rate", "MiB/s");
const WORK: Metric = ("guest-work", "/us");
const WORK_ALONE: Metric = ("guest-work-alone", "/us");

/// One vCPU: with the reclaimer that is one thread for each core below the nested machine.
const VCPUS: usize = 1;

/// Both cases, in turn with the other two.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    let cases = [
        ("blocks-2m", true, arguments.mib * 4),
        ("pages-4k", false, arguments.mib),
    ];
    for (case, thp, mib) in cases {
        let bytes = mib << 20;
        for run in 0..arguments.runs {
            // Another one is first each time.
            if run % 2 == 0 {
                results.add(("plain", case), RATE, plain(bytes, thp)?);
            }
            live((case, bytes, thp), results)?;
            results.add(("mapped", case), RATE, mapped(bytes, thp)?);
            if run % 2 == 1 {
                results.add(("plain", case), RATE, plain(bytes, thp)?);
            }
            eprintln!("reclaim: throughput, {case}, run {}", run + 1);
        }
        let ours = ["ebb", case, RATE.0];
        for (name, system) in [(RAW, "plain"), ("reclaim_vs_mapped", "mapped")] {
            let theirs = [system, case, RATE.0];
            results.divide_rounds(&format!("{name}_{case}"), ours, theirs)?;
        }
        let (during, alone) = (["ebb", case, WORK.0], ["ebb", case, WORK_ALONE.0]);
        results.divide_rounds(&format!("guest_work_during_{case}"), during, alone)?;
    }
    let both = cases.map(|(case, ..)| format!("{RAW}_{case}"));
    results.smallest(RAW, &[&both[0], &both[1]]);
    Ok(())
}

/// Reclaim's figure, for each case and as a whole.
const RAW: &str = "reclaim_vs_raw";

/// A process that keeps a core as busy as a vCPU does.
struct Busy(Child);

impl Busy {
    fn start() -> Result<Self> {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "while :; do :; done"])
            .stdin(Stdio::null());
        shell.spawn().map(Self).context("sh")
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// MiB a second of one madvise by one thread, as reclaim of so much memory is one thread's work.
fn plain(bytes: u64, thp: bool) -> Result<f64> {
    let _busy = Busy::start()?;
    let len = usize::try_from(bytes).context("size")?;
    let mapping = Mapping::new(len, 0, MappingKind::Small).context("mmap")?;
    mapping.set_transparent_huge_pages(thp).context("madvise")?;
    mapping.populate().context("populate")?;
    let start = Instant::now();
    mapping
        .release(0, len, Release::Discard)
        .context("madvise")?;
    Ok(rate(bytes, start.elapsed()))
}

/// Blocks of 2 MiB, one behind the other.
const fn blocks(bytes: u64) -> Ranges {
    const RANGE: u64 = 2 << 20;
    Ranges {
        size: RANGE,
        stride: RANGE,
        count: bytes / RANGE,
    }
}

/// [`plain`] of a machine's memory, of which KVM has mapped every page, while no vCPU is in the guest.
fn mapped(bytes: u64, thp: bool) -> Result<f64> {
    let rig = Rig::start(VCPUS, blocks(bytes), thp)?;
    rig.touch()?;
    let _busy = Busy::start()?;
    let hold = rig.gate.hold(LONG).ok().context("the vCPU is not out")?;
    let all = GpaRange::new(FIRST, FIRST + bytes).context("no ranges")?;
    let start = Instant::now();
    rig.ram
        .release_range(all, Release::Discard)
        .context("madvise")?;
    let rate = rate(bytes, start.elapsed());
    drop(hold);
    Ok(rate)
}

fn live((case, bytes, thp): (&str, u64, bool), results: &mut Results) -> Result<()> {
    let rig = Rig::start(VCPUS, blocks(bytes), thp)?;
    rig.free()?;
    let reclaimer = rig.reclaimer(ReclaimTuning::default());
    let (before, start) = (rig.work(0)?, Instant::now());
    let outcome = reclaimer.reclaim(u64::MAX);
    let (after, time) = (rig.work(0)?, start.elapsed());
    std::thread::sleep(time);
    let (later, alone) = (rig.work(0)?, start.elapsed() - time);
    if outcome.bytes != bytes {
        return Err(Error::new(format!("not all was taken: {outcome:?}")));
    }
    let per_us = |from: u32, to: u32, time: Duration| {
        f64::from(to.wrapping_sub(from)) / time.as_secs_f64() / 1e6
    };
    results.add(("ebb", case), RATE, rate(bytes, time));
    results.add(("ebb", case), WORK, per_us(before, after, time));
    results.add(("ebb", case), WORK_ALONE, per_us(after, later, alone));
    results.add(("ebb", case), ("madvise", ""), outcome.calls as f64);
    Ok(())
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}
