//! What ARCHITECTURE.md says about the code, checked against the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules that may hold `unsafe`, as ARCHITECTURE.md says.
const UNSAFE_ALLOWED: [&str; 4] = ["doctor", "kvm", "memory", "sys"];
/// Longest source file in lines, tests included.
const LONGEST_FILE: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All Rust files below `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
    {
        if entry.is_dir() {
            found.extend(sources(&entry));
        } else if entry.extension().is_some_and(|ending| ending == "rs") {
            found.push(entry);
        }
    }
    found
}

/// Source files of the monitor's two crates by top module; the binary's own files are not among them.
fn modules() -> BTreeMap<String, Vec<PathBuf>> {
    let core = modules_of(&root().join("vmm/core/src"));
    let mut modules = modules_of(&root().join("vmm/src"));
    for (name, files) in core {
        assert!(
            modules.insert(name.clone(), files).is_none(),
            "both crates have a module `{name}`"
        );
    }
    modules
}

fn modules_of(src: &Path) -> BTreeMap<String, Vec<PathBuf>> {
    let mut modules: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for path in sources(src) {
        let inside = path.strip_prefix(src).unwrap();
        let top = inside
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap();
        let name = top.trim_end_matches(".rs").to_owned();
        if !matches!(name.as_str(), "lib" | "main" | "cli") {
            modules.entry(name).or_default().push(path);
        }
    }
    modules
}

/// The rows of the table of modules in ARCHITECTURE.md, in their order: module, what it may use.
fn table() -> Vec<(String, BTreeSet<String>)> {
    let text = read(&root().join("ARCHITECTURE.md"));
    let words = |cell: &str| -> BTreeSet<String> {
        cell.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    };
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("| Module |"))
        .skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<_> = line.split('|').collect();
            let name = words(cells[1])
                .into_iter()
                .next()
                .expect("a row names its module");
            (name, words(cells[3]))
        })
        .collect()
}

/// Modules that a source names by `crate::` or `ebb_core::`, outside comments.
fn used(source: &str) -> BTreeSet<String> {
    let code = source
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let mut used = BTreeSet::new();
    for line in code {
        let own = line.split("crate::").skip(1);
        for part in own.chain(line.split("ebb_core::").skip(1)) {
            assert!(!part.starts_with('{'), "name modules one by one: {line}");
            used.insert(
                part.chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect(),
            );
        }
    }
    used
}

#[test]
fn modules_use_only_what_the_table_allows() {
    let table: BTreeMap<_, _> = table().into_iter().collect();
    let modules = modules();
    let (listed, real): (BTreeSet<_>, BTreeSet<_>) = (
        table.keys().cloned().collect(),
        modules.keys().cloned().collect(),
    );
    assert_eq!(
        listed, real,
        "the table of ARCHITECTURE.md lists exactly the modules of vmm/core/src and vmm/src"
    );
    for (name, files) in modules {
        for file in files {
            for used in used(&read(&file)).difference(&table[&name]) {
                assert_eq!(
                    *used,
                    name,
                    "{}: `{name}` may not use `{used}`",
                    file.display()
                );
            }
        }
    }
}

#[test]
fn dependencies_point_down() {
    let mut above = BTreeSet::new();
    for (name, uses) in table() {
        for used in &uses {
            assert!(
                above.contains(used),
                "`{name}` uses `{used}`, which stands below it"
            );
        }
        above.insert(name);
    }
}

#[test]
fn unsafe_stands_only_where_it_may() {
    for (name, files) in modules() {
        for file in files {
            let text = read(&file);
            let found = text.lines().any(|line| {
                let code = line.split("//").next().unwrap_or_default();
                code.contains("unsafe ") && !code.contains("unsafe_")
            });
            assert!(
                !found || UNSAFE_ALLOWED.contains(&name.as_str()),
                "{}: unsafe outside {UNSAFE_ALLOWED:?}",
                file.display()
            );
        }
    }
}

#[test]
fn every_path_that_the_papers_name_exists() {
    for paper in ["ARCHITECTURE.md", "README.md"] {
        let text = read(&root().join(paper));
        let named = text.split('`').skip(1).step_by(2);
        for path in named.filter(|word| is_path(word)) {
            // What commands make, and what is the host's, is not in a clone.
            let made = ["/", "target/", ".cache/"];
            let elsewhere = made.iter().any(|start| path.starts_with(start));
            assert!(
                elsewhere || root().join(path).exists(),
                "{paper} names {path}"
            );
        }
    }
}

/// A word with a slash and nothing but path characters, or a name with a known ending.
fn is_path(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let ending = [".rs", ".md", ".toml", ".sh"]
        .iter()
        .any(|ending| word.ends_with(ending));
    word.chars().all(plain) && (word.contains('/') || ending)
}

#[test]
fn no_file_is_a_god_file() {
    for folder in [
        "vmm/src",
        "vmm/core/src",
        "hypercall-abi/src",
        "guest-agent/src",
        "tests",
    ] {
        for file in sources(&root().join(folder)) {
            let lines = read(&file).lines().count();
            assert!(
                lines <= LONGEST_FILE,
                "{} has {lines} lines: split it",
                file.display()
            );
        }
    }
}
