//! A guest that makes calls, good, bad and meaningless ones, as fast as it can: what it costs the monitor, and another
//! machine beside it.
//!
//! A million calls a second take a real processor; an emulated one reaches some thousand. The test storms for
//! [`SECONDS`]; `EBB_STORM_SECONDS=60` makes it a minute (`cargo xtask exec -- env EBB_STORM_SECONDS=60 BINARY`).

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ebb_harness::error::Context;
use ebb_harness::payload_vm::{PayloadVm, Setup};
use ebb_harness::size::MIB;
use ebb_harness::{Api, Result};
use ebb_payload::freestanding::{Task, marker};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const LIMIT: Duration = Duration::from_secs(120);
/// Seconds with the storm, in all.
const SECONDS: u64 = 12;
/// Turns with the storm, each followed by one without.
const TURNS: u64 = 6;

/// Starts a machine on one CPU, the `nth` of those that this process may use: what is started inherits it.
fn start_on(nth: usize, task: Task, mib: u64) -> Result<PayloadVm> {
    let before = sched_getaffinity(None).context("sched_getaffinity")?;
    let mut allowed = (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu));
    let mut only = CpuSet::new();
    only.set(allowed.nth(nth).context("too few CPUs")?);
    sched_setaffinity(None, &only).context("sched_setaffinity")?;
    let setup = Setup {
        task,
        vcpus: 1,
        mib,
        shared: false,
        operations: 0,
        seed: 1,
    };
    let vm = PayloadVm::start(setup, &["--lazy", "mode=pressure"]);
    sched_setaffinity(None, &before).context("sched_setaffinity")?;
    let mut vm = vm?;
    vm.wait_for(marker::READY, LIMIT)?;
    Ok(vm)
}

/// Memory of the monitor and of its guest, which touches nothing new, in bytes.
fn anonymous(vm: &PayloadVm) -> Result<u64> {
    let path = format!("/proc/{}/status", vm.pid());
    let status = fs::read_to_string(&path).context(&path)?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context(path)? * 1024)
}

fn calls(api: &Api) -> Result<(u64, u64)> {
    let state = api.get("/lazy-memory")?;
    let calls = &state["hypercalls"];
    let failed = calls["failed_total"].as_u64().unwrap_or(0);
    let good = ["lazy_free_total", "reuse_total", "query_total"];
    Ok((
        good.iter().filter_map(|name| calls[*name].as_u64()).sum(),
        failed,
    ))
}

fn signal(vm: &PayloadVm, signal: Signal) -> Result<()> {
    let pid = i32::try_from(vm.pid()).ok().and_then(Pid::from_raw);
    kill_process(pid.context("no pid")?, signal).context("signal the monitor")
}

/// The median of what the meter says in `time`, in cycles.
fn median(meter: &PayloadVm, time: Duration) -> Result<u64> {
    let before = ebb_payload::results(&meter.serial()).len();
    sleep(time);
    let mut said = ebb_payload::results(&meter.serial()).split_off(before);
    said.sort_unstable();
    said.get(said.len() / 2)
        .copied()
        .context("the meter says nothing")
}

#[test]
fn a_storm_of_calls_costs_nobody_else() -> Result<()> {
    let seconds = std::env::var("EBB_STORM_SECONDS").ok();
    let seconds = seconds
        .and_then(|text| text.parse().ok())
        .unwrap_or(SECONDS);
    let turn = Duration::from_secs(seconds) / TURNS as u32;
    let storm = start_on(0, Task::Storm, 144)?;
    let meter = start_on(2, Task::Meter, 64)?;
    let api = storm.api();
    let (before, (good, failed), lines) = (
        anonymous(&storm)?,
        calls(&api)?,
        storm.log().lines().count(),
    );
    let (mut with, mut without, mut stormed) = (Vec::new(), Vec::new(), Duration::ZERO);
    for _ in 0..TURNS {
        let start = Instant::now();
        with.push(median(&meter, turn)?);
        signal(&storm, Signal::STOP)?;
        stormed += start.elapsed();
        without.push(median(&meter, turn)?);
        signal(&storm, Signal::CONT)?;
    }
    let after = anonymous(&storm).map_err(|error| storm.explain(&error))?;
    let (good_after, failed_after) = calls(&api)?;
    let lines = storm.log().lines().count() - lines;
    with.sort_unstable();
    without.sort_unstable();
    let ratio = with[with.len() / 2] as f64 / without[without.len() / 2] as f64;
    let seconds = stormed.as_secs_f64();
    println!(
        "{:.0} calls/s ({} good, {} failed in {seconds:.1} s); monitor grew by {} KiB; {lines} lines; the other machine's \
         time with / without: {ratio:.3} ({with:?} / {without:?})",
        (good_after - good + failed_after - failed) as f64 / seconds,
        good_after - good,
        failed_after - failed,
        after.saturating_sub(before) / 1024,
    );
    assert!(good_after > good && failed_after > failed);
    assert!(after <= before + MIB, "{before} bytes, then {after}");
    assert!(
        lines as f64 <= 10.0 * seconds,
        "{lines} lines in {seconds} s"
    );
    // Emulated CPUs share fewer real ones with whatever else runs there, which is noise of more than a tenth.
    let bound = if std::env::var("EBB_PLATFORM").is_ok_and(|platform| platform == "direct") {
        1.1
    } else {
        1.3
    };
    assert!(ratio <= bound, "{ratio}: {with:?} / {without:?}");
    Ok(())
}
