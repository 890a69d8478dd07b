//! `ebb-demo`: what lazy memory does, told step by step, with a table, a picture and numbers.

mod claims;
mod free_pages;
mod lazy;
mod malloc;
mod narrator;
mod neighbour;
mod picture;
mod sampler;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ebb_harness::error::{Context, Result};

/// Shows what lazy memory does, and checks what it shows
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder for the picture and the numbers
    #[arg(long)]
    out: PathBuf,
    #[command(subcommand)]
    story: Story,
}

#[derive(Debug, Subcommand)]
enum Story {
    /// A guest hands memory back lazily
    Lazy(lazy::Arguments),
    /// Redis with its heap in an arena, compared with a plain Redis and free page reporting
    Malloc(malloc::Arguments),
    /// A guest frees memory and says nothing, and a neighbour gets it
    FreePages,
    /// Who wants the host's memory in these stories
    #[command(hide = true)]
    Neighbour,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was shown is true.
fn run(arguments: &Arguments) -> Result<bool> {
    let out = &arguments.out;
    fs::create_dir_all(out).context(out.display())?;
    match &arguments.story {
        Story::Lazy(arguments) => lazy::run(arguments, out),
        Story::Malloc(arguments) => malloc::run(arguments, out),
        Story::FreePages => free_pages::run(out),
        Story::Neighbour => neighbour::live(),
    }
}

/// Writes what a story found, and says where.
fn keep(out: &Path, picture: (&str, &str), numbers: (&str, &serde_json::Value)) -> Result<()> {
    let numbers = (numbers.0, format!("{:#}\n", numbers.1));
    for (what, name, text) in [
        ("picture", picture.0, picture.1),
        ("numbers", numbers.0, &numbers.1),
    ] {
        let path = out.join(name);
        fs::write(&path, text).context(path.display())?;
        println!("The {what}: {}", path.display());
    }
    Ok(())
}
