//! The endpoints: a table of methods and paths, each with the function that answers it.

use std::path::PathBuf;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::{before, drives, view};
use crate::control::{CommandError, Controller, Instance, SnapshotKind};

/// The answer to a request that was carried out.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// Status 204, no body.
    Done,
    /// Status 200, and this body.
    Json(Value),
    /// Status 200, and this text for Prometheus.
    Text(String),
}

impl Reply {
    pub(super) fn json(value: &impl Serialize) -> Result<Self, Fault> {
        serde_json::to_value(value)
            .map(Self::Json)
            .map_err(|error| Fault::internal(format!("the answer cannot be written: {error}")))
    }
}

/// The answer to a request that was not carried out: a status, and a body with a `fault_message`.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The methods that the path knows, for the header `Allow` of a status 405.
    pub(super) allow: Option<String>,
}

impl Fault {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            allow: None,
        }
    }

    /// Status 400: the request is wrong, or the machine cannot do it.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl From<CommandError> for Fault {
    fn from(error: CommandError) -> Self {
        Self::bad_request(error.to_string())
    }
}

/// Carries out a request with a body.
#[derive(Clone, Copy)]
pub(super) enum Handler {
    /// Also while the machine is being built.
    Always(fn(&dyn Instance, &[u8]) -> Result<Reply, Fault>),
    /// The metrics for Prometheus: also while the machine is being built, then those that there are.
    Metrics,
    /// When the machine runs.
    Running(fn(&dyn Controller, &[u8]) -> Result<Reply, Fault>),
    /// The same, with the word of the path that stands for [`NAME`].
    Named(fn(&dyn Controller, &str, &[u8]) -> Result<Reply, Fault>),
}

use Handler::{Always, Metrics, Named, Running};

/// Stands for the last word of a path.
const NAME: &str = "{id}";

/// Every endpoint: method, path, handler. A new one is a row here and a method of [`Controller`].
pub(super) const ROUTES: &[(Method, &str, Handler)] = &[
    (
        Method::GET,
        "/",
        Always(|machine, _| Reply::json(&machine.info())),
    ),
    (
        Method::GET,
        "/version",
        Always(|_, _| Reply::json(&version())),
    ),
    (
        Method::GET,
        "/machine-config",
        Always(|machine, _| Reply::json(&view::machine(machine.config()))),
    ),
    (
        Method::GET,
        "/vm/config",
        Always(|machine, _| Reply::json(&view::config(machine.config()))),
    ),
    (Method::GET, "/metrics", Metrics),
    (Method::PATCH, "/vm", Running(patch_vm)),
    (Method::PUT, "/snapshot/create", Running(put_snapshot)),
    (Method::PUT, "/snapshot/load", Always(put_load)),
    (
        Method::GET,
        "/balloon",
        Running(|machine, _| Reply::json(&machine.balloon()?)),
    ),
    (Method::PATCH, "/balloon", Running(patch_balloon)),
    (
        Method::GET,
        "/balloon/statistics",
        Running(|machine, _| Reply::json(&machine.balloon_statistics()?)),
    ),
    (
        Method::PATCH,
        "/balloon/statistics",
        Running(patch_statistics),
    ),
    (Method::PUT, "/actions", Always(put_action)),
    (
        Method::GET,
        "/lazy-memory",
        Running(|machine, _| Reply::json(&machine.lazy_memory())),
    ),
    (Method::PUT, "/lazy-memory/reclaim", Running(put_reclaim)),
    (
        Method::GET,
        "/arenas",
        Running(|machine, _| Reply::json(&machine.arenas())),
    ),
    (
        Method::GET,
        "/devices",
        Running(|machine, _| Reply::json(&machine.devices())),
    ),
    (
        Method::GET,
        "/drives",
        Running(|machine, _| Reply::json(&machine.drives())),
    ),
    (Method::PATCH, "/drives/{id}", Named(drives::patch)),
    (
        Method::PATCH,
        "/network-interfaces/{id}",
        Named(drives::patch_net),
    ),
    (
        Method::GET,
        "/teardown",
        Running(|machine, _| Reply::json(&machine.teardown())),
    ),
    (Method::PATCH, "/teardown", Running(patch_teardown)),
];

/// What Ebb does not have, and why.
pub(super) const REFUSED: &[(Method, &str, &str)] = &[
    (Method::GET, "/mmds", NO_MMDS),
    (Method::PUT, "/mmds", NO_MMDS),
    (Method::PATCH, "/mmds", NO_MMDS),
    (Method::PUT, "/mmds/config", NO_MMDS),
    (
        Method::PUT,
        "/cpu-config",
        "guests see the host's processor, there are no templates",
    ),
    (Method::PATCH, "/balloon/hinting/start", before::HINTING),
    (Method::GET, "/balloon/hinting/status", before::HINTING),
    (Method::PATCH, "/balloon/hinting/stop", before::HINTING),
    (
        Method::PUT,
        "/pmem/{id}",
        "there are no persistent memory devices; use a drive",
    ),
    (Method::GET, "/hotplug/memory", NO_HOTPLUG),
    (Method::PUT, "/hotplug/memory", NO_HOTPLUG),
    (Method::PATCH, "/hotplug/memory", NO_HOTPLUG),
];

const NO_MMDS: &str = "there is no metadata service; give the guest its data by the kernel's command line, a drive or the vsock";
const NO_HOTPLUG: &str = "memory is not plugged: give the guest what it may need at most, the host gets back what it frees";

/// The version of Firecracker's API that this one follows.
pub const FIRECRACKER_VERSION: &str = "1.13.1";

/// What `GET /version` answers.
pub(super) fn version() -> Value {
    json!({
        "vmm_version": env!("CARGO_PKG_VERSION"),
        "firecracker_version": FIRECRACKER_VERSION,
    })
}

/// What carries out a request: before the machine is started, and afterwards.
#[derive(Default)]
pub(super) struct Found {
    pub before: Option<before::Handler>,
    pub after: Option<Handler>,
}

/// Finds what carries out a request.
///
/// # Errors
/// 404 for an unknown path, 405 for a method that the path does not know, 400 for what Ebb does not have.
pub(super) fn find(method: &Method, path: &str) -> Result<Found, Fault> {
    let mut methods = Vec::new();
    let mut is_it = |known: &'static Method, route| {
        let is_here = is_at(route, path);
        if is_here && !methods.contains(&known.as_str()) {
            methods.push(known.as_str());
        }
        is_here && known == method
    };
    let after = ROUTES.iter().filter(|it| is_it(&it.0, it.1)).last();
    let early = before::ROUTES.iter().filter(|it| is_it(&it.0, it.1)).last();
    let refused = REFUSED.iter().filter(|it| is_it(&it.0, it.1)).last();
    if let Some((_, _, why)) = refused {
        return Err(Fault::bad_request(*why));
    }
    if after.is_some() || early.is_some() {
        return Ok(Found {
            before: early.map(|it| it.2),
            after: after.map(|it| it.2),
        });
    }
    if methods.is_empty() {
        let mut paths: Vec<_> = ROUTES.iter().map(|route| route.1).collect();
        paths.extend(before::ROUTES.iter().map(|route| route.1));
        paths.sort_unstable();
        paths.dedup();
        let message = format!("there is no {path}; there are {}", paths.join(", "));
        return Err(Fault::new(StatusCode::NOT_FOUND, message));
    }
    let methods = methods.join(", ");
    Err(Fault {
        status: StatusCode::METHOD_NOT_ALLOWED,
        message: format!("{path} does not know {method}; it knows {methods}"),
        allow: Some(methods),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmUpdate {
    state: String,
}

fn patch_vm(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: VmUpdate = parse(body)?;
    match update.state.as_str() {
        "Paused" => machine.pause()?,
        "Resumed" => machine.resume()?,
        other => {
            let message = format!("unknown state '{other}'; there are Paused and Resumed");
            return Err(Fault::bad_request(message));
        }
    }
    Ok(Reply::Done)
}

/// Returns true if `path` is that of the route.
fn is_at(route: &str, path: &str) -> bool {
    match route.strip_suffix(NAME) {
        Some(folder) => path
            .strip_prefix(folder)
            .is_some_and(|name| !name.is_empty() && !name.contains('/')),
        None => route == path,
    }
}

/// The last word of a path.
pub(super) fn name_in(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    snapshot_type: Option<String>,
    snapshot_path: PathBuf,
    mem_file_path: PathBuf,
}

fn put_snapshot(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let it: Snapshot = parse(body)?;
    let kind = match it.snapshot_type.as_deref() {
        None | Some("Full") => SnapshotKind::Full,
        Some("Diff") => SnapshotKind::Difference,
        Some(other) => {
            let message =
                format!("snapshot_type '{other}' is not possible; there are Full and Diff");
            return Err(Fault::bad_request(message));
        }
    };
    machine.snapshot(kind, it.mem_file_path, it.snapshot_path)?;
    Ok(Reply::Done)
}

fn put_load(_: &dyn Instance, _: &[u8]) -> Result<Reply, Fault> {
    Err(Fault::bad_request(
        "a machine that is built cannot load a snapshot; start one by `ebb restore`",
    ))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonUpdate {
    amount_mib: u64,
}

fn patch_balloon(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: BalloonUpdate = parse(body)?;
    let bytes = mebibytes(update.amount_mib)?;
    machine.set_balloon(bytes)?;
    Ok(Reply::Done)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StatisticsUpdate {
    stats_polling_interval_s: u16,
}

fn patch_statistics(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: StatisticsUpdate = parse(body)?;
    let seconds = update.stats_polling_interval_s;
    if seconds == 0 {
        return Err(Fault::bad_request(
            "stats_polling_interval_s is 0, but statistics cannot be turned off while the machine runs; give 1 or more",
        ));
    }
    machine.set_statistics_interval(seconds)?;
    Ok(Reply::Done)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: String,
}

fn put_action(machine: &dyn Instance, body: &[u8]) -> Result<Reply, Fault> {
    let action: Action = parse(body)?;
    match action.action_type.as_str() {
        "InstanceStop" => {
            machine.stop();
            Ok(Reply::Done)
        }
        "FlushMetrics" => {
            machine.flush_metrics()?;
            Ok(Reply::Done)
        }
        "SendCtrlAltDel" => {
            machine.press_ctrl_alt_del()?;
            Ok(Reply::Done)
        }
        "InstanceStart" => Err(Fault::bad_request(
            "InstanceStart is not supported after starting the microVM: the machine is there already",
        )),
        other => Err(Fault::bad_request(format!(
            "unknown action_type '{other}'; there are FlushMetrics, InstanceStart, InstanceStop, SendCtrlAltDel"
        ))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reclaim {
    amount_mib: Option<u64>,
    amount_bytes: Option<u64>,
    timeout_ms: Option<u64>,
}

fn put_reclaim(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let reclaim: Reclaim = parse(body)?;
    let bytes = match (reclaim.amount_mib, reclaim.amount_bytes) {
        (Some(mib), None) => mebibytes(mib)?,
        (None, Some(bytes)) => bytes,
        _ => {
            return Err(Fault::bad_request(
                "give one of amount_mib and amount_bytes",
            ));
        }
    };
    if bytes == 0 {
        return Err(Fault::bad_request("the amount is 0; give 1 or more"));
    }
    let timeout = reclaim.timeout_ms.map(Duration::from_millis);
    Reply::json(&machine.reclaim(bytes, timeout))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TeardownUpdate {
    workers: Option<usize>,
    batch_bytes: Option<u64>,
}

fn patch_teardown(machine: &dyn Controller, body: &[u8]) -> Result<Reply, Fault> {
    let update: TeardownUpdate = parse(body)?;
    machine.set_teardown(update.workers, update.batch_bytes)?;
    Ok(Reply::Done)
}

/// Reads a request's body, which must be a JSON object with no unknown fields.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    // Serde would also accept an array with the fields in order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(Fault::bad_request("the body is no JSON object"));
    }
    serde_json::from_slice(body)
        .map_err(|error| Fault::bad_request(format!("the body is not what is due here: {error}")))
}

/// A field of a body that may be null: then it is what it is if it is left out.
pub(super) fn or_default<'de, T, D>(field: D) -> Result<T, D::Error>
where
    T: Deserialize<'de> + Default,
    D: Deserializer<'de>,
{
    Option::deserialize(field).map(Option::unwrap_or_default)
}

/// Converts an `amount_mib` to bytes.
fn mebibytes(amount: u64) -> Result<u64, Fault> {
    amount.checked_mul(1 << 20).ok_or_else(|| {
        Fault::bad_request(format!(
            "amount_mib is {amount}, but 64 bits hold at most {}",
            u64::MAX >> 20
        ))
    })
}
