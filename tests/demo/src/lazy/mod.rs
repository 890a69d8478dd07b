//! The first story: a guest hands memory back through its balloon, the host takes it, the guest takes it back.

mod outcome;
mod story;

use std::path::Path;

use ebb_harness::error::Result;

/// Arguments of the story.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The guest's memory in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(512..))]
    memory: u64,
    /// Data that the guest keeps all the time, in MiB
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..))]
    keep: u64,
}

/// Tells it; whether everything that was shown is true.
///
/// # Errors
/// The story cannot be told to its end.
pub fn run(arguments: &Arguments, out: &Path) -> Result<bool> {
    let outcome = story::tell(arguments.memory, arguments.keep)?;
    outcome.print();
    println!();
    let (picture, numbers) = (outcome.draw(), outcome.summary());
    crate::keep(out, ("rss.svg", &picture), ("summary.json", &numbers))?;
    Ok(outcome.claims.hold())
}
