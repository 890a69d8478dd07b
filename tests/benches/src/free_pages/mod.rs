//! `ebb-bench free-pages`: what it costs that the host may take what the guest's free lists hold, and what it gets.
//!
//! With real guests it writes `free-pages-guest.json` and an image of a guest's memory. With `--with-guest`, which needs no
//! KVM, it reads both, times how long it takes to find what is free in that image, and writes `free-pages.json`.

mod churn;
mod read;
mod redis;
mod speed;

use super::BenchError;
use super::report::Report;
use super::results::Results;

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Seconds for which a guest takes and frees memory in a round
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Values of about 4 KiB that Redis holds and forgets
    #[arg(long, default_value_t = 98_304, value_parser = clap::value_parser!(u32).range(65_536..200_000))]
    keys: u32,
    /// Measure only this
    #[arg(long, value_parser = ["churn", "speed", "redis", "image"])]
    only: Option<String>,
    /// The second part: time the search in the image that the first part has written
    #[arg(long)]
    with_guest: bool,
}

impl Arguments {
    fn wants(&self, part: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == part)
    }
}

/// The report of the part with guests.
const GUEST: &str = "free-pages-guest";

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    if arguments.with_guest {
        let out = super::path("EBB_OUT")?;
        read::measure(&out, &mut results)?;
        let mut report = results.report("free-pages");
        report.append(Report::read(&out, GUEST)?);
        return report.publish();
    }
    if arguments.wants("speed") {
        speed::measure(arguments, &mut results)?;
    }
    if arguments.wants("redis") {
        redis::measure(arguments, &mut results)?;
    }
    if arguments.wants("image") {
        read::keep_image(&super::path("EBB_OUT")?)?;
    }
    if arguments.wants("churn") {
        churn::measure(arguments, &mut results)?;
    }
    results.report(GUEST).publish()
}
