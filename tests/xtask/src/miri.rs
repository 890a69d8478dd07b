//! `cargo xtask miri`: unit tests of the pure parts under Miri, which finds undefined behaviour.

use ebb_nested_machine::error::{Error, Result};

use crate::project::root;
use crate::shell::{command, quietly, visibly};

/// Packages whose unit tests make no system call, the one that is quick first.
const PACKAGES: [&str; 2] = ["ebb-hypercall-abi", "ebb-core"];

/// Arguments of `miri`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Run only tests whose names contain one of these
    filters: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let nightly = ["run", "nightly", "cargo", "miri"];
    if quietly(command("rustup", nightly.iter().chain(&["--version"]))).is_err() {
        let remedy = "rustup toolchain install nightly --component miri,rust-src";
        return Err(Error::new(format!(
            "there is no Miri; install it with `{remedy}`"
        )));
    }
    for package in PACKAGES {
        let mut miri = command("rustup", nightly);
        miri.args(["test", "--lib", "-p", package, "--"])
            .args(&arguments.filters)
            .current_dir(root())
            // proptest writes down failures beside the source; files are out of Miri's reach.
            .env("CARGO_TARGET_DIR", root().join("target/miri"))
            .env("PROPTEST_CASES", "4")
            .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "true")
            .env("MIRIFLAGS", "-Zmiri-disable-isolation");
        if !visibly(miri)? {
            return Ok(1);
        }
    }
    Ok(0)
}
