//! `ebb-bench teardown`: how fast memory is free again, by which worker counts, after a stop and after SIGKILL,
//! beside what the kernel does alone and beside QEMU.
//!
//! Samples of what is compared are taken in turn. Ratios are of medians; where the host does other work the
//! `_best` ones, of the fastest samples, say more.

mod ceiling;
mod ending;
mod engine;
mod files;
mod guests;
mod live;
mod machines;
mod orders;
mod sparse;

use super::plot::{Curve, draw};
use super::report::{Host, Ratio, Report, Row};
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
    /// Only machines whose guest has mapped all its memory, beside memory that KVM knows nothing of, and beside QEMU
    /// with KVM
    #[arg(long)]
    live: bool,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
    /// Only free so many bytes once there is a byte to read
    #[arg(long, hide = true)]
    half: Option<u64>,
    /// The same, with files behind them
    #[arg(long, hide = true)]
    half_in_files: bool,
}

const GIB: u64 = 1 << 30;

/// A metric and its unit.
const SECONDS: (&str, &str) = ("time", "s");

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: there is too little memory, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    if let Some(bytes) = arguments.half {
        return ceiling::half(bytes, arguments.half_in_files);
    }
    let out = path("EBB_OUT")?;
    let mut results = Results::default();
    let name = if arguments.live {
        live::measure(&mut results, arguments.runs)?;
        orders::measure(&mut results, arguments.runs)?;
        if !arguments.no_qemu {
            guests::measure(&mut results, arguments.runs)?;
        }
        "teardown-live"
    } else {
        engine::measure(&mut results, arguments)?;
        files::measure(&mut results, arguments)?;
        ceiling::measure(&mut results, arguments)?;
        machines::measure(&mut results, arguments)?;
        sparse::measure(&mut results, arguments)?;
        let curve = Curve {
            name: format!("{} GiB of 4 KiB pages", arguments.gib),
            points: engine::sweep(&results, |row| row.median),
        };
        let labels = ("teardown by workers", "workers", "seconds");
        draw(&out.join("teardown.svg"), labels, &[curve])?;
        "teardown"
    };
    let report = results.report(name);
    println!("{report}");
    println!("written to {}", report.write(&out)?.display());
    Ok(())
}

/// Samples by system, case and metric, and what is compared.
#[derive(Default)]
struct Results {
    samples: Vec<([String; 4], Vec<f64>)>,
    ratios: Vec<Ratio>,
}

impl Results {
    fn add(&mut self, system: &str, case: &str, (metric, unit): (&str, &str), value: f64) {
        let key = [system, case, metric, unit].map(str::to_owned);
        match self.samples.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => self.samples.push((key, vec![value])),
        }
    }

    fn row(&self, system: &str, case: &str, metric: &str) -> Option<Row> {
        let known = |key: &[String; 4]| key[0] == system && key[1] == case && key[2] == metric;
        let (key, values) = self.samples.iter().find(|(key, _)| known(key))?;
        Row::new((system, case), (metric, &key[3]), values)
    }

    /// `a / b` by medians as `name`, and by the fastest samples as `name_best`.
    fn divide(&mut self, name: &str, a: [&str; 3], b: [&str; 3]) {
        let row = |[system, case, metric]: [&str; 3]| self.row(system, case, metric);
        let (Some(a), Some(b)) = (row(a), row(b)) else {
            return;
        };
        self.ratio(name, a.median / b.median);
        self.ratio(&format!("{name}_best"), a.min / b.min);
    }

    fn ratio(&mut self, name: &str, value: f64) {
        let name = name.to_owned();
        self.ratios.push(Ratio { name, value });
    }

    fn report(self, name: &str) -> Report {
        let rows = self.samples.iter().filter_map(|(key, values)| {
            let [system, case, metric, unit] = key.each_ref().map(String::as_str);
            Row::new((system, case), (metric, unit), values)
        });
        Report {
            name: name.to_owned(),
            host: Host::probe(),
            rows: rows.collect(),
            ratios: self.ratios,
        }
    }
}
