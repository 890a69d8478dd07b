//! Metrics: what a part of the monitor counts and measures, declared once by the part that owns it.
//!
//! One declaration with [`metrics!`](crate::metrics!) makes a snapshot, which serde reads and writes under the
//! fields' names; the counters that threads share, if the owner wants them; and a list of descriptions ([`Metric`])
//! for documents and exporters. There is no registry and no global: a reader asks the owner for a snapshot.
//!
//! Names follow Prometheus: a counter ends in `_total`, and the unit is a part of the name.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};

/// Buckets of a [`Histogram`].
pub const BUCKETS: usize = 20;

/// The description of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name of the field in the snapshot and in its JSON.
    pub name: &'static str,
    /// What it means: the doc comment of its declaration.
    pub help: &'static str,
    /// What one unit of the value is.
    pub unit: Unit,
    /// How the value behaves.
    pub kind: Kind,
}

/// What a metric's value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Events or things.
    Count,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
}

/// How a metric's value behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never falls. Starts at 0 with the machine.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Counts by size, see [`Histogram`].
    Histogram,
}

/// Where the value of a metric comes from. The types that implement it are the kinds of a declaration.
pub trait Source {
    /// The value in a snapshot.
    type Value: Copy + Debug + Default + Eq;
    /// How the value behaves.
    const KIND: Kind;

    /// The present value.
    fn get(&self) -> Self::Value;
}

/// A counter that threads share. Its memory order is relaxed: it says nothing about other memory.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds 1.
    #[inline]
    pub fn increment(&self) {
        self.add(1);
    }
}

impl Source for Counter {
    type Value = u64;
    const KIND: Kind = Kind::Counter;

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The largest value so far, shared by threads.
#[derive(Debug, Default)]
pub struct Peak(AtomicU64);

impl Peak {
    /// Takes note of a value.
    pub fn record(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }
}

impl Source for Peak {
    type Value = u64;
    const KIND: Kind = Kind::Gauge;

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value that its owner measures when a snapshot is taken. Nothing is stored here: the owner replaces the 0 in the
/// snapshot.
#[derive(Debug, Default)]
pub struct Gauge;

impl Source for Gauge {
    type Value = u64;
    const KIND: Kind = Kind::Gauge;

    fn get(&self) -> u64 {
        0
    }
}

/// Counts values by size, shared by threads. Bucket `i` counts the values below 2^i that are not below 2^(i-1); the
/// last bucket also counts all larger ones.
#[derive(Debug, Default)]
pub struct Histogram([AtomicU64; BUCKETS]);

impl Histogram {
    /// Counts one value.
    pub fn record(&self, value: u64) {
        let bits = (u64::BITS - value.leading_zeros()) as usize;
        self.0[bits.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }
}

impl Source for Histogram {
    type Value = [u64; BUCKETS];
    const KIND: Kind = Kind::Histogram;

    fn get(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|index| self.0[index].load(Ordering::Relaxed))
    }
}

/// Declares metrics: `name: Kind of Unit`, each with a doc comment, which is its help text. The kind is [`Counter`],
/// [`Gauge`], [`Peak`] or [`Histogram`]; the unit is a variant of [`Unit`], and `Count` where none is given.
///
/// `struct Stats from struct Counters { … }` makes the shared `Counters` and the snapshot `Stats` that
/// `Counters::snapshot` returns. `struct Stats { … }` makes the snapshot alone, for an owner that counts under a
/// lock. Either way `Stats::METRICS` lists the descriptions. The using crate depends on `serde`.
///
/// ```
/// ebb_core::metrics! {
///     /// What a disk has done.
///     pub struct DiskStats from struct Counters {
///         /// Requests that failed.
///         errors_total: Counter,
///         /// Bytes that the guest has read.
///         read_bytes_total: Counter of Bytes,
///     }
/// }
///
/// let counters = Counters::default();
/// counters.read_bytes_total.add(512);
/// assert_eq!(counters.snapshot().read_bytes_total, 512);
/// assert_eq!(DiskStats::METRICS[0].help, "Requests that failed.");
/// ```
#[macro_export]
macro_rules! metrics {
    (
        $(#[doc = $doc:literal])+
        $vis:vis struct $stats:ident from $shared_vis:vis struct $counters:ident {
            $($(#[doc = $help:literal])+ $name:ident: $source:ident $(of $unit:ident)?,)+
        }
    ) => {
        $crate::metrics! {
            $(#[doc = $doc])+
            $vis struct $stats {
                $($(#[doc = $help])+ $name: $source $(of $unit)?,)+
            }
        }

        $(#[doc = $doc])+
        #[derive(Debug, Default)]
        $shared_vis struct $counters {
            $($(#[doc = $help])+ pub $name: $crate::metrics::$source,)+
        }

        impl $counters {
            /// The present values. Each is exact; they are not read at the same moment. Gauges are 0.
            $shared_vis fn snapshot(&self) -> $stats {
                $stats { $($name: $crate::metrics::Source::get(&self.$name),)+ }
            }
        }
    };
    (
        $(#[doc = $doc:literal])+
        $vis:vis struct $stats:ident {
            $($(#[doc = $help:literal])+ $name:ident: $source:ident $(of $unit:ident)?,)+
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, ::serde::Serialize, ::serde::Deserialize,
        )]
        #[serde(default)]
        $vis struct $stats {
            $(
                $(#[doc = $help])+
                pub $name: <$crate::metrics::$source as $crate::metrics::Source>::Value,
            )+
        }

        impl $stats {
            /// The descriptions of the fields.
            pub const METRICS: &'static [$crate::metrics::Metric] = &[$(
                $crate::metrics::Metric {
                    name: stringify!($name),
                    help: concat!($($help),+).trim_ascii(),
                    unit: $crate::metrics!(@unit $($unit)?),
                    kind: <$crate::metrics::$source as $crate::metrics::Source>::KIND,
                },
            )+];
        }
    };
    (@unit) => { $crate::metrics::Unit::Count };
    (@unit $unit:ident) => { $crate::metrics::Unit::$unit };
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::metrics! {
        /// A sample of each kind.
        struct Stats from struct Counters {
            /// Help on
            /// two lines.
            events_total: Counter,
            /// Sizes.
            moved_bytes_total: Counter of Bytes,
            /// Measured.
            level: Gauge,
            /// The largest.
            longest_us: Peak of Microseconds,
            /// By size.
            times: Histogram of Microseconds,
        }
    }

    #[test]
    fn a_snapshot_holds_what_was_counted() {
        let counters = Counters::default();
        counters.events_total.increment();
        counters.events_total.add(2);
        counters.moved_bytes_total.add(4096);
        counters.longest_us.record(9);
        counters.longest_us.record(7);
        let stats = counters.snapshot();
        let expected = Stats {
            events_total: 3,
            moved_bytes_total: 4096,
            longest_us: 9,
            ..Stats::default()
        };
        assert_eq!(stats, expected);
        let json = serde_json::to_value(stats).unwrap();
        assert_eq!(json["events_total"], 3);
        assert_eq!(serde_json::from_value::<Stats>(json).unwrap(), stats);
        // An older or newer peer may know other fields.
        let other = serde_json::json!({ "level": 5, "unknown": 1 });
        assert_eq!(serde_json::from_value::<Stats>(other).unwrap().level, 5);
    }

    #[test]
    fn buckets_are_powers_of_two() {
        for (value, bucket) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (100, 7),
            (127, 7),
            (128, 8),
            ((1 << 18) - 1, 18),
            (1 << 18, 19),
            (u64::MAX, 19),
        ] {
            let histogram = Histogram::default();
            histogram.record(value);
            let mut expected = [0; BUCKETS];
            expected[bucket] = 1;
            assert_eq!(histogram.get(), expected, "{value}");
        }
    }

    #[test]
    fn every_field_is_described() {
        let described: Vec<_> = Stats::METRICS
            .iter()
            .map(|metric| (metric.name, metric.help, metric.unit, metric.kind))
            .collect();
        let expected = [
            (
                "events_total",
                "Help on two lines.",
                Unit::Count,
                Kind::Counter,
            ),
            ("moved_bytes_total", "Sizes.", Unit::Bytes, Kind::Counter),
            ("level", "Measured.", Unit::Count, Kind::Gauge),
            (
                "longest_us",
                "The largest.",
                Unit::Microseconds,
                Kind::Gauge,
            ),
            ("times", "By size.", Unit::Microseconds, Kind::Histogram),
        ];
        assert_eq!(described, expected);
    }
}
