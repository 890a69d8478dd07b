//! Samples as they come in, by system, case and metric.

use super::report::Row;

/// A metric and its unit.
pub type Metric = (&'static str, &'static str);

/// The samples of one metric of one system in one case.
#[derive(Debug)]
struct Series {
    system: &'static str,
    case: String,
    metric: Metric,
    samples: Vec<f64>,
}

/// Samples of many metrics, in the order in which each first came.
#[derive(Debug, Default)]
pub struct Samples(Vec<Series>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, (system, case): (&'static str, &str), metric: Metric, sample: f64) {
        let same =
            |one: &&mut Series| one.system == system && one.case == case && one.metric == metric;
        match self.0.iter_mut().find(same) {
            Some(series) => series.samples.push(sample),
            None => self.0.push(Series {
                system,
                case: case.to_owned(),
                metric,
                samples: vec![sample],
            }),
        }
    }

    /// Those of one metric; empty when there are none.
    #[must_use]
    pub fn of(&self, system: &str, case: &str, metric: &str) -> &[f64] {
        let mut all = self.0.iter();
        all.find(|one| one.system == system && one.case == case && one.metric.0 == metric)
            .map_or(&[], |one| &one.samples)
    }

    /// Their median; `None` when there are none.
    #[must_use]
    pub fn median(&self, system: &str, case: &str, metric: &str) -> Option<f64> {
        median(self.of(system, case, metric))
    }

    /// All of them, summed up.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let row = |one: &Series| Row::new((one.system, &one.case), one.metric, &one.samples);
        self.0.iter().filter_map(row).collect()
    }
}

/// The median; `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    Row::new(("", ""), ("", ""), samples).map(|row| row.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_kept_apart_and_in_order() {
        let mut samples = Samples::default();
        for (case, value) in [("b", 3.0), ("a", 1.0), ("b", 5.0), ("b", 4.0)] {
            samples.add(("ebb", case), ("time", "s"), value);
        }
        assert_eq!(samples.of("ebb", "b", "time"), [3.0, 5.0, 4.0]);
        assert_eq!(samples.median("ebb", "b", "time"), Some(4.0));
        assert_eq!(samples.median("ebb", "c", "time"), None);
        let rows = samples.rows();
        assert_eq!((rows[0].case.as_str(), rows[0].runs), ("b", 3));
        assert_eq!((rows[1].case.as_str(), rows[1].runs), ("a", 1));
    }
}
