//! Clients of Firecracker that others wrote take a machine from its start to its end. The programs that drive them are in
//! `tests/clients`; `cargo xtask` builds them.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use ebb_harness::Images;
use ebb_harness::error::{Context, Result};
use tempfile::TempDir;

/// Runs a program with a folder, and the monitor under Firecracker's name. What it says stands in a failure.
fn run(program: &mut Command) -> Result<()> {
    let images = Images::from_environment()?;
    let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let firecracker = folder.path().join("firecracker");
    symlink(&images.ebb, &firecracker).context("link the monitor")?;
    let work = folder.path().join("work");
    std::fs::create_dir(&work).context("make a folder")?;
    let output = program.arg(&work).arg(&firecracker).output();
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
