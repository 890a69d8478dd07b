//! `ebb doctor`: reports what the host can do.

use std::fmt::Write;

use ebb_vmm::doctor::{Report, Status, examine};
use ebb_vmm::exit;

/// Say whether guests can run here, what is missing, and how to get it
///
/// Exit status: 0 stock Linux guests can run here, 1 they cannot.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: &Args) -> u8 {
    let report = examine();
    if args.json {
        // The report consists of text and flags, so this cannot fail.
        super::say(&serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        super::say(&in_words(&report));
    }
    if report.can_run_linux_guests {
        exit::STOP
    } else {
        exit::FAILED
    }
}

fn in_words(report: &Report) -> String {
    let names = report.checks.iter().map(|check| check.name.len());
    let width = names.max().unwrap_or_default();
    let mut text = String::new();
    for check in &report.checks {
        let status = match check.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{status:<4}  {:<width$}  {}",
            check.name, check.detail
        );
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(text, "{:indent$}to do: {remedy}", "", indent = width + 8);
        }
    }
    let _ = write!(text, "\n{}", report.verdict);
    text
}
