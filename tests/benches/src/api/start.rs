//! Firecracker mode: from the start of the process to the first answer, and from InstanceStart to the guest's init; by requests of
//! ours, and by crate fctools (`tests/clients`).

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Result};
use ebb_harness::firecracker::Firecracker;
use ebb_harness::wait::LONG;
use ebb_harness::{Images, Launch};
use tempfile::TempDir;

use crate::boot::READY;
use crate::results::{Metric, Results};
use crate::start::{Monitor, ask};
use crate::{BenchError, path, system};

const CASE: &str = "firecracker";
const READY_TIME: Metric = ("api-ready", "ms");
const INIT: Metric = ("to-init", "s");
/// The client that others wrote.
const CLIENT: &str = "fctools";
/// From the start of the process until the answer to InstanceStart, all requests before it among it.
const RUNNING: Metric = ("running", "s");
/// Time between two questions.
const PAUSE: Duration = Duration::from_micros(300);

/// Starts the process so many times. It needs no KVM before it has a machine.
pub(super) fn ready(runs: u32, results: &mut Results) -> Result<(), BenchError> {
    let ebb = path("EBB_BIN")?;
    let folder = tempfile::tempdir().map_err(system("make a folder"))?;
    let socket = folder.path().join("api");
    for _ in 0..runs {
        let mut command = Command::new(&ebb);
        command.args(["firecracker", "--api-sock"]).arg(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let start = Instant::now();
        let monitor = Monitor(command.spawn().map_err(system("start ebb"))?);
        while ask(&socket).is_none() && start.elapsed() < LONG {
            sleep(PAUSE);
        }
        let time = start.elapsed().as_secs_f64() * 1e3;
        results.add(("ebb", CASE), READY_TIME, time);
        drop(monitor);
        // As Firecracker's, it stays.
        std::fs::remove_file(&socket).map_err(system("remove the socket"))?;
    }
    if let Some(time) = results.median("ebb", CASE, READY_TIME.0) {
        results.lower("api_ready_ms", time);
    }
    results.note("api_ready_ms: from the start of `ebb firecracker` until it answers GET /");
    Ok(())
}

/// Starts the same guest in both ways, in turn.
pub(super) fn to_init(runs: u32, results: &mut Results) -> Result<()> {
    // They fill the caches, and do not count.
    run()?;
    firecracker()?;
    for _ in 0..runs {
        results.add(("ebb", "run"), INIT, run()?);
        results.add(("ebb", CASE), INIT, firecracker()?);
        let [ready, running, init] = client()?;
        for (metric, time) in [(READY_TIME, ready), (RUNNING, running), (INIT, init)] {
            results.add(("ebb", CLIENT), metric, time);
        }
    }
    if let Some(time) = results.median("ebb", CLIENT, READY_TIME.0) {
        results.lower("fctools_ready_ms", time);
    }
    let of = |case| ["ebb", case, INIT.0];
    results.divide("instance_start_vs_run", of("run"), of(CASE));
    results.divide("fctools_vs_run", of("run"), of(CLIENT));
    results.note("to-init: of `ebb run` from the start of the process, of Firecracker mode from the request InstanceStart; with fctools from the start of the process, with all requests");
    Ok(())
}

fn run() -> Result<f64> {
    let launch = Launch::new()?.mode("poweroff").option("--balloon", BALLOON);
    let start = Instant::now();
    let mut monitor = launch.start()?;
    monitor.console.wait_for(READY, LONG)?;
    let time = start.elapsed().as_secs_f64();
    monitor.wait()?;
    Ok(time)
}

/// What Firecracker mode gives a guest unasked.
const BALLOON: &str = "size=0,deflate_on_oom=off,reporting=lazy";

fn firecracker() -> Result<f64> {
    let mut vm = Firecracker::serve()?;
    let boot = Firecracker::boot_source(vm.images(), "ebb.mode=poweroff");
    vm.put("/boot-source", &boot)?;
    let machine = serde_json::json!({ "vcpu_count": 1, "mem_size_mib": 256 });
    vm.put("/machine-config", &machine)?;
    let start = Instant::now();
    vm.start_instance()?;
    vm.console.wait_for(READY, LONG)?;
    let time = start.elapsed().as_secs_f64();
    vm.wait()?;
    Ok(time)
}

/// The same machine by fctools: the time to its first answer in milliseconds, those to the start and to the init in seconds.
fn client() -> Result<[f64; 3]> {
    let images = Images::from_environment()?;
    let programs = std::env::var_os("EBB_CLIENTS").context("EBB_CLIENTS is not set")?;
    let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let (work, firecracker) = (
        folder.path().join("work"),
        folder.path().join("firecracker"),
    );
    std::fs::create_dir(&work).context("make a folder")?;
    symlink(&images.ebb, &firecracker).context("link the monitor")?;
    let mut command = Command::new(PathBuf::from(programs).join("fctools_start"));
    let output = command.args([work, firecracker]).output();
    let output = output.context(format_args!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let times: Vec<f64> = said.split_whitespace().flat_map(str::parse).collect();
    let wrong = |_| ebb_harness::Error::new(format!("{command:?}: {output:?}"));
    times.try_into().map_err(wrong)
}
