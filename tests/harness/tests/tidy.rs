//! What ARCHITECTURE.md says about the code, checked against the code; and that manifests name nothing that is unused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules that may hold `unsafe`, as ARCHITECTURE.md says.
const UNSAFE_ALLOWED: [&str; 5] = ["doctor", "kvm", "memory", "sys", "teardown/reaper"];
/// Longest source file in lines, tests included.
const LONGEST_FILE: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
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
    let src = root().join("vmm/src");
    for files in modules().into_values() {
        for file in files {
            let text = read(&file);
            let found = text.lines().any(|line| {
                let code = line.split("//").next().unwrap_or_default();
                code.contains("unsafe ") && !code.contains("unsafe_")
            });
            let module = file.with_extension("");
            let allowed = UNSAFE_ALLOWED.map(|allowed| src.join(allowed));
            assert!(
                !found || allowed.iter().any(|allowed| module.starts_with(allowed)),
                "{}: unsafe outside {UNSAFE_ALLOWED:?}",
                file.display()
            );
        }
    }
}

#[test]
fn every_path_that_the_documents_name_exists() {
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text = read(&root().join(document));
        let named = text.split('`').skip(1).step_by(2);
        for path in named.filter(|word| is_path(word)) {
            // What commands make, and what is the host's, is not in a clone.
            let made = ["/", "target/", ".cache/"];
            let elsewhere = made.iter().any(|start| path.starts_with(start));
            assert!(
                elsewhere || root().join(path).exists(),
                "{document} names {path}"
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

/// A manifest, as far as it is written in this repository: one key a line.
struct Manifest {
    folder: PathBuf,
    /// Pairs of a section's name, without brackets, and a line in it.
    lines: Vec<(String, String)>,
}

impl Manifest {
    fn read(folder: PathBuf) -> Self {
        let mut section = String::new();
        let mut lines = Vec::new();
        for line in read(&folder.join("Cargo.toml")).lines() {
            if line.starts_with('[') {
                section = line.trim_matches(['[', ']']).to_owned();
            } else if !line.starts_with('#') {
                lines.push((section.clone(), line.to_owned()));
            }
        }
        Self { folder, lines }
    }

    /// The keys of the sections whose names end with `ending`.
    fn keys(&self, ending: &str) -> BTreeSet<String> {
        let lines = self.lines.iter();
        let lines = lines.filter(|(section, _)| section.ends_with(ending));
        lines
            .filter_map(|(_, line)| line.split_once('='))
            .map(|(key, _)| key.split('.').next().unwrap().trim().to_owned())
            .collect()
    }

    /// The text of all Rust files of the package, without those of packages in folders below it.
    fn code(&self) -> String {
        let mut files = Vec::new();
        for part in ["src", "tests", "examples", "benches"] {
            let part = self.folder.join(part);
            if part.is_dir() && !part.join("Cargo.toml").exists() {
                files.extend(sources(&part));
            }
        }
        files.extend(Some(self.folder.join("build.rs")).filter(|file| file.exists()));
        files.iter().map(|file| read(file)).collect()
    }
}

/// The manifests of all packages of the workspace.
fn packages() -> Vec<Manifest> {
    let workspace = Manifest::read(root());
    let members = workspace.lines.iter().filter_map(|(section, line)| {
        let member = line.trim().strip_prefix('"')?.strip_suffix("\",")?;
        (section == "workspace").then(|| Manifest::read(root().join(member)))
    });
    members.collect()
}

#[test]
fn a_package_is_called_as_its_folder() {
    let packages = packages();
    assert!(packages.len() > 10, "the workspace's members are not found");
    for package in packages {
        let folder = package.folder.file_name().unwrap().to_str().unwrap();
        let name = format!("name = \"ebb-{folder}\"");
        assert!(
            package.lines.contains(&("package".to_owned(), name)),
            "{}: the name is not ebb-{folder}",
            package.folder.display()
        );
    }
}

/// A dependency is taken for used where its name is a word of the code.
#[test]
fn every_dependency_is_used() {
    let mut named = BTreeSet::new();
    for package in packages() {
        let code = package.code();
        let between = |c: char| !c.is_alphanumeric() && c != '_';
        let words: BTreeSet<&str> = code.split(between).collect();
        for dependency in package.keys("dependencies") {
            assert!(
                words.contains(dependency.replace('-', "_").as_str()),
                "{} does not use {dependency}",
                package.folder.display()
            );
            named.insert(dependency);
        }
    }
    let offered = Manifest::read(root()).keys("workspace.dependencies");
    let unused: Vec<_> = offered.difference(&named).collect();
    assert!(unused.is_empty(), "no package uses {unused:?}");
}
