//! `ebb run`: builds a machine and runs it to its end.

use std::ffi::OsString;
use std::path::PathBuf;

use ebb_vmm::config::{MachineConfig, MachineSpec};
use ebb_vmm::exit;
use ebb_vmm::vm::Restoration;

use super::outputs::Outputs;

/// Start a guest and stay with it until it ends
///
/// Exit status: 0 guest powered off or stopped, 32 reset, 33 crash, 34 guest panic, 35 bad arguments or a
/// host that cannot run guests, 37 a system call that the monitor has no use for, or no filter of them to be had.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub machine: MachineSpec,
    /// Read options from this file, TOML or (with the ending .json) JSON: keys are the names of options. An option on
    /// the command line takes precedence over the file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the options and their files, print the machine that they describe as JSON, and end: nothing is made or started
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pub outputs: Outputs,
}

/// Runs the subcommand and returns the exit status. `words` are its arguments, for snapshots.
pub fn main(args: Args, words: &[OsString]) -> u8 {
    match args.machine.validate() {
        Ok(config) if args.dry_run => {
            super::say(&format!("{:#}", ebb_vmm::api::describe(&config)));
            exit::STOP
        }
        Ok(config) => {
            let config = MachineConfig {
                words: saved(words),
                ..config
            };
            start(config, None, args.outputs)
        }
        Err(error) => {
            super::complain(&error);
            exit::BAD_ARGUMENTS
        }
    }
}

/// The words that describe the machine: a snapshot keeps no configuration file, as its options are among them, and nothing of where log and events go.
fn saved(words: &[OsString]) -> Vec<String> {
    let (mut saved, mut words) = (Vec::new(), words.iter());
    while let Some(word) = words.next() {
        let word = word.to_string_lossy().into_owned();
        let name = word.split('=').next().unwrap_or_default();
        match name {
            "--config" | "--log-file" | "--event-monitor" if name == word => drop(words.next()),
            "--config" | "--log-file" | "--event-monitor" | "--dry-run" => {}
            _ if word.len() > 1
                && word.starts_with('-')
                && word[1..].bytes().all(|it| it == b'v') => {}
            _ => saved.push(word),
        }
    }
    saved
}

/// Runs a machine to its end, and returns the exit status.
pub fn start(config: MachineConfig, snapshot: Option<Restoration>, outputs: Outputs) -> u8 {
    // The log file is made only now, so that a wrong command line leaves no file behind.
    let log = match outputs.start(&config.id) {
        Ok(log) => log,
        Err(error) => {
            super::complain(&error);
            return exit::BAD_ARGUMENTS;
        }
    };
    let ended = ebb_vmm::vm::run(config, snapshot, &log);
    log.finish();
    match ended {
        Ok(reason) => exit::status(reason),
        Err(error) => {
            log.remove_if_unused();
            super::complain_of(&error);
            exit::BAD_ARGUMENTS
        }
    }
}
