//! Clients of Firecracker that others wrote take a machine from its start to its end. The programs that drive them are in
//! `tests/clients`; `cargo xtask` builds them.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use ebb_harness::Images;
use ebb_harness::error::{Context, Result};
use ebb_harness::size::MIB;
use ebb_payload::freestanding::{self, Parameters, Task};
use tempfile::TempDir;

/// Some clients wait for few seconds only: one at a time has the processors.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a program with a folder, the monitor under Firecracker's name, and a kernel that needs no initial RAM disk and 128 MiB. What
/// it says stands in a failure.
fn run(program: &mut Command) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let images = Images::from_environment()?;
    let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let firecracker = folder.path().join("firecracker");
    symlink(&images.ebb, &firecracker).context("link the monitor")?;
    let work = folder.path().join("work");
    std::fs::create_dir(&work).context("make a folder")?;
    let kernel = folder.path().join("kernel");
    let parameters = Parameters {
        task: Task::Meter as u64,
        vcpus: 1,
        ram: 128 * MIB,
        operations: 0,
        seed: 0,
    };
    freestanding::write(&kernel, &parameters).context("write the kernel")?;
    let output = program
        .arg(&work)
        .arg(&firecracker)
        .arg(&kernel)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    let output = output.context(format_args!("{program:?}"))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    println!("{said}");
    assert!(output.status.success(), "{program:?}: {}", output.status);
    Ok(())
}

/// A program of the package.
fn rust(name: &str) -> Result<()> {
    let folder = std::env::var_os("EBB_CLIENTS").context("EBB_CLIENTS is not set")?;
    run(&mut Command::new(PathBuf::from(folder).join(name)))
}

/// A program in Python, by the environment that the set-up has made.
fn python(name: &str) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut program = Command::new(root.join(".cache/python-clients/bin/python"));
    run(program.arg(root.join("tests/clients/python").join(name)))
}

#[test]
fn crate_fctools() -> Result<()> {
    rust("fctools")
}

#[test]
fn crate_firepilot() -> Result<()> {
    rust("firepilot")
}

#[test]
fn crate_firecracker_rs_sdk() -> Result<()> {
    rust("sdk")
}

#[test]
fn pypi_firecracker_python() -> Result<()> {
    python("use_firecracker_python.py")
}

#[test]
fn pypi_microheart() -> Result<()> {
    python("use_microheart.py")
}

#[test]
fn pypi_smolvm() -> Result<()> {
    python("use_smolvm.py")
}
