//! `ebb-bench malloc`: what a heap in an arena costs, beside the same jemalloc on normal memory.

use super::BenchError;
use super::arena;
use super::report::{Host, Ratio, Report};
use super::samples::Samples;
use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::{kvm_counters, rss};

/// Threads of the churn, and vCPUs.
const THREADS: u32 = 4;

/// The heaps: name, case, and the environment that makes it.
const HEAPS: [(&str, &str, &str); 3] = [
    ("ebb", "decay 0", ""),
    ("jemalloc", "decay 10 s", "EBB_FORK=off"),
    (
        "jemalloc",
        "decay 0",
        "EBB_FORK=off _RJEM_MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0",
    ),
];

/// Values of 4 KiB that Redis holds before it forgets all of them.
const KEYS: u32 = 65_536;

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each heap
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds of each churn
    #[arg(long, default_value_t = 4)]
    seconds: u32,
}

/// Runs it, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: the machine does not start, or a program fails.
pub fn run(arguments: &Arguments) -> std::result::Result<(), BenchError> {
    let out = super::path("EBB_OUT")?;
    let big = arena::found(&out)?;
    let mut debian = Debian::start(THREADS)?;
    let mut samples = Samples::default();
    for run in 1..=arguments.runs {
        pair(&mut debian, &mut samples)?;
        exits(&mut debian, &mut samples, arguments.seconds)?;
        churns(&mut debian, &mut samples, arguments.seconds)?;
        redis(&mut debian, &mut samples)?;
        eprintln!("malloc: run {run} of {}", arguments.runs);
    }
    debian.end()?;
    let ratios = ratios(&samples).context("samples of every heap")?;
    let report = Report {
        name: "malloc".to_owned(),
        host: Host::probe(),
        rows: samples.rows().into_iter().chain(big.rows).collect(),
        ratios: ratios.into_iter().chain(big.ratios).collect(),
    };
    println!("{report}");
    let path = report.write(&out)?;
    println!("written to {}", path.display());
    Ok(())
}

/// The number behind `name=`.
fn number(text: &str, name: &str) -> Result<f64> {
    let mut words = text.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.and_then(|value| value.split('\\').next()?.parse().ok());
    value.context(format_args!("no number {name} in {text:?}"))
}

/// One lazy_free and reuse of a granule, beside MADV_DONTNEED.
fn pair(debian: &mut Debian, samples: &mut Samples) -> Result<()> {
    let said = debian.run("/tmp/ebb-guest bench /dev/dax0.0")?;
    for (name, unit) in [
        ("pair_ns", "ns"),
        ("pair_cycles", "cycles"),
        ("pair_instructions", ""),
        ("pair_vs_dontneed", ""),
    ] {
        samples.add(("ebb", "pair"), (name, unit), number(&said, name)?);
    }
    Ok(())
}

/// Exits of the vCPUs during millions of pairs, and while one of them is as busy for as long with nothing: clock ticks, and
/// the console.
fn exits(debian: &mut Debian, samples: &mut Samples, seconds: u32) -> Result<()> {
    let pid = debian.monitor.pid();
    for (system, what) in [("ebb", "pairs"), ("idle", "spin")] {
        let before = kvm_counters(pid)?.exits;
        let command = format!("/tmp/ebb-guest bench /dev/dax0.0 {what} {seconds}");
        let said = debian.run(&command)?;
        let exits = kvm_counters(pid)?.exits - before;
        samples.add((system, "pair"), ("exits", ""), exits as f64);
        samples.add((system, "pair"), ("pairs", ""), number(&said, "pairs")?);
    }
    Ok(())
}

/// The churn on each heap, and an idle one for the interrupts that come anyway.
fn churns(debian: &mut Debian, samples: &mut Samples, seconds: u32) -> Result<()> {
    let idle = debian.run(&format!("/tmp/ebb-churn 0 {seconds}"))?;
    samples.add(
        ("idle", ""),
        ("shootdowns", ""),
        number(&idle, "shootdowns")?,
    );
    for (system, case, environment) in HEAPS {
        let said = debian.run_on_arena(&format!(
            "env {environment} /tmp/ebb-churn {THREADS} {seconds}"
        ))?;
        let throughput = number(&said, "ops")? / number(&said, "seconds")?;
        samples.add((system, case), ("throughput", "1/s"), throughput);
        for name in ["shootdowns", "faults"] {
            samples.add((system, case), (name, ""), number(&said, name)?);
        }
    }
    Ok(())
}

/// Redis with its heap in the arena, and with jemalloc's own. Of the first, what is left after FLUSHALL and a reclaim of
/// what the host has given for it (RSS of the monitor above that before).
fn redis(debian: &mut Debian, samples: &mut Samples) -> Result<()> {
    let (pid, api) = (debian.monitor.pid(), debian.monitor.api());
    for (system, case, environment) in [HEAPS[0], HEAPS[1]] {
        api.reclaim(8 << 30)?;
        let idle = rss(pid)?;
        let command = format!("start {KEYS} env {environment} /tmp/ebb-guest run --");
        let said = debian.run(&format!("bash /tmp/redis-speed.sh {command}"))?;
        for name in ["set", "get"] {
            samples.add((system, case), (name, "1/s"), number(&said, name)?);
        }
        if system == HEAPS[0].0 {
            let full = rss(pid)?.saturating_sub(idle);
            debian.run("bash /tmp/redis-speed.sh flush")?;
            api.reclaim(8 << 30)?;
            let left = rss(pid)?.saturating_sub(idle) as f64 / full as f64;
            samples.add((system, case), ("left_after_flushall", ""), left);
        }
        debian.run("bash /tmp/redis-speed.sh end")?;
    }
    Ok(())
}

fn ratios(samples: &Samples) -> Option<Vec<Ratio>> {
    let of = |case: usize, metric: &str| {
        let (system, name, _) = HEAPS[case];
        samples.median(system, name, metric)
    };
    let compared = |metric: &str, other: usize| Some(of(0, metric)? / of(other, metric)?);
    let shootdowns = samples.median("ebb", "decay 0", "shootdowns")?;
    let ratio = |name: &str, value| Ratio {
        name: name.to_owned(),
        value,
    };
    let more_exits =
        samples.median("ebb", "pair", "exits")? - samples.median("idle", "pair", "exits")?;
    let millions = samples.median("ebb", "pair", "pairs")? / 1e6;
    Some(vec![
        ratio("exits_per_million_pairs", more_exits / millions),
        ratio(
            "pair_instructions",
            samples.median("ebb", "pair", "pair_instructions")?,
        ),
        ratio(
            "pair_vs_dontneed",
            samples.median("ebb", "pair", "pair_vs_dontneed")?,
        ),
        ratio(
            "shootdowns_above_idle",
            shootdowns - samples.median("idle", "", "shootdowns")?,
        ),
        ratio("churn_vs_plain", compared("throughput", 1)?),
        ratio("churn_vs_decay_0", compared("throughput", 2)?),
        ratio("redis_set", compared("set", 1)?),
        ratio("redis_get", compared("get", 1)?),
        ratio("left_after_flushall", of(0, "left_after_flushall")?),
    ])
}
