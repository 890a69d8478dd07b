//! What a container uses, in containerd's form for cgroups of version 2.

use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use ebb_pod::METRICS_TYPE;
use ebb_pod::error::{Context, Result};

use crate::cgroup::value;

/// What the container with this cgroup uses.
pub fn of(cgroup: &Path) -> Result<Any> {
    let mut metrics = Metrics::new();
    metrics.pids = MessageField::some(PidsStat {
        current: value(cgroup, "pids.current", None),
        limit: value(cgroup, "pids.max", None),
        ..PidsStat::default()
    });
    metrics.cpu = MessageField::some(CPUStat {
        usage_usec: value(cgroup, "cpu.stat", Some("usage_usec ")),
        user_usec: value(cgroup, "cpu.stat", Some("user_usec ")),
        system_usec: value(cgroup, "cpu.stat", Some("system_usec ")),
        ..CPUStat::default()
    });
    let memory = |word| value(cgroup, "memory.stat", Some(word));
    metrics.memory = MessageField::some(MemoryStat {
        usage: value(cgroup, "memory.current", None),
        usage_limit: value(cgroup, "memory.max", None),
        anon: memory("anon "),
        file: memory("file "),
        inactive_file: memory("inactive_file "),
        active_file: memory("active_file "),
        pgfault: memory("pgfault "),
        pgmajfault: memory("pgmajfault "),
        ..MemoryStat::default()
    });
    let events = |word| value(cgroup, "memory.events", Some(word));
    metrics.memory_events = MessageField::some(MemoryEvents {
        low: events("low "),
        high: events("high "),
        max: events("max "),
        oom: events("oom "),
        oom_kill: events("oom_kill "),
        ..MemoryEvents::default()
    });
    Ok(Any {
        type_url: METRICS_TYPE.to_owned(),
        value: metrics.write_to_bytes().context("metrics")?,
        ..Any::default()
    })
}
