//! `ebb-bench reclaim`: what taking lazily freed memory from a running guest costs.
//!
//! The machine is made of the monitor's own parts, in this process (module `rig`), so that each step can be
//! had alone; its vCPUs work without ever leaving the guest, which is the worst case. Reclaim goes through
//! `Reclaimer`, as in `ebb run`.

mod closing;
mod curve;
mod slowdown;
mod throughput;

use super::BenchError;
use super::report::Report;
use super::results::Results;
use ebb_harness::error::Result;

pub(crate) use curve::{one_by_one, quiescent};

const SLICES: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// Arguments of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Scattered ranges of 64 KiB in a round
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(8..=4096))]
    ranges: u64,
    /// Sizes of a slice in ranges, for the curve
    #[arg(long, value_delimiter = ',', default_values_t = SLICES)]
    slices: Vec<usize>,
    /// MiB of guest memory in a round of throughput in pages of 4 KiB; four times as much in blocks of 2 MiB
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(16..=512))]
    mib: u64,
    /// The longest pause in microseconds while the guest's work is measured; at most 10000, as more would
    /// not be rested for in full
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(100..=10_000))]
    pause: u64,
    /// Pairs of windows of 2 s in which the guest's work is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    windows: u32,
    /// Measure only this: curve, closing, throughput, slowdown; the report is `reclaim-THIS.json`
    #[arg(long, value_parser = ["curve", "closing", "throughput", "slowdown"])]
    only: Option<String>,
    /// One short round of what is counted; nothing that takes time to tell
    #[arg(long)]
    quick: bool,
}

impl Arguments {
    /// Those of `--quick`.
    #[must_use]
    pub fn quick() -> Self {
        Self {
            runs: 1,
            ranges: 64,
            slices: vec![512],
            mib: 16,
            pause: 5000,
            windows: 1,
            only: None,
            quick: true,
        }
    }

    fn wants(&self, part: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == part)
    }
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// As for [`measure`]; the report cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    measure(arguments)?.publish()
}

/// Runs the benchmark.
///
/// # Errors
/// The machine does not do what it should, or the kernel does not count.
pub fn measure(arguments: &Arguments) -> Result<Report> {
    let arguments = if arguments.quick {
        Arguments::quick()
    } else {
        arguments.clone()
    };
    let mut results = Results::default();
    if arguments.wants("curve") {
        curve::measure(&arguments, &mut results)?;
    }
    if arguments.wants("closing") && !arguments.quick {
        closing::measure(arguments.runs, &mut results)?;
    }
    if arguments.wants("throughput") && !arguments.quick {
        throughput::measure(&arguments, &mut results)?;
    }
    if arguments.wants("slowdown") && !arguments.quick {
        slowdown::measure(&arguments, &mut results)?;
    }
    Ok(results.report(&match &arguments.only {
        Some(only) => format!("reclaim-{only}"),
        None => "reclaim".to_owned(),
    }))
}
