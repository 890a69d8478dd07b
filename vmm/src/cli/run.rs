//! `ebb run`: builds a machine and runs it to its end.

use std::path::PathBuf;
use std::sync::Arc;

use ebb_vmm::config::MachineSpec;
use ebb_vmm::exit;
use ebb_vmm::output::Log;
use tracing::Level;

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
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
    /// Log more: -v for information, -vv for debugging
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: Args) -> u8 {
    let config = match args.machine.validate() {
        Ok(config) => config,
        Err(error) => {
            super::complain(&error);
            return exit::BAD_ARGUMENTS;
        }
    };
    // The log file is made only now, so that a wrong command line leaves no file behind.
    let log = match start_log(args.log_file, args.verbose) {
        Ok(log) => log,
        Err(error) => {
            super::complain(&error);
            return exit::BAD_ARGUMENTS;
        }
    };
    let ended = ebb_vmm::vm::run(config, &log);
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

/// Sends the log where the operator wants it.
fn start_log(path: Option<PathBuf>, verbose: u8) -> Result<Log, String> {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let log = match path {
        None => Log::to_stderr(),
        Some(path) => Log::to_file(&path).map_err(|error| {
            format!(
                "--log-file {}: {error}; name a file that you may write",
                path.display()
            )
        })?,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(Arc::new(log.clone()))
        .init();
    Ok(log)
}
