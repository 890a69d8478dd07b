//! The metrics in Prometheus' text format (version 0.0.4), made from the declarations in [`METRICS`] and the answers in
//! which they stand. Times are seconds there, as Prometheus' conventions want.

use std::fmt::Write;

use ebb_core::metrics::{Kind, Metric, Unit};
use serde_json::{Map, Value, json};

use crate::control::{Controller, Instance, InstanceInfo, InstanceState, METRICS};

/// The type of the text.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

ebb_core::metrics! {
    /// The machine as a whole.
    struct MachineStats {
        /// Time since the monitor started.
        uptime_us: Gauge of Microseconds,
        /// 1 while the vCPUs run, 0 while the machine is built or paused.
        running: Gauge,
        /// 1 while the machine is paused.
        paused: Gauge,
        /// RAM of the guest, without arenas.
        memory_bytes: Gauge of Bytes,
        /// Virtual processors of the guest.
        vcpus: Gauge,
        /// Memory that the monitor holds, the guest's included. Missing where there is no /proc.
        resident_bytes: Gauge of Bytes,
    }
}

ebb_core::metrics! {
    /// The balloon.
    struct BalloonSizes {
        /// Memory that the host asks the guest for.
        target_bytes: Gauge of Bytes,
        /// Memory that the guest has handed back.
        actual_bytes: Gauge of Bytes,
    }
}

ebb_core::metrics! {
    /// What the guest's balloon driver says. The guest may say anything.
    struct GuestStats {
        /// Memory that is unused, by the guest.
        free_bytes: Gauge of Bytes,
        /// Memory that is available without swapping, by the guest.
        available_bytes: Gauge of Bytes,
        /// All memory, by the guest.
        total_bytes: Gauge of Bytes,
        /// Memory of disk caches, by the guest.
        disk_caches_bytes: Gauge of Bytes,
        /// Memory that was swapped in, by the guest.
        swap_in_bytes_total: Counter of Bytes,
        /// Memory that was swapped out, by the guest.
        swap_out_bytes_total: Counter of Bytes,
        /// Major page faults, by the guest.
        major_faults_total: Counter,
        /// Minor page faults, by the guest.
        minor_faults_total: Counter,
        /// Processes killed for lack of memory, by the guest (Linux 6.10 and later).
        oom_kills_total: Counter,
    }
}

/// One kind of object, as `METRICS` has it: the first part of its metrics' names, and where its values are.
struct Group {
    prefix: &'static str,
    metrics: &'static [Metric],
    /// What tells several of the kind apart, and their values.
    found: Vec<(Option<String>, Value)>,
}

/// The metrics of a machine, and of `machine` only if it runs.
pub(super) fn text(instance: &dyn Instance, machine: Option<&dyn Controller>) -> String {
    let info = instance.info();
    let id = quoted(&info.id);
    let mut text = head(&info);
    text.reserve(32 << 10);
    for group in groups(instance, machine) {
        for metric in group.metrics {
            write_metric(&mut text, &id, &group, metric);
        }
    }
    text
}

/// The one metric that there is without a machine, too.
pub(super) fn head(info: &InstanceInfo) -> String {
    let (id, version) = (quoted(&info.id), quoted(&info.vmm_version));
    format!(
        "# HELP ebb_info The machine and the version of its monitor.\n# TYPE ebb_info gauge\n\
         ebb_info{{machine={id},version={version}}} 1\n"
    )
}

fn groups(instance: &dyn Instance, machine: Option<&dyn Controller>) -> Vec<Group> {
    let one = |prefix, metrics, value| Group {
        prefix,
        metrics,
        found: vec![(None, value)],
    };
    let mut groups = vec![one("", MachineStats::METRICS, machine_stats(instance))];
    let answers = answers(instance, machine);
    if let Some(machine) = machine {
        if let Some(sizes) = balloon_sizes(machine) {
            groups.push(one("balloon_", BalloonSizes::METRICS, sizes));
        }
        if let Some(guest) = guest_stats(machine) {
            groups.push(one("guest_", GuestStats::METRICS, guest));
        }
    }
    for &(request, object, metrics) in METRICS {
        let found = find(&answers[request], object);
        if !found.is_empty() {
            groups.push(Group {
                prefix: prefix(request, object),
                metrics,
                found,
            });
        }
    }
    groups
}

/// The answers to the requests of [`METRICS`], by their paths.
fn answers(instance: &dyn Instance, machine: Option<&dyn Controller>) -> Value {
    let mut answers = json!({ "/": instance.info() });
    if let Some(machine) = machine {
        answers["/lazy-memory"] = json!(machine.lazy_memory());
        answers["/arenas"] = json!(machine.arenas());
        answers["/devices"] = json!(machine.devices());
        answers["/balloon"] = machine.balloon().map_or(Value::Null, |it| json!(it));
    }
    answers
}

/// The objects called `object` in an answer: none, one, or a list with names.
fn find(answer: &Value, object: &str) -> Vec<(Option<String>, Value)> {
    let found = match object {
        "" => answer,
        object => &answer[object],
    };
    match found {
        Value::Array(list) => list.iter().map(|it| (name(it), it.clone())).collect(),
        Value::Object(_) => vec![(None, found.clone())],
        _ => Vec::new(),
    }
}

fn name(item: &Value) -> Option<String> {
    item["id"].as_str().map(str::to_owned)
}

fn prefix(request: &str, object: &'static str) -> &'static str {
    match (request, object) {
        ("/lazy-memory", "") => "lazy_memory_",
        ("/lazy-memory", "gate") => "gate_",
        ("/lazy-memory", "hypercalls") => "hypercalls_",
        ("/lazy-memory", "free_pages") => "free_pages_",
        ("/lazy-memory", "reporting") => "reporting_",
        ("/lazy-memory", "strict") => "strict_",
        ("/arenas", _) => "arena_",
        ("/balloon", _) => "balloon_auto_",
        ("/devices", "disks") => "disk_",
        ("/devices", "nets") => "net_",
        ("/devices", "vsock") => "vsock_",
        ("/devices", "rng") => "rng_",
        _ => "output_",
    }
}

fn machine_stats(instance: &dyn Instance) -> Value {
    let (info, config) = (instance.info(), instance.config());
    let mut stats = json!(MachineStats {
        uptime_us: info.uptime_ms.saturating_mul(1000),
        running: u64::from(info.state == InstanceState::Running),
        paused: u64::from(info.state == InstanceState::Paused),
        memory_bytes: config.memory.size,
        vcpus: config.vcpus.into(),
        resident_bytes: 0,
    });
    stats["resident_bytes"] = json!(crate::sys::resident_bytes());
    stats
}

fn balloon_sizes(machine: &dyn Controller) -> Option<Value> {
    let balloon = machine.balloon().ok()?;
    Some(json!(BalloonSizes {
        target_bytes: balloon.amount_mib << 20,
        actual_bytes: balloon.actual_mib << 20,
    }))
}

/// What the guest has said; what it has not said is missing.
fn guest_stats(machine: &dyn Controller) -> Option<Value> {
    let guest = machine.balloon_statistics().ok()?.guest;
    let all = [
        ("free_bytes", guest.free_memory),
        ("available_bytes", guest.available_memory),
        ("total_bytes", guest.total_memory),
        ("disk_caches_bytes", guest.disk_caches),
        ("swap_in_bytes_total", guest.swap_in),
        ("swap_out_bytes_total", guest.swap_out),
        ("major_faults_total", guest.major_faults),
        ("minor_faults_total", guest.minor_faults),
        ("oom_kills_total", guest.oom_kill),
    ];
    let said = |(name, value): (&str, Option<u64>)| Some((name.to_owned(), json!(value?)));
    Some(Value::Object(
        all.into_iter().filter_map(said).collect::<Map<_, _>>(),
    ))
}

/// The name that Prometheus' conventions want, without `ebb_` and the prefix.
fn exported_name(metric: &Metric) -> String {
    let Metric { name, unit, .. } = metric;
    match (unit, metric.kind) {
        (Unit::Microseconds, Kind::Histogram) => format!("{name}_seconds"),
        (Unit::Microseconds, Kind::Counter) => {
            format!("{}_seconds_total", name.trim_end_matches("_us_total"))
        }
        (Unit::Microseconds, Kind::Gauge) => format!("{}_seconds", name.trim_end_matches("_us")),
        _ => (*name).to_owned(),
    }
}

/// The names of all metrics, whatever a machine has.
#[cfg(test)]
pub(super) fn every_name() -> Vec<String> {
    let own = [
        ("", MachineStats::METRICS),
        ("balloon_", BalloonSizes::METRICS),
        ("guest_", GuestStats::METRICS),
    ];
    let declared = METRICS
        .iter()
        .map(|&(request, object, metrics)| (prefix(request, object), metrics));
    let named = |(prefix, metrics): (&'static str, &'static [Metric])| {
        metrics
            .iter()
            .map(move |it| format!("ebb_{prefix}{}", exported_name(it)))
    };
    let names = own.into_iter().chain(declared).flat_map(named);
    names.chain(["ebb_info".to_owned()]).collect()
}

fn write_metric(text: &mut String, id: &str, group: &Group, metric: &Metric) {
    let known = |(label, value): &(Option<String>, Value)| match &value[metric.name] {
        Value::Null => None,
        value => Some((labels(id, group.prefix, label.as_deref()), value.clone())),
    };
    let found: Vec<(String, Value)> = group.found.iter().filter_map(known).collect();
    if found.is_empty() {
        return;
    }
    let name = format!("ebb_{}{}", group.prefix, exported_name(metric));
    let help = metric.help.replace('\\', r"\\").replace('\n', r"\n");
    let kind = match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (labels, value) in found {
        match value {
            Value::Array(buckets) => write_buckets(text, &name, &labels, metric.unit, &buckets),
            value => {
                let value = scaled(value.as_u64().unwrap_or_default(), metric.unit);
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
        }
    }
}

fn labels(id: &str, prefix: &str, name: Option<&str>) -> String {
    match name {
        Some(name) => format!(
            "machine={id},{}={}",
            prefix.trim_end_matches('_'),
            quoted(name)
        ),
        None => format!("machine={id}"),
    }
}

/// A histogram without `_sum`, which is not counted.
fn write_buckets(text: &mut String, name: &str, labels: &str, unit: Unit, buckets: &[Value]) {
    let mut count = 0;
    for (index, bucket) in buckets.iter().enumerate() {
        count += bucket.as_u64().unwrap_or_default();
        // The last one also counts everything larger.
        let bound = match index + 1 == buckets.len() {
            true => "+Inf".to_owned(),
            false => scaled(1 << index, unit),
        };
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(text, "{name}_count{{{labels}}} {count}");
}

/// Microseconds as seconds, all else as it is.
fn scaled(value: u64, unit: Unit) -> String {
    match unit {
        Unit::Microseconds => {
            let digits = format!("{}.{:06}", value / 1_000_000, value % 1_000_000);
            digits
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
        }
        Unit::Count | Unit::Bytes => value.to_string(),
    }
}

/// A label's value with its quotes.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', r"\\").replace('"', r#"\""#);
    format!("\"{}\"", escaped.replace('\n', r"\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds() {
        for (value, expected) in [
            (0, "0"),
            (1, "0.000001"),
            (1_500_000, "1.5"),
            (10_000_000, "10"),
        ] {
            assert_eq!(scaled(value, Unit::Microseconds), expected);
        }
        assert_eq!(scaled(100, Unit::Bytes), "100");
    }

    #[test]
    fn buckets_add_up() {
        let mut text = String::new();
        write_buckets(
            &mut text,
            "n",
            "a=\"b\"",
            Unit::Microseconds,
            &[json!(2), json!(3), json!(1)],
        );
        assert_eq!(
            text,
            "n_bucket{a=\"b\",le=\"0.000001\"} 2\nn_bucket{a=\"b\",le=\"0.000002\"} 5\n\
             n_bucket{a=\"b\",le=\"+Inf\"} 6\nn_count{a=\"b\"} 6\n"
        );
    }

    #[test]
    fn what_would_end_a_label_is_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), r#""a\"b\\c\nd""#);
    }
}
