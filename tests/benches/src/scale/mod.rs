//! `ebb-bench scale`: what grows with the size of guests, with their number, and with their vCPUs.
//!
//! Each part measures the monitor's own code in this process, without a guest.

mod book;
mod damping;
mod gate;
mod reclaim;

use super::BenchError;
use super::results::Results;

/// Arguments of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each measurement
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// GiB of the large guest
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=4096))]
    gib: u64,
    /// Measure only this part; the report is `scale-PART.json`
    #[arg(long, value_parser = PARTS.map(|part| part.0))]
    only: Option<String>,
}

/// A part: adds its rows and figures.
type Part = fn(&Arguments, &mut Results) -> Result<(), BenchError>;

const PARTS: [(&str, Part); 4] = [
    ("book", book::measure),
    ("damping", damping::measure),
    ("gate", gate::measure),
    ("reclaim", reclaim::measure),
];

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// A part fails; the report cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    let only = arguments.only.as_deref();
    for (name, part) in PARTS {
        if only.is_none_or(|only| only == name) {
            part(arguments, &mut results)?;
        }
    }
    let name = only.map_or("scale".to_owned(), |only| format!("scale-{only}"));
    results.report(&name).publish()
}
