//! The second story: Redis fills its heap, forgets everything, the host wants the memory, Redis fills again. With its heap
//! in an arena, and as Debian ships it in a guest that reports free pages.

mod outcome;
mod picture;
mod story;

use std::path::Path;

use ebb_harness::error::Result;

use crate::narrator::Narrator;
use outcome::Outcome;
use story::Heap;

/// Arguments of the story.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Values of about 4 KiB that Redis holds
    #[arg(long, default_value_t = 98_304, value_parser = clap::value_parser!(u32).range(65_536..200_000))]
    keys: u32,
}

/// Tells it; whether everything that was shown is true.
///
/// # Errors
/// The story cannot be told to its end.
pub fn run(arguments: &Arguments, out: &Path) -> Result<bool> {
    let narrator = Narrator::begin();
    println!(
        "Redis fills its memory, FLUSHALL empties it, and then the host needs memory for somebody else.\n"
    );
    let arena = story::tell(Heap::Arena, arguments.keys, &narrator)?;
    println!();
    let plain = story::tell(Heap::Plain, arguments.keys, &narrator)?;
    let outcome = Outcome::new(arena, plain);
    outcome.print();
    println!();
    let picture = picture::draw(&outcome)?;
    crate::keep(
        out,
        ("malloc.svg", &picture),
        ("malloc.json", &outcome.json()),
    )?;
    Ok(outcome.claims.hold())
}
