//! Crate fctools: a machine that is configured by requests, changed, saved, killed, restored, and shut down.

use std::time::Duration;

use ebb_clients::{PATIENCE, READY, Result, Setup, check, wait_for_line};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::*;
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::snapshot::PrepareVmFromSnapshotOptions;
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, ResourceType};

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

const MOVED: ResourceType = ResourceType::Moved(MovedResourceType::HardLinkedOrCopied);
const START: Duration = Duration::from_secs(60);

fn executor(setup: &Setup, socket: &str) -> Result<UnrestrictedVmmExecutor> {
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(setup.path(socket)));
    let id = VmmId::new("fctools-1")?;
    Ok(UnrestrictedVmmExecutor::new(arguments.show_log_level()).id(id))
}

fn configuration(setup: &Setup, resources: &mut Resources) -> Result<VmConfigurationData> {
    let limit = || TokenBucket {
        size: 1 << 30,
        one_time_burst: Some(1 << 20),
        refill_time: 100,
    };
    let limits = || RateLimiter {
        bandwidth: limit(),
        ops: limit(),
    };
    let log = ResourceType::Created(CreatedResourceType::File);
    Ok(VmConfigurationData {
        boot_source: BootSource {
            kernel_image: resources.create_resource(&setup.kernel, MOVED)?,
            boot_args: Some(Setup::boot_args()),
            initrd: Some(resources.create_resource(&setup.initramfs, MOVED)?),
        },
        drives: vec![Drive {
            drive_id: "rootfs".to_owned(),
            is_root_device: true,
            cache_type: Some(DriveCacheType::Writeback),
            partuuid: None,
            is_read_only: Some(false),
            block: Some(resources.create_resource(setup.disk("disk")?, MOVED)?),
            rate_limiter: Some(limits()),
            io_engine: Some(DriveIoEngine::Sync),
            socket: None,
        }],
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 192,
            smt: Some(false),
            track_dirty_pages: Some(true),
            huge_pages: Some(HugePages::None),
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: Some(BalloonDevice {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(1),
            free_page_reporting: Some(true),
        }),
        vsock_device: Some(VsockDevice {
            guest_cid: 3,
            uds: resources.create_resource(setup.path("vsock"), ResourceType::Produced)?,
        }),
        logger_system: Some(LoggerSystem {
            logs: Some(resources.create_resource(setup.path("log"), log)?),
            level: None,
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        }),
        metrics_system: Some(MetricsSystem {
            metrics: resources.create_resource(setup.path("metrics"), log)?,
        }),
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: Some(EntropyDevice::default()),
    })
}

async fn guest_serves(vm: &mut Machine) -> Result<()> {
    let pipes = vm.take_pipes()?;
    wait_for_line(pipes.stdout, READY).await?;
    // Dropped, the pipes would be closed.
    std::mem::forget((pipes.stdin, pipes.stderr));
    Ok(())
}

/// All that fctools can ask of a machine that runs.
async fn changes(setup: &Setup, vm: &mut Machine) -> Result<()> {
    let info = vm.get_info().await?;
    check(info.id == "fctools-1" && !info.is_paused, &info)?;
    let version = vm.get_firecracker_version().await?;
    check(version.starts_with("1."), &version)?;
    let machine = vm.get_machine_configuration().await?;
    check(
        machine.mem_size_mib == 192 && machine.vcpu_count == 1,
        &machine,
    )?;
    vm.update_balloon_device(UpdateBalloonDevice { amount_mib: 32 })
        .await?;
    let balloon = vm.get_balloon_device().await?;
    check(balloon.amount_mib == 32 && balloon.deflate_on_oom, &balloon)?;
    vm.update_balloon_statistics(UpdateBalloonStatistics {
        stats_polling_interval_s: 1,
    })
    .await?;
    let inflated = async {
        loop {
            let found = vm.get_balloon_statistics().await?;
            if found.actual_mib == 32 && found.total_memory.is_some() {
                return Ok::<_, Box<dyn std::error::Error>>(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, inflated).await??;
    let system = vm.get_resource_system_mut();
    let block = system.create_resource(setup.disk("other")?, MOVED)?;
    // The library does this for all resources when it prepares the machine; this one is new.
    block.start_initialization_with_same_path()?;
    system.synchronize().await?;
    // Back again: a machine is saved with the disks that it was started with.
    let first = vm.get_configuration().get_data().drives[0].block.clone();
    for block in [Some(block), first] {
        let update = UpdateDrive {
            drive_id: "rootfs".to_owned(),
            block,
            rate_limiter: None,
        };
        vm.update_drive(update).await?;
    }
    vm.flush_metrics().await?;
    Ok(())
}

async fn end(vm: &mut Machine, method: VmShutdownMethod) -> Result<VmState> {
    let action = VmShutdownAction {
        method,
        timeout: Some(PATIENCE),
        graceful: true,
    };
    let done = vm.shutdown([action]).await;
    let state = vm.get_state();
    // It takes a process that it has killed for an error if that is gone before it begins to wait.
    if !matches!(state, VmState::Crashed(_)) {
        done?;
    }
    vm.cleanup().await?;
    Ok(state)
}

#[tokio::main]
async fn main() -> Result<()> {
    let setup = Setup::new()?;
    let mut resources = Resources::new(
        DirectProcessSpawner,
        TokioRuntime,
        VmmOwnershipModel::Shared,
    );
    let data = configuration(&setup, &mut resources)?;
    let install = VmmInstallation::new(setup.firecracker.clone(), "/none".into(), "/none".into());
    let configuration = VmConfiguration::New {
        init_method: InitMethod::ViaApiCalls,
        data,
    };
    let mut vm = Vm::prepare(executor(&setup, "api")?, resources, install, configuration).await?;
    vm.start(START).await?;
    guest_serves(&mut vm).await?;
    println!("fctools: the guest serves");
    changes(&setup, &mut vm).await?;
    println!("fctools: changed");
    vm.pause().await?;
    check(vm.get_info().await?.is_paused, "paused")?;
    let system = vm.get_resource_system_mut();
    let create = CreateSnapshot {
        snapshot_type: Some(SnapshotType::Full),
        snapshot: system.create_resource(setup.path("state"), ResourceType::Produced)?,
        mem_file: system.create_resource(setup.path("memory"), ResourceType::Produced)?,
    };
    let mut snapshot = vm.create_snapshot(create).await?;
    vm.resume().await?;
    // The machine removes its files at its end.
    snapshot
        .copy(&TokioRuntime, setup.path("state-2"), setup.path("memory-2"))
        .await?;
    let restored = PrepareVmFromSnapshotOptions {
        executor: executor(&setup, "api-2")?,
        process_spawner: DirectProcessSpawner,
        runtime: TokioRuntime,
        moved_resource_type: MovedResourceType::HardLinkedOrCopied,
        ownership_model: VmmOwnershipModel::Shared,
        track_dirty_pages: None,
        resume_vm: Some(true),
        network_overrides: Vec::new(),
    };
    let mut restored = snapshot.prepare_vm(&mut vm, restored).await?;
    let killed = end(&mut vm, VmShutdownMethod::PauseThenKill).await?;
    check(matches!(killed, VmState::Crashed(_)), killed)?;
    println!("fctools: saved and killed");

    restored.start(START).await?;
    check(!restored.get_info().await?.is_paused, "resumed")?;
    let left = end(&mut restored, VmShutdownMethod::CtrlAltDel).await?;
    check(left == VmState::Exited, left)?;
    println!("fctools: restored and shut down");
    Ok(())
}
