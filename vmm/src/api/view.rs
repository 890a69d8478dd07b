//! The configuration in the names and units of Firecracker's API.

use serde_json::{Value, json};

use crate::config::{DiskEngine, MachineConfig, NetConfig};

/// The configuration. What Firecracker has no name for is under `ebb`.
#[must_use]
pub fn config(config: &MachineConfig) -> Value {
    let drives: Vec<Value> = config
        .disks
        .iter()
        .enumerate()
        .map(|(index, disk)| {
            json!({
                "drive_id": disk.name(index),
                "path_on_host": disk.path,
                "is_root_device": false,
                "is_read_only": disk.readonly,
                "io_engine": match disk.engine {
                    DiskEngine::Threads => "Sync",
                    _ => "Async",
                },
            })
        })
        .collect();
    let balloon = config.balloon.as_ref().map(|balloon| {
        json!({
            "amount_mib": balloon.size >> 20,
            "deflate_on_oom": balloon.deflate_on_oom,
            "stats_polling_interval_s": balloon.statistics_interval_s,
            "free_page_reporting": balloon.free_page_reporting.is_some(),
        })
    });
    // Only a balloon that runs itself has one.
    let reserve = config.balloon.as_ref().and_then(|it| it.auto_reserve);
    json!({
        "boot-source": {
            "kernel_image_path": config.kernel.path,
            "initrd_path": config.initramfs,
            "boot_args": config.cmdline,
        },
        "machine-config": machine(config),
        "drives": drives,
        "network-interfaces": interfaces(config),
        "balloon": balloon,
        "vsock": config.vsock.as_ref().map(|vsock| json!({
            "guest_cid": vsock.cid,
            "uds_path": vsock.path,
        })),
        "ebb": {
            "id": config.id,
            "kernel_entry": config.kernel.entry,
            "transport": config.transport,
            "nested": config.nested,
            "thp": config.memory.thp,
            "prefault": config.memory.prefault,
            "shared": config.memory.shared,
            "arenas": config.arenas,
            "lazy": config.lazy,
            "rng": config.rng,
            "allow_paths": config.allow_paths,
            "balloon_reserve_mib": reserve.map(|bytes| bytes >> 20),
            "serial": config.serial,
            "api_socket": config.api_socket,
            "metrics_path": config.metrics_path,
            "metrics_listen": config.metrics_listen.map(|it| it.to_string()),
        },
    })
}

/// vCPUs and memory.
pub(super) fn machine(config: &MachineConfig) -> Value {
    let huge_pages = if config.memory.hugepages {
        "2M"
    } else {
        "None"
    };
    json!({
        "vcpu_count": config.vcpus,
        "mem_size_mib": config.memory.size >> 20,
        "smt": false,
        "track_dirty_pages": false,
        "huge_pages": huge_pages,
    })
}

fn interfaces(config: &MachineConfig) -> Vec<Value> {
    let describe = |(index, net): (usize, &NetConfig)| {
        json!({
            "iface_id": net.name(index),
            "host_dev_name": net.tap,
            "guest_mac": net.mac.map(|mac| mac.to_string()),
            "mtu": net.mtu,
        })
    };
    config.nets.iter().enumerate().map(describe).collect()
}
