//! `ebb top`: starts the program that shows the machines of this host, live.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use ebb_vmm::api::machines::ViewOptions;
use ebb_vmm::exit;

/// The program. It is not in this one, so that no monitor carries it.
const PROGRAM: &str = "ebb-top";

/// Show the machines of this host, live: memory by state, what is taken, kicks, pauses, and what the guests say
///
/// Keys: up and down choose a machine, q ends. Exit status: 0 done, 1 failed.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: ViewOptions,
}

/// Becomes the program, which gets the same arguments; returns only if that fails.
pub fn main(_: &Args, words: &[OsString]) -> u8 {
    let error = Command::new(program()).args(words).exec();
    super::complain(&format!(
        "{PROGRAM}: {error}; put it beside ebb, it is in the same package"
    ));
    exit::FAILED
}

/// The one beside this program, or else any.
fn program() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.with_file_name(PROGRAM);
    if beside.is_file() {
        beside
    } else {
        PROGRAM.into()
    }
}
