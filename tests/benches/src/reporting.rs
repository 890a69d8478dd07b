//! `ebb-bench reporting`: what free page reporting costs a guest that takes and frees memory all the time, and
//! what it gives the host.
//!
//! One machine a mode, all at once, driven in turn: the guest of the machine whose turn it is churns, the others are idle.
//! Whose turn is first changes from round to round. Two machines are alike: what differs between those is noise.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::report::{Host, Ratio, Report, Row};
use super::{BenchError, path};
use ebb_harness::api::Reporting;
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
    let out = path("EBB_OUT")?;
    let mut scenes = MODES
        .into_iter()
        .map(|(mode, options)| {
            Scene::start(mode, options).or_else(|error| {
                // An emulated machine breaks a guest's boot now and then; a second time is no accident.
                eprintln!("reporting: {mode}: once more after: {error}");
                Scene::start(mode, options)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    for run in 1..=arguments.runs {
        for scene in &mut scenes {
            scene.turn(arguments)?;
        }
        scenes.rotate_left(1);
        eprintln!("reporting: run {run} of {}", arguments.runs);
    }
    let mut report = Report {
        name: "reporting".to_owned(),
        host: Host::probe(),
        rows: scenes.iter().flat_map(Scene::rows).collect(),
        ratios: Vec::new(),
    };
    report.ratios = ratios(&scenes);
    println!("{report}");
    let path = report.write(&out)?;
    println!("written to {}", path.display());
    Ok(())
}

/// The rates of each mode against those of `off`, round by round: median, smallest and largest.
fn ratios(scenes: &[Scene]) -> Vec<Ratio> {
    let rates = |mode: &str| {
        let scene = scenes.iter().find(|scene| scene.mode == mode)?;
        scene.samples.get(&RATE)
    };
    let mut ratios = Vec::new();
    for (mode, _) in &MODES[1..] {
        let (Some(ours), Some(off)) = (rates(mode), rates("off")) else {
            continue;
        };
        let rounds: Vec<f64> = ours.iter().zip(off).map(|(a, b)| a / b).collect();
        let row = Row::new((mode, "churn"), ("vs_off", ""), &rounds);
        for (what, value) in row
            .iter()
            .flat_map(|row| [("", row.median), ("_min", row.min), ("_max", row.max)])
        {
            let name = format!("churn_{mode}_vs_off{what}");
            ratios.push(Ratio { name, value });
        }
    }
    ratios
}

/// What the guest achieves.
const RATE: (&str, &str) = ("rate", "pages/ms");

/// What is counted at one moment.
struct Moment {
    reporting: Reporting,
    kvm: KvmCounters,
    faults: u64,
}

/// One machine and its samples, by metric and unit.
struct Scene {
    mode: &'static str,
    monitor: Monitor,
    guest: Guest,
    samples: BTreeMap<(&'static str, &'static str), Vec<f64>>,
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
            samples: BTreeMap::new(),
        };
        scene.settle()?;
        Ok(scene)
    }

    /// Waits until nothing is reported any more.
    fn settle(&self) -> Result<()> {
        let api = self.monitor.api();
        let settled = settled("reports", QUIET, || Ok(api.lazy()?.reporting.bytes_total));
        settled.map(drop)
    }

    fn moment(&self) -> Result<Moment> {
        let pid = self.monitor.pid();
        Ok(Moment {
            reporting: self.monitor.api().lazy()?.reporting,
            kvm: kvm_counters(pid)?,
            faults: minor_faults(pid)?,
        })
    }

    /// Churns, and counts until the last report.
    fn turn(&mut self, arguments: &Arguments) -> Result<()> {
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
        self.add(("mapped-4k", ""), small as f64);
        self.add(("mapped-2m", ""), huge as f64);
        self.add(RATE, pages as f64 / ms as f64);
        self.add(("rss", "bytes"), rss as f64);
        self.add(("rss-free", "bytes"), rss.saturating_sub(free) as f64);
        let (from, to) = (&before.reporting, &churned.reporting);
        self.add(
            ("reported", "bytes"),
            (to.bytes_total - from.bytes_total) as f64,
        );
        let calls = to.calls_total - from.calls_total;
        self.add(("madvise", ""), calls as f64);
        if calls > 0 {
            let ranges = to.ranges_total - from.ranges_total;
            self.add(("merged", "ranges/call"), ranges as f64 / calls as f64);
        }
        let (from, to) = (before.kvm, churned.kvm);
        let flushes = to.remote_tlb_flush - from.remote_tlb_flush;
        self.add(("flushes", ""), flushes as f64);
        self.add(("exits", ""), (to.exits - from.exits) as f64);
        self.add(("faults", ""), (churned.faults - before.faults) as f64);
        Ok(())
    }

    fn add(&mut self, metric: (&'static str, &'static str), sample: f64) {
        self.samples.entry(metric).or_default().push(sample);
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(metric, samples): (&(_, _), &Vec<f64>)| {
            Row::new((self.mode, "churn"), *metric, samples)
        };
        self.samples.iter().filter_map(row).collect()
    }
}

/// The number after `name` in the guest's answer; 0 when there is none.
fn value(answer: &str, name: &str) -> u64 {
    let mut words = answer.split_whitespace();
    words
        .find_map(|word| word.strip_prefix(name)?.parse().ok())
        .unwrap_or(0)
}
