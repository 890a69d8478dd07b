//! `ebb-bench reporting`: what free page reporting costs a guest that takes and frees memory all the time, and
//! what it gives the host.
//!
//! One machine a mode, all at once, driven in turn: the guest of the machine whose turn it is churns, the others are idle.
//! Whose turn is first changes from round to round. Two machines are alike: what differs between those is noise.

use std::time::{Duration, Instant};

use super::BenchError;
use super::results::{Metric, Results, median};
use ebb_harness::api::Metrics;
use ebb_harness::host::{KvmCounters, kvm_counters, kvm_pages, lazy_free, minor_faults, rss};
use ebb_harness::wait::settled;
use ebb_harness::{Guest, Launch, Monitor, Result};

/// The guest's memory.
const MEMORY: &str = "size=512M";

/// The driver reports every 2 s; when it has not for this long, there is nothing left.
const QUIET: Duration = Duration::from_secs(5);

/// Modes and their options.
const MODES: [(&str, &str); 4] = [
    ("off", "size=0"),
    ("off-again", "size=0"),
    ("eager", "size=0,reporting=eager"),
    ("lazy", "size=0,reporting=lazy"),
];

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Turns of each mode
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds that the guest churns in each turn
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// MiB that the guest takes and frees at a time
    #[arg(long, default_value_t = 320, value_parser = clap::value_parser!(u64).range(1..400))]
    mib: u64,
    /// Seconds that the guest rests between taking its memory, so that more of it is reported
    #[arg(long, default_value_t = 0)]
    rest: u32,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    let mut scenes = MODES
        .into_iter()
        .map(|(mode, options)| Scene::start(mode, options))
        .collect::<Result<Vec<_>>>()?;
    for run in 1..=arguments.runs {
        for scene in &mut scenes {
            scene.turn(arguments, &mut results)?;
        }
        scenes.rotate_left(1);
        eprintln!("reporting: run {run} of {}", arguments.runs);
    }
    compare(&mut results);
    results.report("reporting").publish()
}

/// The rates of each mode against those of `off`, round by round: median, smallest and largest.
fn compare(results: &mut Results) {
    for (mode, _) in &MODES[1..] {
        let rates = |mode| results.of(mode, CASE, RATE.0);
        let rounds = rates(mode).iter().zip(rates("off"));
        let rounds: Vec<f64> = rounds.map(|(ours, off)| ours / off).collect();
        let extreme = |pick: fn(f64, f64) -> f64| rounds.iter().copied().reduce(pick);
        for (what, value) in [
            ("", median(&rounds)),
            ("_min", extreme(f64::min)),
            ("_max", extreme(f64::max)),
        ] {
            if let Some(value) = value {
                results.higher(&format!("churn_{mode}_vs_off{what}"), value);
            }
        }
    }
}

/// The case of all rows.
const CASE: &str = "churn";

/// What the guest achieves.
const RATE: Metric = ("rate", "pages/ms");

/// What is counted at one moment.
struct Moment {
    reporting: Metrics,
    kvm: KvmCounters,
    faults: u64,
}

/// One machine.
struct Scene {
    mode: &'static str,
    monitor: Monitor,
    guest: Guest,
}

impl Scene {
    fn start(mode: &'static str, options: &str) -> Result<Self> {
        let launch = Launch::new()?.memory(MEMORY).cpus(2);
        let mut monitor = launch.option("--balloon", options).start()?;
        let mut guest = monitor.guest()?;
        // Every page once, so that no mode pays for the first touch.
        guest.ask("churn 400M 0")?;
        let scene = Self {
            mode,
            monitor,
            guest,
        };
        scene.settle()?;
        Ok(scene)
    }

    /// Waits until nothing is reported any more.
    fn settle(&self) -> Result<()> {
        let api = self.monitor.api();
        let settled = settled("reports", QUIET, || {
            Ok(api.lazy()?["reporting.bytes_total"])
        });
        settled.map(drop)
    }

    fn moment(&self) -> Result<Moment> {
        let pid = self.monitor.pid();
        Ok(Moment {
            reporting: self.monitor.api().lazy()?.part("reporting"),
            kvm: kvm_counters(pid)?,
            faults: minor_faults(pid)?,
        })
    }

    /// Churns, and counts until the last report.
    fn turn(&mut self, arguments: &Arguments, results: &mut Results) -> Result<()> {
        let mode = self.mode;
        let mut add = |metric: Metric, sample: f64| results.add((mode, CASE), metric, sample);
        let before = self.moment()?;
        let (mut pages, mut ms) = (0, 0);
        let start = Instant::now();
        let seconds = u64::from(arguments.seconds);
        // With rests in between, each pass is a request of its own.
        let pass = if arguments.rest > 0 { 0 } else { seconds };
        while ms == 0 || start.elapsed() < Duration::from_secs(seconds) {
            let answer = self
                .guest
                .ask(&format!("churn {}M {pass}", arguments.mib))?;
            pages += value(&answer, "pages=");
            ms += value(&answer, "ms=").max(1);
            std::thread::sleep(Duration::from_secs(arguments.rest.into()));
        }
        let churned = self.moment()?;
        self.settle()?;
        let pid = self.monitor.pid();
        let (rss, free) = (rss(pid)?, lazy_free(pid)?);
        let (small, huge) = kvm_pages(pid)?;
        add(("mapped-4k", ""), small as f64);
        add(("mapped-2m", ""), huge as f64);
        add(RATE, pages as f64 / ms as f64);
        add(("rss", "bytes"), rss as f64);
        add(("rss-free", "bytes"), rss.saturating_sub(free) as f64);
        let (from, to) = (&before.reporting, &churned.reporting);
        add(
            ("reported", "bytes"),
            (to["bytes_total"] - from["bytes_total"]) as f64,
        );
        let calls = to["calls_total"] - from["calls_total"];
        add(("madvise", ""), calls as f64);
        if calls > 0 {
            let ranges = to["ranges_total"] - from["ranges_total"];
            add(("merged", "ranges/call"), ranges as f64 / calls as f64);
        }
        let (from, to) = (before.kvm, churned.kvm);
        let flushes = to.remote_tlb_flush - from.remote_tlb_flush;
        add(("flushes", ""), flushes as f64);
        add(("exits", ""), (to.exits - from.exits) as f64);
        add(("faults", ""), (churned.faults - before.faults) as f64);
        Ok(())
    }
}

/// The number after `name` in the guest's answer; 0 when there is none.
fn value(answer: &str, name: &str) -> u64 {
    let mut words = answer.split_whitespace();
    words
        .find_map(|word| word.strip_prefix(name)?.parse().ok())
        .unwrap_or(0)
}
