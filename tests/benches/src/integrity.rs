//! `ebb-bench integrity`: the integrity run of the tests, as long as one likes. It fails when anything is lost.

use std::time::Duration;

use super::BenchError;
use super::report::{Host, Ratio, Report, Row};
use ebb_harness::integrity::{Outcome, cases, run as run_case};

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
    /// Seconds that one machine may take
    #[arg(long, default_value_t = 3000)]
    limit: u64,
}

/// Runs it, prints what each machine has shown and writes the report.
///
/// # Errors
/// [`BenchError`]: a machine did not come to its end, or something was lost.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let out = super::path("EBB_OUT")?;
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
    let ratio = |name: &str, value| Ratio {
        name: name.to_owned(),
        value,
    };
    let rows = outcomes.iter().flat_map(|outcome| {
        let case = format!("{} vCPUs", outcome.case.vcpus);
        let row = |metric, value: u64| {
            Row::new((outcome.case.lazy, &case), (metric, ""), &[value as f64])
        };
        [
            row("operations", outcome.counts.operations),
            row("calls", outcome.counts.calls),
            row("discarded-mib", outcome.discarded >> 20),
            row("invalidated-mib", outcome.unmapped >> 20),
        ]
    });
    let report = Report {
        name: "integrity".to_owned(),
        host: Host::probe(),
        rows: rows.flatten().collect(),
        ratios: vec![
            ratio("operations", sum(|o| o.counts.operations)),
            ratio("lost_pages", sum(|o| o.counts.lost)),
            ratio("foreign_bytes", sum(|o| o.counts.foreign_bytes)),
        ],
    };
    let path = report.write(&out)?;
    println!("written to {}", path.display());
    Ok(())
}
