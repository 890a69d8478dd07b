//! Manual pages and completions of shells, made from the declarations of the options and compared with them. They are files, so
//! that no monitor carries what makes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::Cli;

/// Set, the test writes the files instead of comparing them.
const UPDATE: &str = "UPDATE_DOCS";

/// The folders under `resources` that hold nothing else.
const FOLDERS: [&str; 2] = ["man", "completions"];

#[test]
fn options_in_manual_pages_and_completions_are_up_to_date() {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources");
    let mut wanted = BTreeMap::new();
    pages(&mut wanted);
    completions(&mut wanted);
    if std::env::var_os(UPDATE).is_some() {
        for folder in FOLDERS {
            let _ = fs::remove_dir_all(resources.join(folder));
            fs::create_dir_all(resources.join(folder)).unwrap();
        }
        for (name, bytes) in &wanted {
            fs::write(resources.join(name), bytes).unwrap();
        }
    }
    let mut found = BTreeMap::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(resources.join(folder)).unwrap().flatten() {
            let name = format!("{folder}/{}", entry.file_name().display());
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&wanted));
    for (name, bytes) in wanted {
        assert!(
            found[&name] == bytes,
            "resources/{name} is not what the options say; write it by: {UPDATE}=1 cargo test -p ebb-vmm --bin ebb options"
        );
    }
}

/// A page for the program and one for each subcommand.
fn pages(files: &mut BTreeMap<String, Vec<u8>>) {
    let mut program = Cli::command();
    program.build();
    page(files, &program, "ebb");
}

fn page(files: &mut BTreeMap<String, Vec<u8>>, command: &Command, name: &str) {
    let mut bytes = Vec::new();
    let named = command.clone().name(name.to_owned());
    Man::new(named).date("").render(&mut bytes).unwrap();
    files.insert(format!("man/{name}.1"), bytes);
    for inner in command.get_subcommands() {
        if inner.get_name() != "help" {
            page(files, inner, &format!("{name}-{}", inner.get_name()));
        }
    }
}

fn completions(files: &mut BTreeMap<String, Vec<u8>>) {
    for (shell, file) in [
        (Shell::Bash, "ebb.bash"),
        (Shell::Zsh, "_ebb"),
        (Shell::Fish, "ebb.fish"),
    ] {
        let mut bytes = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "ebb", &mut bytes);
        files.insert(format!("completions/{file}"), bytes);
    }
}
