//! `ebb-guest`: what runs inside an Ebb guest.

mod balloon;
mod data;
mod discovery;
mod meminfo;
mod shell;
mod size;
mod terminal;
mod workload;

use std::process::ExitCode;

const USAGE: &str = "\
ebb-guest: what runs inside an Ebb guest

  ebb-guest status    whether this machine runs under Ebb, and which interface it offers
  ebb-guest workload  take commands on standard input, one a line; `help` lists them";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["status"] => discovery::report(),
        ["workload"] => workload::serve(),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
