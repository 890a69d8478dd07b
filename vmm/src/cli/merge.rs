//! `ebb merge`: makes a full snapshot of a difference.

use std::path::PathBuf;

use ebb_vmm::exit;
use ebb_vmm::snapshot::{self, State};
use ebb_vmm::sys::random::random_block;

use super::restore;

/// Make a full snapshot of a difference and the memory files below it
///
/// All checksums are compared. Exit status: 0 done, 1 failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The difference's state file
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// The memory files, the full one first and the difference's own last
    #[arg(long, value_name = "FILE", required = true)]
    memory: Vec<PathBuf>,
    /// The file for the full snapshot's state
    #[arg(long, value_name = "FILE")]
    to_state: PathBuf,
    /// The file for the full snapshot's memory
    #[arg(long, value_name = "FILE")]
    to_memory: PathBuf,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: &Args) -> u8 {
    match merge(args) {
        Ok(()) => exit::STOP,
        Err(message) => {
            super::complain(&message);
            exit::FAILED
        }
    }
}

fn merge(args: &Args) -> Result<(), String> {
    let (state, files) = restore::read(&args.state, &args.memory, true)?;
    let random = random_block().map_err(|error| error.to_string())?;
    let id = std::array::from_fn(|at| random[at]);
    let written = snapshot::create(&args.to_memory, &args.to_state, |file| {
        let memory = snapshot::flatten(&state.memory, &files, file, id)?;
        let state = State { memory, ..state };
        state.encode().map_err(std::io::Error::other)
    });
    written.map_err(|error| error.to_string())
}
