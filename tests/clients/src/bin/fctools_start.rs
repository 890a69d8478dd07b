//! Crate fctools: how soon a process answers, and how soon the guest of a machine that it starts runs its init. `ebb-bench api` reads
//! what this prints.

use std::time::Instant;

use ebb_clients::{PATIENCE, Result, Setup, check, wait_for_line};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{BootSource, MachineConfiguration};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::process::VmmProcess;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{MovedResourceType, ResourceType};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

/// What the guest's init says first.
const INIT: &str = "EBB-GUEST-READY";

fn parts(setup: &Setup, socket: &str) -> (UnrestrictedVmmExecutor, Resources, VmmInstallation) {
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(setup.path(socket)));
    let resources = Resources::new(
        DirectProcessSpawner,
        TokioRuntime,
        VmmOwnershipModel::Shared,
    );
    let install = VmmInstallation::new(setup.firecracker.clone(), "/none".into(), "/none".into());
    (UnrestrictedVmmExecutor::new(arguments), resources, install)
}

/// Milliseconds from the start of a process to its first answer.
async fn api_ready(setup: &Setup) -> Result<f64> {
    let (executor, resources, install) = parts(setup, "api-1");
    let mut process = VmmProcess::new(executor, resources, install);
    process.prepare().await?;
    let start = Instant::now();
    process.invoke(None).await?;
    while process
        .send_api_request("/", Request::get("/").body(Full::new(Bytes::new()))?)
        .await
        .is_err()
    {
        check(start.elapsed() < PATIENCE, "no answer")?;
    }
    let time = start.elapsed();
    process.send_sigkill()?;
    process.wait_for_exit().await?;
    process.cleanup().await?;
    Ok(time.as_secs_f64() * 1e3)
}

/// Seconds from the start of the process until the machine has been asked for and runs, and until its init does.
async fn to_init(setup: &Setup) -> Result<(f64, f64)> {
    let moved = ResourceType::Moved(MovedResourceType::HardLinkedOrCopied);
    let (executor, mut resources, install) = parts(setup, "api-2");
    let data = VmConfigurationData {
        boot_source: BootSource {
            kernel_image: resources.create_resource(&setup.kernel, moved)?,
            boot_args: Some(format!("{} ebb.mode=poweroff", Setup::boot_args())),
            initrd: Some(resources.create_resource(&setup.initramfs, moved)?),
        },
        drives: Vec::new(),
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 256,
            smt: None,
            track_dirty_pages: None,
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: None,
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: None,
    };
    let configuration = VmConfiguration::New {
        init_method: InitMethod::ViaApiCalls,
        data,
    };
    let mut vm = Vm::prepare(executor, resources, install, configuration).await?;
    let start = Instant::now();
    vm.start(PATIENCE).await?;
    let running = start.elapsed();
    let pipes = vm.take_pipes()?;
    wait_for_line(pipes.stdout, INIT).await?;
    let init = start.elapsed();
    while vm.get_state() != VmState::Exited {
        check(start.elapsed() < PATIENCE, "it does not end")?;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    vm.cleanup().await?;
    Ok((running.as_secs_f64(), init.as_secs_f64()))
}

#[tokio::main]
async fn main() -> Result<()> {
    let setup = Setup::new()?;
    let ready = api_ready(&setup).await?;
    let (running, init) = to_init(&setup).await?;
    println!("{ready} {running} {init}");
    Ok(())
}
