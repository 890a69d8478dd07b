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

/// Packages whose tests are built with optimization, and run where KVM is if their binary's name starts with `kvm_`.
pub const OPTIMIZED_TESTS: [&str; 7] = [
    "ebb-benches",
    "ebb-containerd-shim",
    "ebb-cri",
    "ebb-demo",
    "ebb-harness",
    "ebb-heap",
    "ebb-top",
];

/// Programs of the tests that are no part of Ebb.
pub const TEST_PROGRAMS: [&str; 4] = ["ebb-blocks", "ebb-cases", "ebb-churn", "ebb-page-server"];

/// Builds these binaries with optimization.
pub fn build(binaries: &[&str]) -> Result<()> {
    progress(format_args!(
        "building {} (release; minutes the first time)",
        binaries.join(", ")
    ));
    let mut command = optimized();
    command.args(binaries.iter().flat_map(|name| ["--bin", name]));
    must(command)
}

/// Builds `libebb_malloc.so`, which programs preload, with optimization, and the libraries of all other packages: cargo cannot
/// be told to build one library and to take the features of all packages into account.
pub fn build_malloc() -> Result<()> {
    progress("building ebb-malloc (release)");
    let mut command = optimized();
    command.args(["--quiet", "--lib"]);
    must(command)
}

/// A build with optimization, of the targets that are yet to be named.
///
/// Cargo chooses the features of a crate by the packages that it is told, not by what it builds of them. So it is told the same
/// ones each time, the tests' too: else it would build the monitor once for each command.
fn optimized() -> Command {
    let mut command = cargo(["build", "--release"]);
    command.args(packages(&["ebb-vmm", "ebb-pod-image", "ebb-malloc"]));
    command.args(packages(&OPTIMIZED_TESTS));
    command
}

/// The arguments that name these packages.
pub fn packages<'a>(names: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    names.iter().flat_map(|name| ["-p", name])
}

/// Builds the monitor without optimization: that one can panic on purpose. `tests` are the words that choose the unit tests, which
/// it shares all crates with.
pub fn build_debug_monitor<'a>(tests: impl IntoIterator<Item = &'a str>) -> Result<()> {
    progress("building ebb (debug)");
    let mut command = cargo(["build", "--quiet", "--bin", "ebb"]);
    command.args(tests);
    must(command)
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
