//! `ebb-bench teardown`: how fast memory is free again, by which worker counts, after a stop and after SIGKILL,
//! compared with what the kernel does alone and with QEMU.
//!
//! Samples of what is compared are taken in turn, and another system is first each time. Ratios are of medians; where
//! the host does other work the `_best` ones, of the fastest samples, say more.

mod ceiling;
mod ending;
mod engine;
mod files;
mod guests;
mod live;
mod machines;
mod neighbour;
mod orders;
mod sparse;

use super::plot::{Curve, draw};
use super::report::Report;
use super::results::{Metric, Results};
use super::{BenchError, path};

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Samples of each case
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// GiB of memory to be freed
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    gib: u64,
    /// GiB of address space of which one page in 2 MiB is touched
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..65536))]
    sparse_gib: u64,
    /// Only what needs KVM: machines whose guest has mapped all its memory, and QEMU with KVM; the report is
    /// `teardown-live.json`
    #[arg(long, conflicts_with = "no_live")]
    live: bool,
    /// Leave that out
    #[arg(long)]
    no_live: bool,
    /// Add the report of `--live`, which has just run
    #[arg(long, hide = true)]
    with_live: bool,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
    /// Only these parts; ratios between parts are left out
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with = "live")]
    only: Vec<Part>,
    /// Only free so many bytes once there is a byte to read
    #[arg(long, hide = true)]
    part: Option<u64>,
    /// The same, with files behind them
    #[arg(long, hide = true)]
    part_in_files: bool,
}

/// A part of what needs no guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Engine,
    Files,
    Ceiling,
    Machines,
    Neighbour,
    Sparse,
}

const GIB: u64 = 1 << 30;

const SECONDS: Metric = ("time", "s");

/// Measures a part.
type Measure = fn(&mut Results, &Arguments) -> Result<(), BenchError>;

const PARTS: [(Part, Measure); 6] = [
    (Part::Engine, engine::measure),
    (Part::Files, files::measure),
    (Part::Ceiling, ceiling::measure),
    (Part::Machines, machines::measure),
    (Part::Neighbour, neighbour::measure),
    (Part::Sparse, sparse::measure),
];

/// The name of the report of `--live`.
const LIVE: &str = "teardown-live";

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: there is too little memory, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    if let Some(bytes) = arguments.part {
        return ceiling::part(bytes, arguments.part_in_files);
    }
    let mut results = Results::default();
    results.note(
        "p99 and max: of the latencies of a neighbour that answers a request of about 50 µs each millisecond on each processor, \
         while the other machine ends or is reclaimed from",
    );
    results.note(
        "Nw: so many threads free memory. A machine has two: its reaper and a thread of that. QEMU has one",
    );
    results.note(
        "free: the host has 98 % of the memory again. A run where that is not seen within 1 s after the last process has \
         ended is counted as free-not-seen. Where there is such a run, both sides of a ratio are timed by gone: the end of \
         the last process that held the memory",
    );
    if arguments.live {
        live::measure(&mut results, arguments.runs)?;
        orders::measure(&mut results, arguments.runs)?;
        if !arguments.no_qemu {
            guests::measure(&mut results, arguments.runs)?;
        }
        return results.report(LIVE).publish();
    }
    for (part, measure) in PARTS {
        if arguments.only.is_empty() || arguments.only.contains(&part) {
            measure(&mut results, arguments)?;
        }
    }
    let curve = Curve {
        name: format!("{} GiB of 4 KiB pages", arguments.gib),
        points: engine::sweep(&results, |row| row.median),
    };
    let (out, labels) = (
        path("EBB_OUT")?,
        ("teardown by workers", "workers", "seconds"),
    );
    draw(&out.join("teardown.svg"), labels, &[curve])?;
    let mut report = results.report("teardown");
    if arguments.with_live {
        let mut live = Report::read(&out, LIVE)?;
        live.notes.clear();
        report.append(live);
    }
    report.publish()
}
