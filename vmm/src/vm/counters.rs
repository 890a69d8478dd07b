//! What counts what the devices do.

use std::sync::Arc;

use crate::control::{DeviceState, DevicesState};
use crate::devices::virtio::blk::DiskCounters;
use crate::devices::virtio::net::NetCounters;
use crate::devices::virtio::rng::RngCounters;
use crate::devices::virtio::vsock::VsockCounters;

/// The counters of a machine's devices.
#[derive(Clone, Default)]
pub struct DeviceCounters {
    /// Those of its disks.
    pub disks: Vec<Arc<DiskCounters>>,
    /// Those of its network interfaces.
    pub nets: Vec<Arc<NetCounters>>,
    /// That of its vsock.
    pub vsock: Option<Arc<VsockCounters>>,
    /// That of its source of random bytes.
    pub rng: Option<Arc<RngCounters>>,
}

impl DeviceCounters {
    /// The present values.
    pub fn state(&self) -> DevicesState {
        DevicesState {
            disks: numbered("blk", self.disks.iter().map(|it| it.snapshot())),
            nets: numbered("net", self.nets.iter().map(|it| it.snapshot())),
            vsock: self.vsock.as_ref().map(|it| it.snapshot()),
            rng: self.rng.as_ref().map(|it| it.snapshot()),
        }
    }
}

fn numbered<T>(name: &str, all: impl Iterator<Item = T>) -> Vec<DeviceState<T>> {
    all.enumerate()
        .map(|(index, stats)| DeviceState {
            id: format!("{name}{index}"),
            stats,
        })
        .collect()
}
