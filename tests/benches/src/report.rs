//! What every benchmark writes: `target/bench/NAME.json`, and the same as a table.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::{BenchError, path, system};

/// The results of one benchmark, all from one run.
#[derive(Debug, Deserialize, Serialize)]
pub struct Report {
    /// Name of the benchmark.
    pub name: String,
    /// Where it ran.
    pub host: Host,
    /// What a reader must know of how it was measured.
    pub notes: Vec<String>,
    /// What was measured.
    pub rows: Vec<Row>,
    /// What follows from it. Times differ between hosts, so goals are set for ratios and counts.
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
    /// Where it ran: `direct` or `nested`.
    pub platform: String,
}

/// A figure that goals are set for.
#[derive(Debug, Deserialize, Serialize)]
pub struct Ratio {
    /// Its name, such as `vs_qemu`.
    pub name: String,
    /// Its value.
    pub value: f64,
    /// Which values are good.
    pub better: Better,
    /// As for [`Row::platform`].
    pub platform: String,
}

/// Which values of a figure are good.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// A comparison with something else: above 1, Ebb is better.
    Higher,
    /// A cost or a count.
    Lower,
}

impl Report {
    /// A figure; `None` when there is none of this name.
    #[must_use]
    pub fn ratio(&self, name: &str) -> Option<f64> {
        let mut ratios = self.ratios.iter();
        ratios.find(|one| one.name == name).map(|one| one.value)
    }

    /// Adds the rows and figures of another part of this benchmark.
    pub fn append(&mut self, part: Self) {
        self.notes.extend(part.notes);
        self.rows.extend(part.rows);
        self.ratios.extend(part.ratios);
    }

    /// Reads `FOLDER/NAME.json`.
    ///
    /// # Errors
    /// It is not there, or is no report.
    pub fn read(folder: &Path, name: &str) -> Result<Self, BenchError> {
        let path = folder.join(format!("{name}.json"));
        let what = format!("read {}", path.display());
        let text = fs::read(&path).map_err(system(what.clone()))?;
        serde_json::from_slice(&text).map_err(system(what))
    }

    /// Prints the table, and writes `NAME.json` into the folder that xtask has chosen.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn publish(&self) -> Result<(), BenchError> {
        println!("{self}");
        let path = path("EBB_OUT")?.join(format!("{}.json", self.name));
        let error = || format!("write {}", path.display());
        let mut text = serde_json::to_string_pretty(self).map_err(system(error()))?;
        text.push('\n');
        fs::write(&path, text).map_err(system(error()))?;
        println!("written to {}", path.display());
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host {
            platform,
            kernel,
            cpu,
            cpus,
            ..
        } = &self.host;
        writeln!(
            f,
            "{}: {platform}, Linux {kernel}, {cpus} CPUs: {cpu}",
            self.name
        )?;
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
        // Where a part of it ran elsewhere.
        let elsewhere = |other: &str| {
            if other == platform {
                String::new()
            } else {
                format!(" ({other})")
            }
        };
        for row in &self.rows {
            let value = |value| Value(value, &row.unit).to_string();
            let (median, min, max) = (value(row.median), value(row.min), value(row.max));
            writeln!(
                f,
                "{:<a$} {:<b$} {:<c$} {median:>14} {min:>14} {max:>14} {:>5}{}",
                row.system,
                row.case,
                row.metric,
                row.runs,
                elsewhere(&row.platform)
            )?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for ratio in &self.ratios {
            let better = match ratio.better {
                Better::Higher => "higher",
                Better::Lower => "lower",
            };
            let (name, value) = (&ratio.name, ratio.value);
            let elsewhere = elsewhere(&ratio.platform);
            writeln!(f, "{name} = {value:.3} ({better} is better){elsewhere}")?;
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
