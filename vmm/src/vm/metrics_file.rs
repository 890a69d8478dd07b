//! `--metrics-path`: those of the counters that Firecracker has, too, in its JSON: one line for each flush, in which stands
//! what was counted since the last one.

use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::LaunchError;
use super::counters::DeviceCounters;
use crate::control::{DeviceState, DevicesState};
use crate::output::{Lines, Outlet};

/// Time between two flushes that nobody has asked for.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// Bytes of lines that may wait to be written.
const CAPACITY: usize = 256 << 10;

/// Firecracker's names of counters, and ours.
type Names = &'static [(&'static str, &'static str)];

const BLOCK: Names = &[
    ("read_count", "reads_total"),
    ("read_bytes", "read_bytes_total"),
    ("write_count", "writes_total"),
    ("write_bytes", "written_bytes_total"),
    ("flush_count", "flushes_total"),
    ("execute_fails", "errors_total"),
    ("rate_limiter_throttled_events", "throttled_total"),
];

const NET: Names = &[
    ("rx_packets_count", "rx_packets_total"),
    ("rx_bytes_count", "rx_bytes_total"),
    ("rx_fails", "rx_dropped_total"),
    ("tx_packets_count", "tx_packets_total"),
    ("tx_bytes_count", "tx_bytes_total"),
    ("tx_fails", "tx_dropped_total"),
];

const VSOCK: Names = &[
    ("rx_packets_count", "rx_packets_total"),
    ("rx_bytes_count", "rx_bytes_total"),
    ("tx_packets_count", "tx_packets_total"),
    ("tx_bytes_count", "tx_bytes_total"),
    ("conns_removed", "closed_total"),
];

const ENTROPY: Names = &[
    ("entropy_event_count", "requests_total"),
    ("entropy_event_fails", "errors_total"),
    ("entropy_bytes", "random_bytes_total"),
    ("entropy_rate_limiter_throttled", "throttled_total"),
];

/// The file, and what stands in it already.
pub struct MetricsFile {
    outlet: Outlet,
    counters: OnceLock<DeviceCounters>,
    last: Mutex<Value>,
}

impl MetricsFile {
    /// Opens the file or FIFO, and starts the thread that writes to it, `ebb-metrics`.
    ///
    /// # Errors
    /// [`LaunchError::MetricsFile`]: open(2)'s, or the thread could not be started.
    pub fn start(path: &Path) -> Result<Self, LaunchError> {
        let outlet = Lines::open(path)
            .and_then(|lines| Outlet::of_json("ebb-metrics", CAPACITY, lines))
            .map_err(|source| LaunchError::MetricsFile {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            outlet,
            counters: OnceLock::new(),
            last: Mutex::default(),
        })
    }

    /// From now on these counters are written.
    pub fn set_counters(&self, counters: DeviceCounters) {
        // A machine is built once.
        let _ = self.counters.set(counters);
    }

    /// Writes a line with what the devices have done since the last one. Does not wait for the file. Does nothing before there are devices.
    pub fn flush(&self) {
        if let Some(counters) = self.counters.get() {
            self.write(&counters.state());
        }
    }

    fn write(&self, devices: &DevicesState) {
        let counted = counted(devices);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = since(&counted, &last);
        *last = counted;
        // Under the lock, so that lines are in the order of their times.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        line["utc_timestamp_ms"] = json!(now.map_or(0, |it| it.as_millis() as u64));
        self.outlet.put(format!("{line}\n").as_bytes());
    }

    /// Bytes that were lost.
    pub fn dropped(&self) -> u64 {
        self.outlet.dropped()
    }

    /// Waits until all is written, see [`Outlet::finish`].
    pub fn finish(&self) {
        self.outlet.finish();
    }
}

/// The counters in Firecracker's names: those of each device, and all of a kind together.
fn counted(devices: &DevicesState) -> Value {
    let mut all = json!({});
    let disks = devices.disks.iter().enumerate();
    let disks = disks.map(|(index, it)| (format!("block_disk{index}"), stats(it)));
    add(&mut all, "block", disks, BLOCK);
    let nets = devices.nets.iter().enumerate();
    let nets = nets.map(|(index, it)| (format!("net_net{index}"), stats(it)));
    add(&mut all, "net", nets, NET);
    if let Some(vsock) = &devices.vsock {
        let mut stats = renamed(&json!(vsock), VSOCK);
        let added = vsock.guest_connections_total + vsock.host_connections_total;
        stats.insert("conns_added".to_owned(), json!(added));
        all["vsock"] = Value::Object(stats);
    }
    if let Some(rng) = &devices.rng {
        all["entropy"] = Value::Object(renamed(&json!(rng), ENTROPY));
    }
    all
}

fn stats<T: serde::Serialize>(device: &DeviceState<T>) -> Value {
    json!(device.stats)
}

fn add(all: &mut Value, kind: &str, each: impl Iterator<Item = (String, Value)>, names: Names) {
    let mut sum = renamed(&Value::Null, names);
    for (name, stats) in each {
        let stats = renamed(&stats, names);
        for (name, value) in &stats {
            sum[name] = json!(number(&sum[name]).saturating_add(number(value)));
        }
        all[name] = Value::Object(stats);
    }
    all[kind] = Value::Object(sum);
}

fn renamed(stats: &Value, names: Names) -> Map<String, Value> {
    let renamed =
        |(theirs, ours): &(&str, &str)| ((*theirs).to_owned(), json!(number(&stats[ours])));
    names.iter().map(renamed).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

/// What was counted since `last`.
fn since(counted: &Value, last: &Value) -> Value {
    match counted {
        Value::Object(counted) => counted
            .iter()
            .map(|(name, value)| (name.clone(), since(value, &last[name])))
            .collect(),
        value => json!(number(value).saturating_sub(number(last))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::blk::DiskStats;
    use crate::devices::virtio::net::NetStats;
    use crate::devices::virtio::rng::RngStats;
    use crate::devices::virtio::vsock::VsockStats;

    #[test]
    fn a_line_tells_what_was_counted_since_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let file = MetricsFile::start(&path).unwrap();
        let disk = |reads_total, written_bytes_total| DeviceState {
            stats: DiskStats {
                reads_total,
                written_bytes_total,
                ..DiskStats::default()
            },
            ..DeviceState::default()
        };
        let mut devices = DevicesState {
            disks: vec![disk(3, 512), disk(1, 0)],
            ..DevicesState::default()
        };
        file.write(&devices);
        devices.disks[1] = disk(5, 0);
        file.write(&devices);
        file.finish();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let reads = |line: &Value| {
            ["block", "block_disk0", "block_disk1"].map(|name| line[name]["read_count"].clone())
        };
        assert_eq!(lines.len(), 2);
        assert_eq!(reads(&lines[0]), [4, 3, 1]);
        assert_eq!(reads(&lines[1]), [4, 0, 4]);
        assert_eq!(lines[0]["block"]["write_bytes"], 512);
        assert!(number(&lines[0]["utc_timestamp_ms"]) > 1_600_000_000_000);
    }

    #[test]
    fn every_name_of_ours_is_declared() {
        for (names, declared) in [
            (BLOCK, DiskStats::METRICS),
            (NET, NetStats::METRICS),
            (VSOCK, VsockStats::METRICS),
            (ENTROPY, RngStats::METRICS),
        ] {
            for (_, ours) in names {
                assert!(declared.iter().any(|it| it.name == *ours), "{ours}");
            }
        }
    }
}
