//! `docs/options.md`: made from the declarations of the options, and compared with them.

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, Command, CommandFactory};

use super::Cli;

/// Set, the test writes the document instead of comparing it.
const UPDATE: &str = "UPDATE_DOCS";

#[test]
fn the_document_of_options_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/options.md");
    let found = std::fs::read_to_string(&path).unwrap();
    // What stands before the first command is written by hand.
    let by_hand = found.split("\n## `ebb ").next().unwrap_or_default();
    let wanted = format!("{by_hand}{}", commands());
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, wanted).unwrap();
        return;
    }
    assert!(
        found == wanted,
        "docs/options.md is not what the options say; write it by: {UPDATE}=1 cargo test -p ebb-vmm --bin ebb options"
    );
}

fn commands() -> String {
    let mut text = String::new();
    let mut command = Cli::command();
    command.build();
    for command in command.get_subcommands_mut() {
        if command.get_name() != "help" {
            describe_command(&mut text, command);
        }
    }
    text
}

fn describe_command(text: &mut String, command: &mut Command) {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let about = command.get_long_about().or(command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    let about = about.trim_end_matches('.');
    let _ = write!(text, "\n## `{usage}`\n\n{about}.\n");
    for arg in command.get_arguments() {
        if arg.get_id() != "help" {
            describe_option(text, arg);
        }
    }
    for inner in command.get_subcommands_mut() {
        if inner.get_name() != "help" {
            describe_command(text, inner);
        }
    }
}

fn describe_option(text: &mut String, arg: &Arg) {
    let mut name = arg.to_string();
    if let Some(short) = arg.get_short() {
        name = format!("-{short}");
    }
    let name = name.replace(['<', '>'], "");
    let help = arg.get_long_help().or(arg.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let _ = write!(text, "\n### `{name}`\n\n{help}.");
    if let [default] = arg.get_default_values()
        && arg.get_action().takes_values()
    {
        let _ = write!(text, " Default: `{}`.", default.display());
    }
    if arg.is_required_set() {
        text.push_str(" Required.");
    }
    for alias in arg.get_all_aliases().unwrap_or_default() {
        let _ = write!(text, " Also: `--{alias}`.");
    }
    text.push('\n');
    let values = arg.get_possible_values();
    if values.iter().any(|value| value.get_help().is_some()) {
        text.push('\n');
        for value in values {
            let help = value
                .get_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            let _ = writeln!(text, "- `{}`: {help}", value.get_name());
        }
    }
}
