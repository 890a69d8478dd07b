//! Crate firecracker-rs-sdk: a machine whose every request goes over one connection, in HTTP/1.0; saved, restored, shut down.
//!
//! Its reader waits for ever after an answer whose length is a multiple of 64 bytes, whoever sends it. So it asks nothing here
//! whose answer has numbers or paths that differ from run to run: the balloon's statistics, the whole configuration.

use std::path::PathBuf;

use ebb_clients::{READY, Result, Setup, check, get, wait_for, wait_until};
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::*;

fn process(setup: &Setup, name: &str) -> Result<(Instance, PathBuf)> {
    let socket = setup.path(&format!("{name}.socket"));
    let instance = FirecrackerOption::new(&setup.firecracker)
        .api_sock(&socket)
        .id(name)
        .stdin("/dev/null")
        .stdout(setup.path(&format!("{name}.console")))
        .stderr(setup.path(&format!("{name}.log")))
        .build()?;
    Ok((instance, socket))
}

async fn configure(setup: &Setup, vm: &mut Instance) -> Result<()> {
    let machine = MachineConfiguration {
        cpu_template: None,
        smt: Some(true),
        mem_size_mib: 192,
        track_dirty_pages: None,
        vcpu_count: 1,
        huge_pages: None,
    };
    vm.put_machine_configuration(&machine).await?;
    let boot = BootSource {
        boot_args: Some(Setup::boot_args()),
        initrd_path: Some(setup.initramfs.clone()),
        kernel_image_path: setup.kernel.clone(),
    };
    vm.put_guest_boot_source(&boot).await?;
    let drive = Drive {
        drive_id: "rootfs".to_owned(),
        partuuid: None,
        is_root_device: true,
        cache_type: None,
        is_read_only: false,
        path_on_host: setup.disk("disk")?,
        rate_limiter: None,
        io_engine: None,
        socket: None,
    };
    vm.put_guest_drive_by_id(&drive).await?;
    let balloon = Balloon {
        amount_mib: 0,
        deflate_on_oom: true,
        stats_polling_interval_s: Some(1),
    };
    vm.put_balloon(&balloon).await?;
    Ok(())
}

async fn changes(vm: &mut Instance) -> Result<()> {
    vm.patch_balloon(&BalloonUpdate { amount_mib: 32 }).await?;
    let update = BalloonStatsUpdate {
        stats_polling_interval_s: 1,
    };
    vm.patch_balloon_stats_interval(&update).await?;
    let machine = vm.get_machine_configuration().await?;
    check(machine.mem_size_mib == 192, &machine)?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let setup = Setup::new()?;
    let (mut vm, socket) = process(&setup, "one")?;
    vm.start_vmm().await?;
    let found = vm.describe_instance().await?;
    check(
        found.id == "one" && found.state == InstanceState::NotStarted,
        &found,
    )?;
    let version = vm.get_firecracker_version().await?;
    check(version.firecracker_version.starts_with("1."), &version)?;
    configure(&setup, &mut vm).await?;
    vm.start().await?;
    wait_for(&setup.path("one.console"), READY)?;
    println!("sdk: the guest serves");
    changes(&mut vm).await?;
    check(get(&socket, "/balloon")?["amount_mib"] == 32, "the balloon")?;
    check(
        get(&socket, "/vm/config")?["boot-source"].is_object(),
        "the configuration",
    )?;
    wait_until("the balloon grows", || {
        Ok(get(&socket, "/balloon")?["actual_mib"] == 32)
    })?;
    wait_until("statistics", || {
        Ok(get(&socket, "/balloon/statistics")?["total_memory"].is_u64())
    })?;
    vm.pause().await?;
    let files = SnapshotCreateParams {
        mem_file_path: setup.path("memory"),
        snapshot_path: setup.path("state"),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    };
    vm.create_snapshot(&files).await?;
    vm.resume().await?;
    check(
        vm.describe_instance().await?.state == InstanceState::Running,
        "resumed",
    )?;
    vm.stop().await?;
    wait_until("the guest shuts down", || Ok(get(&socket, "/").is_err()))?;
    println!("sdk: saved and shut down");

    let (mut restored, socket) = process(&setup, "two")?;
    restored.start_vmm().await?;
    let backend = MemoryBackend {
        backend_type: BackendType::File,
        backend_path: setup.path("memory"),
    };
    let load = SnapshotLoadParams {
        enable_diff_snapshots: Some(false),
        mem_file_path: None,
        mem_backend: Some(backend),
        resume_vm: Some(true),
        snapshot_path: setup.path("state"),
    };
    restored.load_snapshot(&load).await?;
    let found = restored.describe_instance().await?;
    check(
        found.id == "two" && found.state == InstanceState::Running,
        &found,
    )?;
    // It ends the process by SIGTERM, and removes the socket.
    drop(restored);
    wait_until("the process ends", || Ok(get(&socket, "/").is_err()))?;
    println!("sdk: restored and ended");
    Ok(())
}
