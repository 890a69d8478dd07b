//! `cargo xtask mutants`: changes the code in small ways, one at a time, and names the changes that no unit test notices.

use ebb_nested_machine::error::{Error, Result};

use crate::cargo::cargo;
use crate::project::root;
use crate::shell::{command, quietly, visibly};

/// Arguments of `mutants`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Change only these files, such as `vmm/src/reclaim/policy.rs`
    #[arg(required = true)]
    files: Vec<String>,
    /// Passed on to cargo-mutants
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if quietly(command("cargo-mutants", ["mutants", "--version"])).is_err() {
        let remedy = "cargo install --locked cargo-mutants";
        return Err(Error::new(format!(
            "there is no cargo-mutants; install it with `{remedy}`"
        )));
    }
    // A mutant may run for ever.
    let mut mutants = cargo(["mutants", "--timeout", "60", "--output"]);
    mutants.arg(root().join("target"));
    for file in &arguments.files {
        mutants.args(["--file", file]);
    }
    mutants.args(&arguments.more);
    Ok(u8::from(!visibly(mutants)?))
}
