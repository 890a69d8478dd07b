//! `cargo xtask bench NAME`: runs one benchmark.

use std::path::Path;
use std::time::Duration;

use nested_machine::error::Result;
use nested_machine::platform::Platform;
use nested_machine::runner::run_here;
use nested_machine::session::Command;

use crate::cargo::{build, build_library};
use crate::project::{binary, environment, output_folder, root, start_runner};
use crate::{setup, test};

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
    build(&["vmm", "ebb-tests"])?;
    if arguments.name == "malloc" {
        build_library("ebb-malloc")?;
    }
    let out = output_folder("bench")?;
    let command = |platform: Platform| {
        let program = binary("ebb-bench").to_string_lossy().into_owned();
        let mut command = Command::new([program, arguments.name.clone()]);
        command.argv.extend(arguments.more.iter().cloned());
        command.env = environment(&assets, platform, &out);
        command.cwd = Some(root());
        command
    };
    // Freeing memory needs the host's memory and real processors, but no guest that does anything.
    let live = arguments.more.iter().any(|word| word == "--live");
    let here = match arguments.name.as_str() {
        "arena" => true,
        "teardown" => !live && Path::new("/dev/kvm").exists(),
        _ => false,
    };
    if here {
        let exit = run_here(&command(Platform::Direct), TIME_LIMIT, &mut test::show)?;
        return Ok(exit.code() as u8);
    }
    let runner = start_runner(&assets)?;
    let exit = runner.run(&command(runner.platform()), TIME_LIMIT, &mut test::show)?;
    Ok(exit.code() as u8)
}
