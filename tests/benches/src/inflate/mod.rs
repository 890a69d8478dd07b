//! `ebb-bench inflate`: a guest touches and frees memory; how long the host takes to have it, and the processors' time for it.
//! QEMU's balloon, its virtio-mem and its free page reporting, and Ebb's ways.

mod ebb;
mod qemu;

use std::fs;
use std::time::{Duration, Instant};

use ebb_harness::Guest;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::rss_estimate;
use ebb_harness::size::MIB;
use ebb_harness::wait::until_often;

use super::BenchError;
use super::results::{Metric, Results};

/// What the guest touches and frees.
const TOUCHED: &str = "768M";
/// What the host gets of it.
const TAKEN: u64 = 512 * MIB;
/// What a balloon is asked for: it may begin with the 256 MiB that the guest has never touched, which give the host nothing.
const INFLATED: u64 = 768 * MIB;
/// The guest itself uses a little memory for the first time meanwhile.
const SLACK: u64 = 8 * MIB;
/// No way takes this long.
const LIMIT: Duration = Duration::from_secs(400);

const CASE: &str = "512 MiB";
/// From the request until the host has the memory.
const TIME: Metric = ("time", "s");
/// Of all processors, for the monitor and its guest.
const CPU: Metric = ("cpu", "s");
/// The guest's part of that, counted in clock ticks.
const GUEST_CPU: Metric = ("guest-cpu", "s");

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each way
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure only these ways, such as `ebb-free-lists,qemu-balloon`
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

/// A way in which the host gets memory: a machine of its own.
trait Way {
    /// Its name in the report.
    fn name(&self) -> &'static str;
    /// The monitor's process.
    fn pid(&self) -> u32;
    /// The cgroup that its processes are in.
    fn cgroup(&self) -> &Cgroup;
    /// Drives the guest.
    fn guest(&mut self) -> &mut Guest;
    /// The guest has freed its memory: whatever comes before the host asks.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }
    /// The host asks.
    fn ask(&mut self) -> Result<()>;
    /// Makes the guest as it was.
    fn undo(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Starts the machine of a way.
type Start = fn(Cgroup) -> Result<Box<dyn Way>>;

const WAYS: [(&str, Start); 7] = [
    ("qemu-balloon", qemu::balloon),
    ("qemu-virtio-mem", qemu::virtio_mem),
    ("qemu-reports", qemu::reports),
    ("ebb-lazy", ebb::lazy),
    ("ebb-free-lists", ebb::free_lists),
    ("ebb-balloon", ebb::balloon),
    ("ebb-reports", ebb::reports),
];

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    let only = &arguments.only;
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| only == name);
    for (name, start) in WAYS.into_iter().filter(|(name, _)| wanted(name)) {
        let mut way = start(Cgroup::counting(name)?)?;
        for run in 1..=arguments.runs {
            round(&mut *way, &mut results)?;
            eprintln!("inflate: {name}, run {run} of {}", arguments.runs);
        }
    }
    results.note(
        "time: from the host's request (for reports: from the guest's freeing) until the monitor's RSS has fallen by 512 MiB",
    );
    let of = |system| [system, CASE, TIME.0];
    for (name, way, other) in [
        ("vs_balloon", "ebb-free-lists", "qemu-balloon"),
        ("vs_virtio_mem", "ebb-free-lists", "qemu-virtio-mem"),
        ("vs_reports", "ebb-free-lists", "qemu-reports"),
        ("lazy_vs_balloon", "ebb-lazy", "qemu-balloon"),
        ("lazy_vs_virtio_mem", "ebb-lazy", "qemu-virtio-mem"),
        ("balloon_vs_balloon", "ebb-balloon", "qemu-balloon"),
        ("reports_vs_reports", "ebb-reports", "qemu-reports"),
    ] {
        results.divide(name, of(other), of(way));
    }
    results.report("inflate").publish()
}

/// The guest touches and frees its memory, and the host gets it.
fn round(way: &mut dyn Way, results: &mut Results) -> Result<()> {
    way.guest().ask(&format!("fill {TOUCHED}"))?;
    let pid = way.pid();
    let full = rss_estimate(pid)?;
    way.guest().ask("drop")?;
    way.prepare()?;
    let (cpu, guest) = (way.cgroup().cpu_seconds()?, guest_seconds(pid)?);
    let start = Instant::now();
    way.ask()?;
    until_often(format_args!("{}: the memory", way.name()), LIMIT, || {
        let gone = full.saturating_sub(rss_estimate(pid)?);
        Ok((gone + SLACK >= TAKEN).then_some(()))
    })?;
    let time = start.elapsed().as_secs_f64();
    let system = (way.name(), CASE);
    results.add(system, TIME, time);
    results.add(system, CPU, way.cgroup().cpu_seconds()? - cpu);
    results.add(system, GUEST_CPU, guest_seconds(pid)? - guest);
    way.undo()
}

/// Processors' time of a machine's guest, see proc_pid_stat(5).
fn guest_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).context(&path)?;
    let ticks = text
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(40)?.parse::<u64>().ok());
    let ticks = ticks.context(format_args!("{path}: {text:?}"))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}
