//! `ebb-bench integrity`: the integrity run of the tests, as long as one likes. It fails when anything is lost.

use std::time::Duration;

use super::BenchError;
use super::results::Results;
use ebb_harness::integrity::{Outcome, cases, run as run_case};
use ebb_harness::{free_pages, programs};

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Ranges that are freed or reused, in all
    #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1000..))]
    operations: u64,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run only the machine of this number, from 0 on
    #[arg(long)]
    only: Option<usize>,
    /// Instead: so many operations of stock guests that check their memory while their free lists are taken
    #[arg(long, value_parser = clap::value_parser!(u64).range(100..))]
    free_pages: Option<u64>,
    /// Instead: the programs of a Debian with systemd, which check their own data, while its free lists are taken
    #[arg(long)]
    programs: bool,
    /// With --programs: how many times as much as in a short run
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..1000))]
    times: u32,
    /// Seconds that one machine may take
    #[arg(long, default_value_t = 3000)]
    limit: u64,
}

/// Runs it, prints what each machine has shown and writes the report.
///
/// # Errors
/// [`BenchError`]: a machine did not come to its end, or something was lost.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    if arguments.programs {
        return run_programs(arguments);
    }
    if let Some(operations) = arguments.free_pages {
        return run_free_pages(arguments, operations);
    }
    let cases = cases(arguments.operations, arguments.seed)
        .into_iter()
        .enumerate();
    let mut outcomes = Vec::new();
    for (index, case) in cases {
        if arguments.only.is_some_and(|only| only != index) {
            continue;
        }
        let outcome = run_case(case, Duration::from_secs(arguments.limit))?;
        println!("{outcome}");
        outcomes.push(outcome);
    }
    outcomes.iter().try_for_each(Outcome::check)?;
    let sum = |count: fn(&Outcome) -> u64| outcomes.iter().map(count).sum::<u64>() as f64;
    let mut results = Results::default();
    for outcome in &outcomes {
        let case = format!("{} vCPUs", outcome.case.vcpus);
        for (metric, value) in [
            ("operations", outcome.counts.operations),
            ("calls", outcome.counts.calls),
            ("discarded-mib", outcome.discarded >> 20),
            ("invalidated-mib", outcome.unmapped >> 20),
        ] {
            results.add((outcome.case.lazy, &case), (metric, ""), value as f64);
        }
    }
    results.higher("operations", sum(|o| o.counts.operations));
    results.lower("lost_pages", sum(|o| o.counts.lost));
    results.lower("foreign_bytes", sum(|o| o.counts.foreign_bytes));
    results.report("integrity").publish()
}

/// The run of programs; it fails when one of them finds anything wrong.
fn run_programs(arguments: &Arguments) -> Result<(), BenchError> {
    let checked = programs::run(&programs::PARTS, (arguments.times, 2), |part| {
        println!("{part}");
    })?;
    let mut results = Results::default();
    for part in &checked {
        let system = ("free-lists", part.part.name);
        results.add(system, ("orders", ""), part.orders as f64);
        results.add(system, ("taken", "bytes"), part.taken as f64);
        results.add(system, ("time", "s"), part.time.as_secs_f64());
        results.note(format!("{}: {}", part.part.name, part.said));
    }
    let lost = checked.iter().filter(|part| part.wrong.is_some()).count();
    results.lower("lost", lost as f64);
    results.report("integrity-programs").publish()?;
    checked.iter().try_for_each(programs::Checked::verdict)?;
    Ok(())
}

/// The run with free lists; it ends with the first machine that loses something.
fn run_free_pages(arguments: &Arguments, operations: u64) -> Result<(), BenchError> {
    let mut results = Results::default();
    let (mut all, mut lost) = (0, 0);
    let cases = free_pages::cases(operations, arguments.seed);
    for (index, case) in cases.into_iter().enumerate() {
        if arguments.only.is_some_and(|only| only != index) {
            continue;
        }
        let outcome = free_pages::run(case, Duration::from_secs(arguments.limit))?;
        println!("{outcome}");
        outcome.check()?;
        let of = (case.name, "free lists");
        for (metric, value) in [
            ("operations", outcome.operations),
            ("checked-mib", outcome.checked_mib),
            ("taken-mib", outcome.taken.iter().sum::<u64>() >> 20),
            ("orders", outcome.orders),
            ("pauses", outcome.pauses),
            ("stale", outcome.stale),
        ] {
            results.add(of, (metric, ""), value as f64);
        }
        (all, lost) = (all + outcome.operations, lost + outcome.lost);
    }
    results.higher("operations", all as f64);
    results.lower("lost_words", lost as f64);
    results.report("integrity-free-pages").publish()
}
