//! The third story: a guest frees memory and says nothing. Ebb reads its kernel's free lists, and a neighbour gets the memory.

mod outcome;
mod story;

use std::path::Path;

use ebb_harness::error::Result;

/// Tells it; whether everything that was shown is true.
///
/// # Errors
/// The story cannot be told to its end.
pub fn run(out: &Path) -> Result<bool> {
    let outcome = story::tell()?;
    outcome.print();
    println!();
    let (picture, numbers) = (outcome.draw(), outcome.json());
    crate::keep(
        out,
        ("free-pages.svg", &picture),
        ("free-pages.json", &numbers),
    )?;
    Ok(outcome.claims.hold())
}
