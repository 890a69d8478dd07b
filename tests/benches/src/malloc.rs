//! `ebb-bench malloc`: what a heap in an arena costs, compared with the same jemalloc on normal memory, and with Redis as
//! Debian ships it.

use super::BenchError;
use super::report::Report;
use super::results::Results;
use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::{kvm_counters, rss};

/// Threads of the churn, and vCPUs.
const THREADS: u32 = 4;

/// A heap that programs run on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heap {
    /// In an arena.
    Arena,
    /// The same library and jemalloc on normal memory, with jemalloc's decay of 10 s.
    Plain,
    /// The same without decay.
    PlainAtOnce,
    /// Debian's jemalloc, which Debian's Redis is linked with.
    Debian,
}

impl Heap {
    /// System and case in the report.
    const fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Arena => ("ebb", "decay 0"),
            Self::Plain => ("jemalloc", "decay 10 s"),
            Self::PlainAtOnce => ("jemalloc", "decay 0"),
            Self::Debian => ("debian", "as it is"),
        }
    }

    /// The words before a program's.
    const fn words(self) -> &'static str {
        match self {
            Self::Arena => "/tmp/ebb-guest run --no-fork --",
            Self::Plain => "env EBB_QUIET=1 LD_PRELOAD=/tmp/libebb_malloc.so",
            Self::PlainAtOnce => {
                "env EBB_QUIET=1 _RJEM_MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0 LD_PRELOAD=/tmp/libebb_malloc.so"
            }
            Self::Debian => "",
        }
    }

    fn of(self, metric: &str) -> [&str; 3] {
        let (system, case) = self.name();
        [system, case, metric]
    }
}

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
    let arena = Report::read(&super::path("EBB_OUT")?, "arena")?;
    let mut debian = Debian::start(THREADS)?;
    let mut results = Results::default();
    // Another one is first each time.
    let mut heaps = [Heap::Arena, Heap::Plain, Heap::PlainAtOnce];
    let mut servers = [Heap::Arena, Heap::Debian];
    for run in 1..=arguments.runs {
        pair(&mut debian, &mut results)?;
        exits(&mut debian, &mut results, run, arguments.seconds)?;
        churns(&mut debian, &mut results, heaps, arguments.seconds)?;
        for server in servers {
            redis(&mut debian, &mut results, server)?;
        }
        heaps.rotate_left(1);
        servers.rotate_left(1);
        eprintln!("malloc: run {run} of {}", arguments.runs);
    }
    debian.end()?;
    compare(&mut results).context("samples of every heap")?;
    results.note("churn: jemalloc is the same library on normal memory; Redis: as Debian ships it, with Debian's jemalloc");
    let mut report = results.report("malloc");
    report.append(arena);
    report.publish()
}

/// The number behind `name=`.
fn number(text: &str, name: &str) -> Result<f64> {
    let mut words = text.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.and_then(|value| value.split('\\').next()?.parse().ok());
    value.context(format_args!("no number {name} in {text:?}"))
}

/// One lazy_free and reuse of a granule, compared with MADV_DONTNEED.
fn pair(debian: &mut Debian, results: &mut Results) -> Result<()> {
    let said = debian.run("/tmp/ebb-guest bench /dev/dax0.0")?;
    for (name, unit) in [
        ("pair_ns", "ns"),
        ("pair_cycles", "cycles"),
        ("pair_instructions", ""),
        ("pair_vs_dontneed", ""),
    ] {
        results.add(("ebb", "pair"), (name, unit), number(&said, name)?);
    }
    Ok(())
}

/// Exits of the vCPUs during millions of pairs, and while one of them is as busy for as long with nothing: clock ticks, and
/// the console.
fn exits(debian: &mut Debian, results: &mut Results, run: u32, seconds: u32) -> Result<()> {
    let pid = debian.monitor.pid();
    let mut both = [("ebb", "pairs"), ("idle", "spin")];
    both.rotate_left(run as usize % 2);
    for (system, what) in both {
        let before = kvm_counters(pid)?.exits;
        let command = format!("/tmp/ebb-guest bench /dev/dax0.0 {what} {seconds}");
        let said = debian.run(&command)?;
        let exits = kvm_counters(pid)?.exits - before;
        results.add((system, "pair"), ("exits", ""), exits as f64);
        results.add((system, "pair"), ("pairs", ""), number(&said, "pairs")?);
    }
    Ok(())
}

/// The churn on each heap, and an idle one for the interrupts that come anyway.
fn churns(
    debian: &mut Debian,
    results: &mut Results,
    heaps: [Heap; 3],
    seconds: u32,
) -> Result<()> {
    let idle = debian.run(&format!("/tmp/ebb-churn 0 {seconds}"))?;
    results.add(
        ("idle", ""),
        ("shootdowns", ""),
        number(&idle, "shootdowns")?,
    );
    for heap in heaps {
        let words = heap.words();
        let said = debian.run(&format!("{words} /tmp/ebb-churn {THREADS} {seconds}"))?;
        let throughput = number(&said, "ops")? / number(&said, "seconds")?;
        results.add(heap.name(), ("throughput", "1/s"), throughput);
        for name in ["shootdowns", "faults"] {
            results.add(heap.name(), (name, ""), number(&said, name)?);
        }
    }
    Ok(())
}

/// Redis on a heap. Of the one in the arena also what is left after FLUSHALL and a reclaim of what the host has given for
/// it (RSS of the monitor above that before).
fn redis(debian: &mut Debian, results: &mut Results, heap: Heap) -> Result<()> {
    let (pid, api) = (debian.monitor.pid(), debian.monitor.api());
    api.reclaim(8 << 30)?;
    let idle = rss(pid)?;
    let command = format!("start {KEYS} {}", heap.words());
    let said = debian.run(&format!("bash /tmp/redis-speed.sh {command}"))?;
    for name in ["set", "get"] {
        results.add(heap.name(), (name, "1/s"), number(&said, name)?);
    }
    if heap == Heap::Arena {
        let full = rss(pid)?.saturating_sub(idle);
        debian.run("bash /tmp/redis-speed.sh flush")?;
        api.reclaim(8 << 30)?;
        let left = rss(pid)?.saturating_sub(idle) as f64 / full as f64;
        results.add(heap.name(), ("left_after_flushall", ""), left);
    }
    debian.run("bash /tmp/redis-speed.sh end")?;
    Ok(())
}

fn compare(results: &mut Results) -> Option<()> {
    let of =
        |results: &Results, [system, case, metric]: [&str; 3]| results.median(system, case, metric);
    let exits = of(results, ["ebb", "pair", "exits"])? - of(results, ["idle", "pair", "exits"])?;
    let millions = of(results, ["ebb", "pair", "pairs"])? / 1e6;
    results.lower("exits_per_million_pairs", exits / millions);
    let instructions = of(results, ["ebb", "pair", "pair_instructions"])?;
    results.lower("pair_instructions", instructions);
    let vs_dontneed = of(results, ["ebb", "pair", "pair_vs_dontneed"])?;
    results.higher("pair_vs_dontneed", vs_dontneed);
    let shootdowns = of(results, Heap::Arena.of("shootdowns"))?;
    let above = shootdowns - of(results, ["idle", "", "shootdowns"])?;
    results.lower("shootdowns_above_idle", above);
    for (name, metric, other) in [
        ("churn_vs_plain", "throughput", Heap::Plain),
        ("churn_vs_decay_0", "throughput", Heap::PlainAtOnce),
        ("redis_set", "set", Heap::Debian),
        ("redis_get", "get", Heap::Debian),
    ] {
        let value = of(results, Heap::Arena.of(metric))? / of(results, other.of(metric))?;
        results.higher(name, value);
    }
    results.smallest("redis_ops", &["redis_set", "redis_get"]);
    let left = of(results, Heap::Arena.of("left_after_flushall"))?;
    results.lower("left_after_flushall", left);
    Some(())
}
