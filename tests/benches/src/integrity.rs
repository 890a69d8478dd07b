//! `ebb-bench integrity`: the integrity run of the tests, as long as one likes. It fails when anything is lost.

use std::time::Duration;

use super::BenchError;
use super::results::Results;
use ebb_harness::error::Result;
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
    /// Run only the machine of this number, from 0 on; with --programs the part
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

/// Runs it, prints what each machine has shown and writes the report, which says if not all of them came to their end.
///
/// # Errors
/// [`BenchError`]: a machine did not come to its end, or something was lost.
pub fn run(arguments: &Arguments) -> std::result::Result<(), BenchError> {
    if arguments.programs {
        return run_programs(arguments);
    }
    if let Some(operations) = arguments.free_pages {
        return run_free_pages(arguments, operations);
    }
    let cases = cases(arguments.operations, arguments.seed);
    let limit = Duration::from_secs(arguments.limit);
    let mut results = Results::default();
    let (outcomes, ended) = each(arguments, &cases, |case| {
        let outcome = run_case(case, limit)?;
        println!("{outcome}");
        Ok(outcome)
    });
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
    let sum = |count: fn(&Outcome) -> u64| outcomes.iter().map(count).sum::<u64>() as f64;
    results.higher("operations", sum(|o| o.counts.operations));
    results.lower("lost_pages", sum(|o| o.counts.lost));
    results.lower("foreign_bytes", sum(|o| o.counts.foreign_bytes));
    missing(&mut results, outcomes.len(), cases.len());
    results.report("integrity").publish()?;
    outcomes.iter().try_for_each(Outcome::check)?;
    Ok(ended?)
}

/// Runs those that were asked for, up to the first that fails. Returns what has come to its end, and that failure.
fn each<C: Copy, O>(
    arguments: &Arguments,
    cases: &[C],
    mut run: impl FnMut(C) -> Result<O>,
) -> (Vec<O>, Result<()>) {
    let mut outcomes = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        if arguments.only.is_some_and(|only| only != index) {
            continue;
        }
        match run(*case) {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => return (outcomes, Err(error)),
        }
    }
    (outcomes, Ok(()))
}

/// Says how much of the run is missing, so that a part is not taken for the whole.
fn missing(results: &mut Results, ran: usize, of: usize) {
    results.lower("missing", of.saturating_sub(ran) as f64);
    if ran < of {
        results.note(format!("This is a part of the run: {ran} of {of}."));
    }
}

/// The run of programs; it fails when one of them finds anything wrong.
fn run_programs(arguments: &Arguments) -> std::result::Result<(), BenchError> {
    let (parts, _) = each(arguments, &programs::PARTS, Ok);
    let mut checked = Vec::new();
    let ended = programs::run(&parts, (arguments.times, 2), |part| {
        println!("{part}");
        checked.push(part.clone());
    });
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
    missing(&mut results, checked.len(), programs::PARTS.len());
    results.report("integrity-programs").publish()?;
    checked.iter().try_for_each(programs::Checked::verdict)?;
    ended?;
    Ok(())
}

/// The run with free lists.
fn run_free_pages(arguments: &Arguments, operations: u64) -> std::result::Result<(), BenchError> {
    let cases = free_pages::cases(operations, arguments.seed);
    let limit = Duration::from_secs(arguments.limit);
    let (outcomes, ended) = each(arguments, &cases, |case| {
        let outcome = free_pages::run(case, limit)?;
        println!("{outcome}");
        Ok(outcome)
    });
    let mut results = Results::default();
    for outcome in &outcomes {
        for (metric, value) in [
            ("operations", outcome.operations),
            ("checked-mib", outcome.checked_mib),
            ("taken-mib", outcome.taken.iter().sum::<u64>() >> 20),
            ("orders", outcome.orders),
            ("pauses", outcome.pauses),
            ("stale", outcome.stale),
        ] {
            let of = (outcome.case.name, "free lists");
            results.add(of, (metric, ""), value as f64);
        }
    }
    let sum = |count: fn(&free_pages::Outcome) -> u64| outcomes.iter().map(count).sum::<u64>();
    results.higher("operations", sum(|outcome| outcome.operations) as f64);
    results.lower("lost_words", sum(|outcome| outcome.lost) as f64);
    missing(&mut results, outcomes.len(), cases.len());
    results.report("integrity-free-pages").publish()?;
    outcomes.iter().try_for_each(free_pages::Outcome::check)?;
    Ok(ended?)
}
