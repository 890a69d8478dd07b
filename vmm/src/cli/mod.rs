//! The command line: one subcommand, one file.

mod ctl;
#[cfg(test)]
mod docs;
mod doctor;
mod file;
mod firecracker;
mod jail;
#[cfg(test)]
mod manual;
mod merge;
mod outputs;
mod ps;
mod restore;
mod run;
mod top;

use std::error::Error;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use clap::error::{ContextKind, ErrorKind};
use clap::{Parser, Subcommand};
use ebb_vmm::config::choices;
use ebb_vmm::exit;

/// A virtual machine monitor whose guests hand memory back lazily.
#[derive(Debug, Parser)]
#[command(name = "ebb", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Jail(Box<jail::Args>),
    Restore(restore::Args),
    Merge(merge::Args),
    Firecracker(firecracker::Args),
    Ctl(ctl::Args),
    Ps(ps::Args),
    Top(top::Args),
    Doctor(doctor::Args),
}

/// Runs the command that the arguments name, and returns the exit status.
pub fn main() -> u8 {
    match parse(std::env::args_os().collect()) {
        Ok((cli, words)) => match cli.command {
            Command::Run(args) => run::main(*args, words.get(2..).unwrap_or_default()),
            Command::Restore(args) => restore::main(args),
            Command::Merge(args) => merge::main(&args),
            Command::Firecracker(args) => firecracker::main(&args),
            Command::Jail(args) => jail::main(*args),
            Command::Ctl(args) => ctl::main(args),
            Command::Ps(args) => ps::main(&args),
            Command::Top(args) => top::main(&args, words.get(2..).unwrap_or_default()),
            Command::Doctor(args) => doctor::main(&args),
        },
        Err(status) => status,
    }
}

/// Parses the arguments, together with those that a configuration file stands for, and returns all of them, too. On an error
/// it prints the message and returns the exit status.
fn parse(mut words: Vec<OsString>) -> Result<(Cli, Vec<OsString>), u8> {
    if is_firecracker(words.first()) {
        words.insert(1, "firecracker".into());
    }
    if words.get(1).is_some_and(|word| word == "run") {
        let more = file::arguments(&words[2..]).map_err(|complaint| {
            complain(&complaint);
            exit::BAD_ARGUMENTS
        })?;
        words.splice(2..2, more);
    }
    match Cli::try_parse_from(&words) {
        Ok(cli) => Ok((cli, words)),
        Err(error) => match (refuse(&error), words.get(1)) {
            (exit::BAD_ARGUMENTS, Some(word)) if word == "firecracker" => {
                Err(firecracker::ARGUMENTS)
            }
            (status, _) => Err(status),
        },
    }
}

/// A program of this name is `ebb firecracker`.
fn is_firecracker(program: Option<&OsString>) -> bool {
    let name = program.and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| name == "firecracker")
}

/// Prints `message` to standard error in one line.
fn complain(message: &dyn Display) {
    // If this fails, there is no other way to report it.
    let _ = writeln!(io::stderr(), "ebb: {message}");
}

/// Writes `text` and a line break to standard output. It is no error if that is closed, as `| head` does.
fn say(text: &dyn Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// Prints an error and its causes to standard error in one line.
fn complain_of(error: &dyn Error) {
    complain(&with_causes(error));
}

/// An error and its causes, each mentioned once.
fn with_causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// Prints help if it was asked for, and otherwise clap's message in one line.
fn refuse(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            say(&error.to_string().trim_end());
            exit::STOP
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = write!(io::stderr(), "{error}");
            exit::BAD_ARGUMENTS
        }
        _ => {
            complain(&one_line(error));
            exit::BAD_ARGUMENTS
        }
    }
}

/// The part of clap's message before the usage, joined into one line.
fn one_line(error: &clap::Error) -> String {
    if let (Some(value), Some(option), Some(choices)) = (
        error.get(ContextKind::InvalidValue),
        error.get(ContextKind::InvalidArg),
        choices(error),
    ) {
        return format!("invalid value '{value}' for '{option}': write {choices}");
    }
    let mut line = String::new();
    for part in error
        .to_string()
        .lines()
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        if part.starts_with("Usage:") || part.starts_with("For more information") {
            break;
        }
        if !line.is_empty() {
            line.push_str(if line.ends_with(':') { " " } else { "; " });
        }
        line.push_str(part.strip_prefix("error: ").unwrap_or(part));
    }
    line
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn claps_complaints_fit_one_line() {
        for (arguments, expected) in [
            (
                vec!["ebb", "run"],
                "the following required arguments were not provided: --kernel <PATH>",
            ),
            (
                vec!["ebb", "run", "--kernl", "/k"],
                "unexpected argument '--kernl' found; tip: a similar argument exists: '--kernel'",
            ),
            (
                vec!["ebb", "run", "--kernel", "/k", "--memory", "size=4X"],
                "invalid value 'size=4X' for '--memory <KEY=VALUE,...>': '4X' is not a size; write digits \
                 and one of K, M, G, T, for instance 512M",
            ),
            (
                vec!["ebb", "run", "--kernel", "/k", "--kernel-entry", "side"],
                "invalid value 'side' for '--kernel-entry <HOW>': write auto or image",
            ),
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            assert_eq!(one_line(&error), expected);
        }
    }
}
