//! Samples as they come in, by system, case and metric, and the figures that follow from them.

use ebb_harness::error::{Context, Result};

use super::host::Host;
use super::report::{Better, Ratio, Report, Row};

/// A metric and its unit.
pub type Metric = (&'static str, &'static str);

/// The samples of one metric of one system in one case.
#[derive(Debug)]
struct Series {
    system: String,
    case: String,
    metric: Metric,
    samples: Vec<f64>,
}

/// Samples of many metrics, in the order in which each first came, and figures.
#[derive(Debug, Default)]
pub struct Results {
    series: Vec<Series>,
    ratios: Vec<(String, f64, Better)>,
    notes: Vec<String>,
}

impl Results {
    /// Adds a sample.
    pub fn add(&mut self, (system, case): (&str, &str), metric: Metric, sample: f64) {
        let same = |one: &&mut Series| one.is(system, case, metric.0);
        match self.series.iter_mut().find(same) {
            Some(series) => series.samples.push(sample),
            None => self.series.push(Series {
                system: system.to_owned(),
                case: case.to_owned(),
                metric,
                samples: vec![sample],
            }),
        }
    }

    /// Adds what a reader must know of how it was measured.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Adds a comparison: above 1, Ebb is better.
    pub fn higher(&mut self, name: &str, value: f64) {
        self.ratios.push((name.to_owned(), value, Better::Higher));
    }

    /// Adds a cost or a count.
    pub fn lower(&mut self, name: &str, value: f64) {
        self.ratios.push((name.to_owned(), value, Better::Lower));
    }

    /// Adds `a / b`: by medians as `name`, and by the smallest samples as `name_best`. Nothing when one has no samples.
    pub fn divide(&mut self, name: &str, a: [&str; 3], b: [&str; 3]) {
        for (suffix, of) in PICKS {
            if let Some(value) = self.quotient(a, b, of) {
                self.higher(&format!("{name}{suffix}"), value);
            }
        }
    }

    /// Adds `a / b` by medians alone: of rates the smallest sample is not the best. Nothing when one has no samples.
    pub fn divide_rates(&mut self, name: &str, a: [&str; 3], b: [&str; 3]) {
        let of = |[system, case, metric]: [&str; 3]| self.median(system, case, metric);
        if let (Some(a), Some(b)) = (of(a), of(b)) {
            self.higher(name, a / b);
        }
    }

    /// As [`Results::divide`], where `a` is what Ebb takes: a cost.
    pub fn divide_cost(&mut self, name: &str, a: [&str; 3], b: [&str; 3]) {
        for (suffix, of) in PICKS {
            if let Some(value) = self.quotient(a, b, of) {
                self.lower(&format!("{name}{suffix}"), value);
            }
        }
    }

    /// Adds the median of `a / b` round by round, where what else the host does differs from round to round.
    ///
    /// # Errors
    /// One of them has no samples.
    pub fn divide_rounds(&mut self, name: &str, a: [&str; 3], b: [&str; 3]) -> Result<()> {
        let of = |[system, case, metric]: [&str; 3]| self.of(system, case, metric);
        let rounds: Vec<f64> = of(a).iter().zip(of(b)).map(|(a, b)| a / b).collect();
        let value = median(&rounds).context(format_args!("{name}: no rounds"))?;
        self.higher(name, value);
        Ok(())
    }

    /// Adds the smallest of some comparisons, and of their `_best` ones, as one of its own. Nothing when one is missing.
    pub fn smallest(&mut self, name: &str, of: &[&str]) {
        for (suffix, _) in PICKS {
            let value = |one: &&str| self.ratio(&format!("{one}{suffix}"));
            let values: Option<Vec<f64>> = of.iter().map(value).collect();
            if let Some(values) = values {
                let smallest = values.into_iter().fold(f64::INFINITY, f64::min);
                self.higher(&format!("{name}{suffix}"), smallest);
            }
        }
    }

    fn quotient(&self, a: [&str; 3], b: [&str; 3], of: Pick) -> Option<f64> {
        let row = |[system, case, metric]: [&str; 3]| self.row(system, case, metric);
        Some(of(&row(a)?) / of(&row(b)?))
    }

    fn ratio(&self, name: &str) -> Option<f64> {
        let mut ratios = self.ratios.iter();
        ratios.find(|one| one.0 == name).map(|one| one.1)
    }

    /// The samples of one metric; empty when there are none.
    #[must_use]
    pub fn of(&self, system: &str, case: &str, metric: &str) -> &[f64] {
        let mut all = self.series.iter();
        all.find(|one| one.is(system, case, metric))
            .map_or(&[], |one| &one.samples)
    }

    /// Their median; `None` when there are none.
    #[must_use]
    pub fn median(&self, system: &str, case: &str, metric: &str) -> Option<f64> {
        median(self.of(system, case, metric))
    }

    /// All that is known of one metric; `None` without samples.
    #[must_use]
    pub fn row(&self, system: &str, case: &str, metric: &str) -> Option<Row> {
        let mut all = self.series.iter();
        all.find(|one| one.is(system, case, metric))?.row("")
    }

    /// The report of a benchmark of this name that ran here.
    #[must_use]
    pub fn report(self, name: &str) -> Report {
        let host = Host::probe();
        let rows = self.series.iter().filter_map(|one| one.row(&host.platform));
        let ratio = |(name, value, better)| Ratio {
            name,
            value,
            better,
            platform: host.platform.clone(),
        };
        Report {
            name: name.to_owned(),
            rows: rows.collect(),
            ratios: self.ratios.into_iter().map(ratio).collect(),
            notes: self.notes,
            host,
        }
    }
}

/// One of a row's values.
type Pick = fn(&Row) -> f64;

/// By what rows are compared, and what the figure's name gets for it.
const PICKS: [(&str, Pick); 2] = [("", |row| row.median), ("_best", |row| row.min)];

impl Series {
    fn is(&self, system: &str, case: &str, metric: &str) -> bool {
        self.system == system && self.case == case && self.metric.0 == metric
    }

    fn row(&self, platform: &str) -> Option<Row> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Row {
            system: self.system.clone(),
            case: self.case.clone(),
            metric: self.metric.0.to_owned(),
            unit: self.metric.1.to_owned(),
            median: median(&sorted)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
            runs: sorted.len(),
            platform: platform.to_owned(),
        })
    }
}

/// The median; `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(sorted[middle - 1], upper)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Metric = ("time", "s");

    fn results(samples: &[(&str, &str, f64)]) -> Results {
        let mut results = Results::default();
        for &(system, case, value) in samples {
            results.add((system, case), TIME, value);
        }
        results
    }

    #[test]
    fn samples_are_kept_apart_and_summed_up_in_any_order() {
        let results = results(&[
            ("ebb", "b", 3.0),
            ("ebb", "a", 1.0),
            ("ebb", "b", 5.0),
            ("ebb", "b", 4.0),
        ]);
        assert_eq!(results.of("ebb", "b", "time"), [3.0, 5.0, 4.0]);
        assert_eq!(results.median("ebb", "b", "time"), Some(4.0));
        assert_eq!(results.median("ebb", "c", "time"), None);
        let row = results.row("ebb", "b", "time").unwrap();
        assert_eq!((row.median, row.min, row.max, row.runs), (4.0, 3.0, 5.0, 3));
        let report = results.report("test");
        assert_eq!(
            (report.rows[1].case.as_str(), report.rows[1].runs),
            ("a", 1)
        );
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn comparisons_are_of_medians_and_of_the_fastest() {
        let mut results = results(&[
            ("qemu", "stop", 8.0),
            ("ebb", "stop", 4.0),
            ("qemu", "kill", 3.0),
            ("qemu", "kill", 2.0),
            ("qemu", "kill", 9.0),
            ("ebb", "kill", 2.0),
        ]);
        for end in ["stop", "kill"] {
            results.divide(end, ["qemu", end, "time"], ["ebb", end, "time"]);
        }
        results.divide("none", ["qemu", "none", "time"], ["ebb", "stop", "time"]);
        results.divide_cost("cost", ["ebb", "stop", "time"], ["qemu", "stop", "time"]);
        results.smallest("vs_qemu", &["stop", "kill"]);
        let rounds =
            results.divide_rounds("rounds", ["qemu", "kill", "time"], ["ebb", "kill", "time"]);
        assert!(rounds.is_ok() && results.divide_rounds("none", [""; 3], [""; 3]).is_err());
        results.smallest("nothing", &["stop", "none"]);
        let report = results.report("test");
        assert_eq!(report.ratio("vs_qemu"), Some(1.5));
        assert_eq!(report.ratio("vs_qemu_best"), Some(1.0));
        assert_eq!(report.ratio("none"), None);
        assert_eq!(report.ratio("rounds"), Some(1.5));
        assert_eq!(report.ratio("nothing"), None);
        assert_eq!(report.ratio("cost"), Some(0.5));
        let cost = report.ratios.iter().find(|one| one.name == "cost");
        assert_eq!(cost.unwrap().better, Better::Lower);
        let text = report.to_string();
        assert!(
            text.contains("vs_qemu = 1.500 (higher is better)"),
            "{text}"
        );
    }
}
