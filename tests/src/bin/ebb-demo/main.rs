//! `ebb-demo`: lazy memory from end to end, told step by step, with a table, a picture and numbers.

mod narrator;
mod outcome;
mod picture;
mod sampler;
mod story;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use ebb_tests::error::{Context, Result};

/// Shows how a guest hands memory back lazily, and checks what it shows
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder for rss.svg and summary.json
    #[arg(long)]
    out: PathBuf,
    /// The guest's memory in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(512..))]
    memory: u64,
    /// Data that the guest keeps all the time, in MiB
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..))]
    keep: u64,
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
    fs::create_dir_all(&arguments.out).context(arguments.out.display())?;
    let outcome = story::tell(arguments.memory, arguments.keep)?;
    let files = [
        ("rss.svg", picture::draw(&outcome)),
        ("summary.json", format!("{:#}\n", outcome.summary())),
    ];
    for (name, text) in &files {
        write(&arguments.out.join(name), text)?;
    }
    outcome.print();
    println!("\nThe picture: {}", arguments.out.join("rss.svg").display());
    println!(
        "The numbers: {}",
        arguments.out.join("summary.json").display()
    );
    Ok(outcome.holds())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(path.display())
}
