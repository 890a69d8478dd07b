//! Calls cargo.

use std::process::Command;

use ebb_nested_machine::error::{Error, Result};

use crate::project::root;
use crate::shell::{command, progress, visibly};

/// `cargo` with these words, in the repository's root and its `target` folder.
pub fn cargo<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = command(&program, words);
    command
        .current_dir(root())
        .env("CARGO_TARGET_DIR", root().join("target"));
    command
}

/// Builds the release binaries of these packages.
pub fn build(packages: &[&str]) -> Result<()> {
    progress(format_args!(
        "building {} (release; minutes the first time)",
        packages.join(", ")
    ));
    let mut command = cargo(["build", "--release", "--bins"]);
    packages.iter().for_each(|package| {
        command.args(["-p", package]);
    });
    must(command)
}

/// Builds the monitor without optimization: that one can panic on purpose.
pub fn build_debug_monitor() -> Result<()> {
    progress("building ebb-vmm (debug)");
    must(cargo(["build", "--quiet", "-p", "ebb-vmm"]))
}

/// Builds the programs of `tests/clients`, which is no part of the workspace, into `target/clients`.
pub fn build_clients() -> Result<()> {
    progress("building clients of Firecracker that others wrote (a minute the first time)");
    let manifest = ["--manifest-path", "tests/clients/Cargo.toml"];
    let mut build = cargo(["build", "--quiet", "--locked", "--bins"]);
    build
        .args(manifest)
        .env("CARGO_TARGET_DIR", root().join("target/clients"));
    must(build)
}

/// Builds a package's release library.
pub fn build_library(package: &str) -> Result<()> {
    progress(format_args!("building {package} (release)"));
    must(cargo([
        "build",
        "--release",
        "--quiet",
        "--lib",
        "-p",
        package,
    ]))
}

/// Builds a static binary of a package into `target/static`.
pub fn build_static(package: &str, binary: &str, more: &[&str]) -> Result<()> {
    let mut command = cargo([
        "build",
        "--release",
        "--quiet",
        "-p",
        package,
        "--bin",
        binary,
    ]);
    command
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(more)
        .env("CARGO_TARGET_DIR", root().join("target/static"))
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C strip=symbols",
        );
    must(command)
}

fn must(command: Command) -> Result<()> {
    let what = format!("{command:?}");
    if visibly(command)? {
        Ok(())
    } else {
        Err(Error::new(format!("failed: {what}")))
    }
}
