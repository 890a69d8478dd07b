//! `cargo xtask exec -- COMMAND…`: runs one command where KVM is, by hand.

use std::time::Duration;

use ebb_nested_machine::error::Result;
use ebb_nested_machine::session::Command;

use crate::project::{environment, output_folder, start_runner};
use crate::setup;
use crate::shell::{Seconds, progress, show};

/// Arguments of `exec`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Join the command to this terminal
    #[arg(short, long)]
    tty: bool,
    /// Kill the command after this many seconds; not with --tty
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// The command and its arguments
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    let out = output_folder("exec")?;
    let runner = start_runner(&assets)?;
    let mut command = Command::new(arguments.command.iter().cloned());
    command.env = environment(&assets, runner.platform(), &out);
    command.cwd = std::env::current_dir().ok();
    let start = std::time::Instant::now();
    let exit = if arguments.tty {
        runner.interactive(&command)?
    } else {
        runner.run(&command, Duration::from_secs(arguments.timeout), &mut show)?
    };
    progress(format_args!("{exit:?} after {}", Seconds(start.elapsed())));
    Ok(exit.code() as u8)
}
