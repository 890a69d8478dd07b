//! `cargo xtask bench NAME`: runs one benchmark.

use std::path::Path;
use std::time::Duration;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::Result;
use ebb_nested_machine::platform::Platform;
use ebb_nested_machine::runner::run_here;
use ebb_nested_machine::session::Command;

use crate::cargo::{TEST_PROGRAMS, build, build_clients, build_malloc};
use crate::project::{binary, environment, output_folder, root, start_runner};
use crate::setup;
use crate::shell::show;

/// How long a benchmark may take.
const TIME_LIMIT: Duration = Duration::from_secs(60 * 60);

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which benchmark, such as `boot`
    name: String,
    /// Passed on to ebb-bench
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    prepare(arguments, &assets)?;
    let out = output_folder("bench")?;
    let command = |platform: Platform, name: &str, more: &[String]| {
        let program = binary("ebb-bench").to_string_lossy().into_owned();
        let mut command = Command::new([program, name.to_owned()]);
        command.argv.extend(more.iter().cloned());
        command.env = environment(&assets, platform, &out);
        command.cwd = Some(root());
        command
    };
    let (name, more) = (arguments.name.as_str(), arguments.more.as_slice());
    let has = |flag: &str| more.iter().any(|word| word == flag);
    let here = |name: &str, more: &[String]| {
        let command = command(Platform::Direct, name, more);
        run_here(&command, TIME_LIMIT, &mut show)
    };
    let on_kvm = |name: &str, more: &[String]| {
        let runner = start_runner(&assets)?;
        let command = command(runner.platform(), name, more);
        runner.run(&command, TIME_LIMIT, &mut show)
    };
    let and = |flag: &str| [more, &[flag.to_owned()]].concat();
    let exit = match name {
        "arena" | "scale" => here(name, more)?,
        // KVM_RUN does not get as far as the guest.
        "filters" if Path::new("/dev/kvm").exists() => here(name, more)?,
        // How fast free lists are read is a matter of the processor, not of KVM.
        "free-pages" => match on_kvm(name, more)? {
            exit if exit.success() && !has("--only") => here(name, &and("--with-guest"))?,
            exit => exit,
        },
        // How soon the API answers is a matter of the host, with its own KVM where there is one.
        "api" | "boot" => match on_kvm(name, more)? {
            exit if exit.success() && Path::new("/dev/kvm").exists() => {
                here(name, &and("--with-guest"))?
            }
            exit if exit.success() => on_kvm(name, &and("--with-guest"))?,
            exit => exit,
        },
        // A part of its report takes the host's address space, and no guest.
        "malloc" => match here("arena", &[])? {
            exit if exit.success() => on_kvm(name, more)?,
            exit => exit,
        },
        "teardown" if !has("--live") => {
            // Freeing memory needs the host's memory and real processors, but no guest that does anything.
            let rest = |more: &[String]| {
                if Path::new("/dev/kvm").exists() {
                    here(name, more)
                } else {
                    on_kvm(name, more)
                }
            };
            if has("--no-live") {
                rest(more)?
            } else {
                match on_kvm(name, &and("--live"))? {
                    exit if exit.success() => rest(&and("--with-live"))?,
                    exit => exit,
                }
            }
        }
        _ => on_kvm(name, more)?,
    };
    Ok(exit.code() as u8)
}

/// Builds and fetches what the benchmark needs beside what all do.
fn prepare(arguments: &Arguments, assets: &Assets) -> Result<()> {
    build(&[&["ebb", "ebb-bench"], &TEST_PROGRAMS[..]].concat())?;
    let name = arguments.name.as_str();
    if ["free-pages", "malloc"].contains(&name) {
        build_malloc()?;
    }
    if name == "api" {
        build_clients()?;
    }
    if name == "dashboard" {
        setup::prometheus()?;
    }
    if name == "pods" {
        build(&["containerd-shim-ebb-v2"])?;
    }
    if name == "blk" {
        setup::debian_packages(&["fio"])?;
    }
    let programs = arguments.more.iter().any(|word| word == "--programs");
    if name == "footprint" || programs {
        setup::programs(assets)?;
    }
    Ok(())
}
