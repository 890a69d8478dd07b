//! Requests about disks, in the names and units of Firecracker's API.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

use super::routes::{Fault, Reply, parse};
use crate::config::Rate;
use crate::control::{Controller, DriveLimits, DriveUpdate};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    drive_id: Option<String>,
    path_on_host: Option<PathBuf>,
    /// Kata sends it as JSON in a string.
    rate_limiter: Option<Value>,
}

/// A limiter. An empty object is no limit.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl Limiter {
    /// What it sets; `None` if that is nothing.
    pub fn limits(&self) -> Result<Option<DriveLimits>, Fault> {
        let limits = DriveLimits {
            bandwidth: self.bandwidth.as_ref().map(Bucket::rate).transpose()?,
            operations: self.ops.as_ref().map(Bucket::rate).transpose()?,
        };
        Ok((limits != DriveLimits::default()).then_some(limits))
    }
}

/// A token bucket. An empty object is no limit.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Bucket {
    #[serde(default)]
    size: u64,
    #[serde(default)]
    refill_time: u64,
    #[serde(default)]
    one_time_burst: Option<u64>,
}

impl Bucket {
    fn rate(&self) -> Result<Rate, Fault> {
        let burst = self.one_time_burst.unwrap_or(0);
        Rate::new(self.size, self.refill_time, burst)
            .map_err(|error| Fault::bad_request(error.to_string()))
    }
}

/// `PATCH /drives/ID`.
pub(super) fn patch(machine: &dyn Controller, id: &str, body: &[u8]) -> Result<Reply, Fault> {
    let update: Update = parse(body)?;
    if let Some(other) = update.drive_id.filter(|other| other != id) {
        return Err(Fault::bad_request(format!(
            "drive_id is {other}, but the path names {id}"
        )));
    }
    let limits = match update.rate_limiter {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => limits(serde_json::from_str(&text))?,
        Some(value) => limits(serde_json::from_value(value))?,
    };
    let update = DriveUpdate {
        path: update.path_on_host,
        limits,
    };
    machine.update_drive(id, &update)?;
    Ok(Reply::Done)
}

/// The limits that a limiter sets; `None` for one without any.
fn limits(limiter: serde_json::Result<Limiter>) -> Result<Option<DriveLimits>, Fault> {
    let limiter = limiter.map_err(|error| {
        Fault::bad_request(format!("rate_limiter is not what is due here: {error}"))
    })?;
    limiter.limits()
}
