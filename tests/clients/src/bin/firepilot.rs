//! Crate firepilot: a machine with the least configuration, paused, resumed, shut down, and another one that is killed. It knows
//! neither balloons nor snapshots, and throws the console away.

use ebb_clients::{Result, Setup, check, get, wait_until};
use firepilot::builder::drive::DriveBuilder;
use firepilot::builder::executor::FirecrackerExecutorBuilder;
use firepilot::builder::kernel::KernelBuilder;
use firepilot::builder::{Builder, Configuration};
use firepilot::machine::Machine;

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

async fn boot(setup: &Setup, name: &str) -> Result<Machine> {
    let failed = |error| format!("{error:?}");
    let executor = FirecrackerExecutorBuilder::new()
        .with_chroot(text(&setup.folder))
        .with_exec_binary(setup.firecracker.clone())
        .try_build();
    let kernel = KernelBuilder::new()
        .with_kernel_image_path(text(&setup.kernel))
        .with_initrd_path(text(&setup.initramfs))
        .with_boot_args(Setup::boot_args())
        .try_build();
    let drive = DriveBuilder::new()
        .with_drive_id("rootfs".to_owned())
        .with_path_on_host(setup.disk("disk")?)
        .as_root_device()
        .try_build();
    let configuration = Configuration::new(name.to_owned())
        .with_executor(executor.map_err(failed)?)
        .with_kernel(kernel.map_err(failed)?)
        .with_drive(drive.map_err(failed)?);
    let mut machine = Machine::new();
    let failed = |error| format!("{error:?}");
    machine.create(configuration).await.map_err(failed)?;
    machine.start().await.map_err(failed)?;
    Ok(machine)
}

#[tokio::main]
async fn main() -> Result<()> {
    let setup = Setup::new()?;
    let failed = |error| format!("{error:?}");
    let socket = setup.path("one/firecracker.socket");
    let mut machine = boot(&setup, "one").await?;
    wait_until("the guest's balloon driver", || {
        Ok(get(&socket, "/balloon")?["lazy"] == true)
    })?;
    machine.pause().await.map_err(failed)?;
    check(get(&socket, "/")?["state"] == "Paused", "paused")?;
    machine.resume().await.map_err(failed)?;
    check(get(&socket, "/")?["state"] == "Running", "resumed")?;
    machine.stop().await.map_err(failed)?;
    wait_until("the guest shuts down", || Ok(get(&socket, "/").is_err()))?;
    // It expects the socket of a machine that has ended to be there still.
    machine.kill().await.map_err(failed)?;
    println!("firepilot: shut down");

    let mut machine = boot(&setup, "two").await?;
    machine.kill().await.map_err(failed)?;
    println!("firepilot: killed");
    Ok(())
}
