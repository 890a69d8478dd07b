//! Requests about disks and network interfaces, in the names and units of Firecracker's API.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

use super::routes::{Fault, Reply, or_default, parse};
use crate::config::Rate;
use crate::control::{Controller, DriveUpdate, NetUpdate, RateLimits};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    drive_id: Option<String>,
    path_on_host: Option<PathBuf>,
    /// Kata sends it as JSON in a string.
    rate_limiter: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Interface {
    iface_id: Option<String>,
    rx_rate_limiter: Option<Limiter>,
    tx_rate_limiter: Option<Limiter>,
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
    pub fn limits(&self) -> Result<Option<RateLimits>, Fault> {
        let limits = RateLimits {
            bandwidth: self.bandwidth.as_ref().map(Bucket::rate).transpose()?,
            operations: self.ops.as_ref().map(Bucket::rate).transpose()?,
        };
        Ok((limits != RateLimits::default()).then_some(limits))
    }
}

/// A token bucket. An empty object is no limit.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Bucket {
    #[serde(default, deserialize_with = "or_default")]
    size: u64,
    #[serde(default, deserialize_with = "or_default")]
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
    same_id("drive_id", update.drive_id.as_deref(), id)?;
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

/// `PATCH /network-interfaces/ID`.
pub(super) fn patch_net(machine: &dyn Controller, id: &str, body: &[u8]) -> Result<Reply, Fault> {
    let update: Interface = parse(body)?;
    same_id("iface_id", update.iface_id.as_deref(), id)?;
    let limits = |limiter: Option<Limiter>| {
        let limits = limiter.as_ref().map(Limiter::limits).transpose()?;
        Ok::<_, Fault>(limits.flatten())
    };
    let update = NetUpdate {
        receive: limits(update.rx_rate_limiter)?,
        transmit: limits(update.tx_rate_limiter)?,
    };
    machine.update_net(id, &update)?;
    Ok(Reply::Done)
}

/// Fails if a body names another device than the path.
pub(super) fn same_id(field: &str, given: Option<&str>, id: &str) -> Result<(), Fault> {
    match given.filter(|given| *given != id) {
        Some(other) => Err(Fault::bad_request(format!(
            "{field} is {other}, but the path names {id}"
        ))),
        None => Ok(()),
    }
}

/// The limits that a limiter sets; `None` for one without any.
fn limits(limiter: serde_json::Result<Limiter>) -> Result<Option<RateLimits>, Fault> {
    let limiter = limiter.map_err(|error| {
        Fault::bad_request(format!("rate_limiter is not what is due here: {error}"))
    })?;
    limiter.limits()
}
