//! What every benchmark writes: `target/bench/NAME.json`, and the same as a table.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{BenchError, system};

pub use super::host::Host;

/// The results of one benchmark, all from one run.
#[derive(Debug, Deserialize, Serialize)]
pub struct Report {
    /// Name of the benchmark.
    pub name: String,
    /// Where it ran.
    pub host: Host,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What follows from it. Times differ between hosts, so goals are ratios.
    pub ratios: Vec<Ratio>,
}

/// One metric of one system in one case.
#[derive(Debug, Deserialize, Serialize)]
pub struct Row {
    /// The system, such as `ebb` or `qemu-pc`.
    pub system: String,
    /// What it did, such as `bzimage`.
    pub case: String,
    /// What was measured, such as `wall`.
    pub metric: String,
    /// Its unit, such as `s` or `bytes`.
    pub unit: String,
    /// Median of the runs.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Number of runs.
    pub runs: usize,
}

/// A figure that goals are set for.
#[derive(Debug, Deserialize, Serialize)]
pub struct Ratio {
    /// Its name, such as `boot_vs_qemu`.
    pub name: String,
    /// Its value.
    pub value: f64,
}

impl Row {
    /// Sums up `samples`; `None` when there are none.
    #[must_use]
    pub fn new(
        (system, case): (&str, &str),
        (metric, unit): (&str, &str),
        samples: &[f64],
    ) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            system: system.to_owned(),
            case: case.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            median: median(&sorted)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
            runs: sorted.len(),
        })
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(sorted[middle - 1], upper)
    })
}

impl Report {
    /// The median of a metric.
    #[must_use]
    pub fn median(&self, system: &str, case: &str, metric: &str) -> Option<f64> {
        let mut rows = self.rows.iter();
        rows.find(|row| row.system == system && row.case == case && row.metric == metric)
            .map(|row| row.median)
    }

    /// Writes `FOLDER/NAME.json` and returns its path.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, BenchError> {
        let path = folder.join(format!("{}.json", self.name));
        let error = || format!("write {}", path.display());
        let mut text = serde_json::to_string_pretty(self).map_err(system(error()))?;
        text.push('\n');
        fs::write(&path, text).map_err(system(error()))?;
        Ok(path)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |of: fn(&Row) -> &str| {
            let longest = self.rows.iter().map(|row| of(row).len()).max();
            longest.unwrap_or(0).max(8)
        };
        let (a, b, c) = (
            width(|row| &row.system),
            width(|row| &row.case),
            width(|row| &row.metric),
        );
        let [system, case, metric] = ["system", "case", "metric"];
        writeln!(
            f,
            "{system:<a$} {case:<b$} {metric:<c$} {:>14} {:>14} {:>14} {:>5}",
            "median", "min", "max", "runs"
        )?;
        for row in &self.rows {
            let value = |value| Value(value, &row.unit).to_string();
            let (median, min, max) = (value(row.median), value(row.min), value(row.max));
            writeln!(
                f,
                "{:<a$} {:<b$} {:<c$} {median:>14} {min:>14} {max:>14} {:>5}",
                row.system, row.case, row.metric, row.runs
            )?;
        }
        for ratio in &self.ratios {
            writeln!(f, "{} = {:.3}", ratio.name, ratio.value)?;
        }
        Ok(())
    }
}

/// A value for people.
struct Value<'a>(f64, &'a str);

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self(value, "bytes") => write!(f, "{:.2} MiB", value / f64::from(1 << 20)),
            Self(value, unit) => write!(f, "{value:.3} {unit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_sums_up_its_samples_in_any_order() {
        let row = |samples: &[f64]| Row::new(("ebb", "elf"), ("wall", "s"), samples);
        let odd = row(&[3.0, 1.0, 2.5]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max, odd.runs), (2.5, 1.0, 3.0, 3));
        assert!((row(&[4.0, 1.0, 2.0, 3.0]).unwrap().median - 2.5).abs() < 1e-9);
        assert!(row(&[]).is_none());
    }
}
