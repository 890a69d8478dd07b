//! `cargo xtask`: sets up, demonstrates, tests and measures Ebb. One subcommand, one file.

mod bench;
mod cargo;
mod coverage;
mod demo;
mod exec;
mod fuzz;
mod guest;
mod image;
mod miri;
mod model;
mod mutants;
mod package;
mod project;
mod seccomp;
mod selftest;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ebb_nested_machine::error::chain;

/// Sets up, demonstrates, tests and measures Ebb.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install and cache what is missing: QEMU, a Debian kernel, a root file system
    Setup(setup::Arguments),
    /// Show lazy memory, or Redis in an arena, end to end; a picture and the numbers go to target/demo
    Demo(demo::Arguments),
    /// Check the source and run every test; tests that need KVM run in the nested machine where the host has none
    Test(test::Arguments),
    /// Make the Debian packages and a tarball of the guest's program in target/package, and try them out
    Package(package::Arguments),
    /// Open a shell in a guest
    Guest(guest::Arguments),
    /// Run a command where KVM is: on this host or in the nested machine
    Exec(exec::Arguments),
    /// Check the nested machine itself
    Selftest(selftest::Arguments),
    /// Run a benchmark
    Bench(bench::Arguments),
    /// Compute what cannot be measured on this host, and print the error of the model
    Model(model::Arguments),
    /// Run the unit tests of the pure parts under Miri (needs a nightly toolchain)
    Miri(miri::Arguments),
    /// Give noise to what reads bytes of strangers (libFuzzer); the counts go to target/fuzz/summary.json
    Fuzz(fuzz::Arguments),
    /// Compare the lists of system calls with what the monitor calls while tests run
    SeccompCheck(seccomp::Arguments),
    /// Find changes of the code that no unit test notices (needs cargo-mutants)
    Mutants(mutants::Arguments),
    /// Count the lines that run in unit tests and in a few tests with guests; a part below its floor fails
    Coverage(coverage::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup(arguments) => setup::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Package(arguments) => package::run(&arguments),
        Task::Guest(arguments) => guest::run(&arguments),
        Task::Exec(arguments) => exec::run(&arguments),
        Task::Selftest(arguments) => selftest::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Model(arguments) => model::run(&arguments),
        Task::Miri(arguments) => miri::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::SeccompCheck(arguments) => seccomp::run(&arguments),
        Task::Mutants(arguments) => mutants::run(&arguments),
        Task::Coverage(arguments) => coverage::run(&arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
