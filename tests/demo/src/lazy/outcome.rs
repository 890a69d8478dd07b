//! What the demo found: the table, the claims, summary.json.

use ebb_harness::size::Size;
use serde_json::{Value, json};

use crate::claims::Claims;
use crate::picture::{self, Mark, Picture};
use crate::sampler::Sample;

/// Where memory stands at one moment of the story.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// For the table.
    pub title: &'static str,
    /// For summary.json.
    pub key: &'static str,
    /// The monitor's resident memory.
    pub rss: u64,
    /// Lazily freed and still there.
    pub lazy: u64,
}

/// Everything that was found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub platform: String,
    pub kernel: String,
    pub guest_memory: u64,
    pub boot_seconds: f64,
    /// Bytes that were lazily free when the host began to take.
    pub lazy: u64,
    /// Bytes taken by the first request, for half.
    pub half: u64,
    /// Bytes taken by all requests.
    pub reclaimed: u64,
    pub intact: bool,
    pub teardown_ms: f64,
    pub teardown_freed: u64,
    pub moments: Vec<Moment>,
    pub claims: Claims,
    pub marks: Vec<Mark>,
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// The resident memory at a moment of the story.
    pub fn rss(&self, key: &str) -> u64 {
        self.moments
            .iter()
            .find(|moment| moment.key == key)
            .map_or(0, |moment| moment.rss)
    }

    /// The content of summary.json; sizes in bytes.
    pub fn summary(&self) -> Value {
        let rss: serde_json::Map<String, Value> = self
            .moments
            .iter()
            .map(|moment| (moment.key.to_owned(), json!(moment.rss)))
            .collect();
        json!({
            "platform": self.platform,
            "guest_kernel": self.kernel,
            "guest_memory_bytes": self.guest_memory,
            "boot_ms": (self.boot_seconds * 1e3).round(),
            "host_rss": rss,
            "lazy_bytes": self.lazy,
            "half_reclaimed_bytes": self.half,
            "reclaimed_bytes": self.reclaimed,
            "guest_data_intact": self.intact,
            "teardown_ms": self.teardown_ms,
            "teardown_freed_bytes": self.teardown_freed,
            "claims": self.claims.json(),
        })
    }

    /// Memory over time, as SVG.
    pub fn draw(&self) -> String {
        let subtitle = format!(
            "Linux {} with {}; platform: {}",
            self.kernel,
            Size(self.guest_memory),
            self.platform
        );
        picture::draw(&Picture {
            title: "Memory of an Ebb guest over time",
            subtitle: &subtitle,
            keys: [
                "host memory that Ebb and its guest take up (RSS)",
                "of it, handed over by the guest and not yet taken",
            ],
            guest_memory: self.guest_memory,
            marks: &self.marks,
            samples: &self.samples,
        })
    }

    /// The table and the claims, for people.
    pub fn print(&self) {
        println!("\n{:<42} {:>10} {:>12}", "", "host RSS", "lazily free");
        for Moment {
            title, rss, lazy, ..
        } in &self.moments
        {
            println!("{title:<42} {:>10} {:>12}", Size(*rss), Size(*lazy));
        }
        println!();
        self.claims.print();
    }
}

/// `part` of `whole` in per cent.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 * 100.0 / whole as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_has_what_readers_look_for() {
        let moment = Moment {
            title: "booted",
            key: "booted",
            rss: 7,
            lazy: 0,
        };
        let outcome = Outcome {
            moments: vec![moment],
            lazy: 3,
            ..Outcome::default()
        };
        let summary = outcome.summary();
        assert_eq!(
            (&summary["host_rss"]["booted"], &summary["lazy_bytes"]),
            (&json!(7), &json!(3))
        );
    }

    #[test]
    fn per_cent_of_nothing_is_none() {
        assert_eq!((percent(1, 0), percent(1, 2)), (0.0, 50.0));
    }
}
