//! `ebb-bench api`: how long the API takes for an answer while the machine reclaims, what a crowd of slow clients does to a
//! machine, and how soon Firecracker mode answers and starts a guest.

mod answers;
mod crowd;
mod start;

use ebb_harness::error::Result;

use super::BenchError;
use super::report::Report;
use super::results::Results;

/// The report of the part with guests.
const GUEST_PART: &str = "api-guest";

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Starts of each kind
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds with the slow clients, and of the same guest without them
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Slow clients
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,
    /// The second part, which needs no stock guest: how soon the API answers; adds the report of the first part
    #[arg(long)]
    with_guest: bool,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    if arguments.with_guest {
        start::ready(arguments.runs.max(21), &mut results)?;
        answers::measure(arguments.runs, &mut results)?;
        let mut report = results.report("api");
        report.append(Report::read(&super::path("EBB_OUT")?, GUEST_PART)?);
        return report.publish();
    }
    crowd::measure(arguments, &mut results)?;
    start::to_init(arguments.runs, &mut results)?;
    results.report(GUEST_PART).publish()
}
