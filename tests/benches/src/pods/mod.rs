//! `ebb-bench pods`: pods of containerd that burst in turn, under one memory limit that does not hold what all of them need at
//! their peaks together: guests of Ebb, containers of runc, and guests that give nothing back. And how long a pod takes to
//! start, beside the same guest in Firecracker's mode.

mod fleet;
mod node;
mod start;

use ebb_harness::containerd::Containerd;
use ebb_harness::error::Result;
use ebb_harness::size::MIB;

use super::BenchError;
use super::results::{Metric, Results};
use fleet::{Fleet, SYSTEMS, System};

/// The memory limit of a pod.
const LIMIT: u64 = 128 * MIB;
/// What a guest has beyond that: `overhead_mib` of docs/kubernetes.md.
const OVERHEAD: u64 = 128 * MIB;
/// What the node has for each pod: less than a pod's kernel and a burst take.
const SHARE: u64 = 136 * MIB;

/// Processes that the kernel has killed because the node's limit was reached.
const OOM_KILLS: Metric = ("oom-kills", "count");
/// Bursts whose program came to its end.
const BURSTS: Metric = ("bursts-done", "count");
/// The most memory that the node's pods had.
const PEAK: Metric = ("peak", "bytes");
/// What they have before the first burst, and a while after the last.
const IDLE: Metric = ("idle", "bytes");
/// A burst, from the start of `ctr` to its end.
const BURST: Metric = ("burst", "s");
/// A pod's start.
const START: Metric = ("start", "s");

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Measure only these systems
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Number of pods
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=64))]
    pods: u32,
    /// How often each pod bursts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// MiB that a burst touches and frees
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u64).range(1..=112))]
    burst_mib: u64,
    /// Starts of each kind that are compared
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=100))]
    starts: u32,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a pod does not start, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    if arguments.starts > 0 {
        start::measure(arguments.starts, &mut results)?;
    }
    for system in SYSTEMS {
        if arguments.only.is_empty() || arguments.only.iter().any(|only| only == system.name()) {
            measure(system, arguments, &mut results)?;
        }
    }
    compare(&mut results, u64::from(arguments.pods));
    results.note(format!(
        "{} pods with a limit of {} MiB each, guests have {} MiB; the node's memory.max is {} MiB; each pod touches and \
         frees {} MiB, one after the other, {} times",
        arguments.pods,
        LIMIT / MIB,
        (LIMIT + OVERHEAD) / MIB,
        limit(arguments.pods) / MIB,
        arguments.burst_mib,
        arguments.rounds
    ));
    results.note("oom_kills, peak: memory.events and memory.peak of the cgroup above all monitors (runc: above all containers)");
    results.report("pods").publish()
}

/// The node's limit.
fn limit(pods: u32) -> u64 {
    u64::from(pods) * SHARE
}

/// One system's pods, under the node's limit.
fn measure(system: System, arguments: &Arguments, results: &mut Results) -> Result<()> {
    let containerd = Containerd::start()?;
    let mut fleet = Fleet::new(&containerd, system, Some(limit(arguments.pods)))?;
    let case = (system.name(), fleet::CASE);
    for _ in 0..arguments.pods {
        results.add(case, START, fleet.add(LIMIT)?.as_secs_f64());
    }
    results.add(case, IDLE, fleet.node.used()? as f64);
    let mut done = 0;
    for round in 0..arguments.rounds {
        for pod in 0..arguments.pods {
            if let Some(time) = fleet.burst(pod, round, arguments.burst_mib * MIB)? {
                results.add(case, BURST, time.as_secs_f64());
                done += 1;
            }
        }
    }
    results.add(case, BURSTS, f64::from(done));
    let (kills, peak) = (fleet.node.oom_kills()?, fleet.node.peak()?);
    results.add(case, OOM_KILLS, kills as f64);
    results.add(case, PEAK, peak as f64);
    eprintln!(
        "pods: {}: {kills} OOM kills, {done} bursts, peak {} MiB",
        system.name(),
        peak / MIB
    );
    fleet.end()
}

/// The figures.
fn compare(results: &mut Results, pods: u64) {
    let of = |metric: Metric| results.median(System::Ebb.name(), fleet::CASE, metric.0);
    let (kills, peak) = (of(OOM_KILLS), of(PEAK));
    if let Some(kills) = kills {
        results.lower("oom_kills", kills);
    }
    if let Some(peak) = peak {
        let all = pods * (LIMIT + OVERHEAD);
        results.lower("peak_vs_static", peak / all as f64);
        results
            .note("peak_vs_static: Ebb's peak, compared with what plain guests have, all together");
    }
    results.divide_cost(
        "start_vs_firecracker_mode",
        [start::POD, start::CASE, START.0],
        [start::FIRECRACKER, start::CASE, START.0],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_of_ebbs_pods_and_costs() {
        let mut results = Results::default();
        for (system, kills, peak) in [(System::Ebb, 0.0, 1280), (System::Plain, 4.0, 1360)] {
            let case = (system.name(), fleet::CASE);
            results.add(case, OOM_KILLS, kills);
            results.add(case, PEAK, (peak * MIB) as f64);
        }
        for (kind, time) in [(start::POD, 6.0), (start::FIRECRACKER, 4.0)] {
            results.add((kind, start::CASE), START, time);
        }
        compare(&mut results, 10);
        let report = results.report("test");
        assert_eq!(report.ratio("oom_kills"), Some(0.0));
        assert_eq!(report.ratio("peak_vs_static"), Some(0.5));
        assert_eq!(report.ratio("start_vs_firecracker_mode"), Some(1.5));
    }

    #[test]
    fn the_node_holds_no_peak_of_all_guests() {
        assert!(limit(10) < 10 * (LIMIT + OVERHEAD) * 6 / 10);
    }
}
