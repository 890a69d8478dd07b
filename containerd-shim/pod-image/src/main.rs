//! `ebb-pod-image`: makes what the guests of pods boot, from a kernel that is installed (docs/kubernetes.md).

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use ebb_pod_image::error::{Context, Result, chain};
use ebb_pod_image::initramfs;
use ebb_pod_image::kernel::Kernel;

/// Makes what the guests of pods boot, from a kernel that is installed. Call it again after an update of the kernel or of Ebb;
/// pods that run keep what they have.
#[derive(Parser)]
#[command(name = "ebb-pod-image", version)]
struct Arguments {
    /// Which kernel, as `uname -r` names it; the newest one for clouds by default
    #[arg(long, value_name = "RELEASE")]
    kernel: Option<String>,
    /// The agent
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/usr/lib/ebb/ebb-pod-agent"
    )]
    agent: PathBuf,
    /// Where the files `vmlinuz` and `initramfs` are written
    #[arg(long, value_name = "FOLDER", default_value = "/var/lib/ebb/pod")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match make(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ebb-pod-image: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn make(arguments: &Arguments) -> Result<()> {
    let kernel = Kernel::find(Path::new("/"), arguments.kernel.as_deref())?;
    let image = &kernel.image;
    let image = std::fs::read(image).context(|| format!("read {}", image.display()))?;
    let disk = initramfs::pod(&arguments.agent, &kernel.modules)?;
    for (name, bytes) in [("vmlinuz", image), ("initramfs", disk)] {
        let path = arguments.out.join(name);
        initramfs::write(&path, &bytes)?;
        println!(
            "{}: {} bytes, kernel {}",
            path.display(),
            bytes.len(),
            kernel.release
        );
    }
    Ok(())
}
