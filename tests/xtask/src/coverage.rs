//! `cargo xtask coverage`: which lines of the source run in unit tests and in a few tests with guests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ebb_nested_machine::error::{Context, Error, Result};
use serde_json::{Value, json};

use crate::cargo::cargo;
use crate::project::{environment, output_folder, root, start_runner};
use crate::shell::{command, progress, quietly, show};
use crate::{setup, test};

/// Debian's LLVM, of the release that reads the profiles of the workspace's Rust. `rustup component add llvm-tools`
/// would need another server than the package registries.
const LLVM: &str = "19";

/// Packages whose lines are counted.
const PACKAGES: [&str; 4] = [
    "ebb-core",
    "ebb-vmm",
    "ebb-hypercall-abi",
    "ebb-guest-agent",
];

/// Tests with guests that run an instrumented monitor: what only a real guest reaches.
const WITH_GUESTS: [&str; 2] = ["kvm_boot", "kvm_teardown"];

/// The share of lines, in percent, that each of [`PARTS`] must reach.
const FLOOR: f64 = 90.0;

/// Parts of the source that have a floor, and their folders.
const PARTS: [(&str, &[&str]); 7] = [
    ("lazy", &["vmm/core/src/lazy/"]),
    ("generation", &["vmm/core/src/generation/"]),
    ("reclaim", &["vmm/src/reclaim/"]),
    ("teardown", &["vmm/src/teardown/"]),
    ("hypercall", &["vmm/src/hypercall/"]),
    ("devices", &["vmm/src/devices/"]),
    ("arena", &["vmm/src/arena/", "guest-agent/src/arena/"]),
];

/// How long one binary with guests may take: the monitor is not optimized.
const TIME_LIMIT: Duration = Duration::from_secs(25 * 60);

/// The second flag is what [`profile_pattern`] needs.
const INSTRUMENTED: &str = "-C instrument-coverage -C llvm-args=-runtime-counter-relocation";

/// Arguments of `coverage`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Unit tests only, without guests
    #[arg(long)]
    unit: bool,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    setup::debian_packages(&[&format!("llvm-{LLVM}")])?;
    let out = output_folder("coverage")?;
    let profiles = out.join("profiles");
    // Profiles of another build of the source would count for this one.
    let _ = std::fs::remove_dir_all(&profiles);
    std::fs::create_dir_all(&profiles).context(|| format!("create {}", profiles.display()))?;
    progress("unit tests, instrumented");
    let mut objects = unit_tests(&out, &profiles)?;
    if !arguments.unit {
        objects.push(with_guests(&out, &profiles)?);
    }
    let files = lines_of_files(&profiles, &objects)?;
    let shares = shares(&files);
    print(&shares);
    let summary = out.join("summary.json");
    let percent = |(part, counts): (&String, &Counts)| (part.clone(), json!(counts.percent()));
    let parts: serde_json::Map<String, Value> = shares.iter().map(percent).collect();
    let json = json!({ "floor_percent": FLOOR, "line_percent": parts });
    std::fs::write(&summary, format!("{json:#}\n"))
        .context(|| format!("write {}", summary.display()))?;
    let floored = PARTS.iter().filter_map(|(part, _)| shares.get(*part));
    let below = floored.filter(|counts| counts.percent() < FLOOR).count();
    Ok(u8::from(below > 0))
}

/// Lines that can run, and those of them that did.
#[derive(Clone, Copy, Default)]
struct Counts {
    lines: u64,
    covered: u64,
}

impl Counts {
    fn percent(self) -> f64 {
        let percent = 100.0 * self.covered as f64 / self.lines.max(1) as f64;
        (percent * 10.0).round() / 10.0
    }
}

/// Cargo, for an instrumented build in a folder of its own.
fn instrumented<'a>(out: &Path, words: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = cargo(words);
    PACKAGES.iter().for_each(|package| {
        command.args(["-p", package]);
    });
    command
        .env("RUSTFLAGS", INSTRUMENTED)
        .env("CARGO_TARGET_DIR", out.join("build"))
        // Build scripts and procedural macros are instrumented, too.
        .env("LLVM_PROFILE_FILE", "/dev/null");
    command
}

/// Where a program has its counts: one file for each program, which all its processes map and change (`%c`). So
/// nothing has to be written at the end, and what counts is also what runs in processes that are killed, end by `_exit` or
/// may not write files, such as the reaper.
fn profile_pattern(profiles: &Path) -> String {
    profiles.join("%m%c.profraw").to_string_lossy().into_owned()
}

/// Runs the unit tests and returns their binaries.
fn unit_tests(out: &Path, profiles: &Path) -> Result<Vec<PathBuf>> {
    let binaries = test::binaries_of(instrumented(out, ["test", "--lib", "--bins", "--no-run"]))?;
    for binary in &binaries {
        let mut run = Command::new(&binary.path);
        run.current_dir(&binary.folder)
            .env("LLVM_PROFILE_FILE", profile_pattern(profiles));
        quietly(run)?;
    }
    Ok(binaries.into_iter().map(|binary| binary.path).collect())
}

/// Runs [`WITH_GUESTS`] with an instrumented monitor, and returns the monitor.
fn with_guests(out: &Path, profiles: &Path) -> Result<PathBuf> {
    let assets = setup::ensure()?;
    quietly(instrumented(out, ["build", "--bins", "--quiet"]))?;
    let monitor = out.join("build/debug/ebb");
    let mut build = cargo(["test", "--release", "--no-run", "-p", "ebb-harness"]);
    build.args(WITH_GUESTS.iter().flat_map(|name| ["--test", name]));
    let binaries = test::binaries_of(build)?;
    let runner = start_runner(&assets)?;
    for name in WITH_GUESTS {
        progress(format_args!("{name}, with an instrumented monitor"));
        let found = binaries.iter().find(|binary| binary.name == name);
        let binary = found.ok_or_else(|| Error::new(format!("there is no test binary {name}")))?;
        let words = [binary.path.to_string_lossy().into_owned()];
        let mut run = ebb_nested_machine::session::Command::new(words);
        run.env = environment(&assets, runner.platform(), out);
        run.env.retain(|(name, _)| name != "EBB_BIN");
        let more = [
            ("EBB_BIN", monitor.to_string_lossy().into_owned()),
            ("LLVM_PROFILE_FILE", profile_pattern(profiles)),
            ("RUST_TEST_THREADS", "2".to_owned()),
        ];
        run.env
            .extend(more.map(|(name, value)| (name.to_owned(), value)));
        run.cwd = Some(binary.folder.clone());
        let exit = runner.run(&run, TIME_LIMIT, &mut show)?;
        if !exit.success() {
            return Err(Error::new(format!("{name} failed: {exit:?}")));
        }
    }
    Ok(monitor)
}

/// What ran of each file of the repository, by its path from the root.
fn lines_of_files(profiles: &Path, objects: &[PathBuf]) -> Result<BTreeMap<String, Counts>> {
    let merged = profiles.join("all.profdata");
    let mut merge = command(&format!("llvm-profdata-{LLVM}"), ["merge", "-sparse", "-o"]);
    merge.arg(&merged).arg(profiles);
    quietly(merge)?;
    let mut export = command(&format!("llvm-cov-{LLVM}"), ["export", "-summary-only"]);
    export.arg("-instr-profile").arg(&merged);
    objects.iter().for_each(|object| {
        export.arg("-object").arg(object);
    });
    let text = quietly(export)?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|error| Error::new(format!("llvm-cov-{LLVM} printed what is no JSON: {error}")))?;
    let files = json["data"][0]["files"].as_array().cloned();
    Ok(counts_of(&files.unwrap_or_default(), &root()))
}

/// Reads the counts of llvm-cov's list of files. Files outside `root` and files of tests are left out.
fn counts_of(files: &[Value], root: &Path) -> BTreeMap<String, Counts> {
    let one = |file: &Value| {
        let path = Path::new(file["filename"].as_str()?);
        let path = path.strip_prefix(root).ok()?.to_str()?;
        let of_tests = path.ends_with("tests.rs") || path.contains("/tests/");
        let lines = &file["summary"]["lines"];
        let counts = Counts {
            lines: lines["count"].as_u64()?,
            covered: lines["covered"].as_u64()?,
        };
        (!of_tests).then(|| (path.to_owned(), counts))
    };
    files.iter().filter_map(one).collect()
}

/// Adds files up: by the name of one of [`PARTS`], or else by their module.
fn shares(files: &BTreeMap<String, Counts>) -> BTreeMap<String, Counts> {
    let mut shares: BTreeMap<String, Counts> = BTreeMap::new();
    for (path, counts) in files {
        let of = |(_, folders): &&(&str, &[&str])| folders.iter().any(|f| path.starts_with(f));
        let name = match PARTS.iter().find(of) {
            Some((part, _)) => (*part).to_owned(),
            None => module(path),
        };
        let sum = shares.entry(name).or_default();
        sum.lines += counts.lines;
        sum.covered += counts.covered;
    }
    shares
}

/// `vmm/src/kvm` of `vmm/src/kvm/mod.rs`, `vmm/src/bus` of `vmm/src/bus.rs`.
fn module(path: &str) -> String {
    let Some((before, after)) = path.split_once("/src/") else {
        return path.to_owned();
    };
    let name = after.split(['/', '.']).next().unwrap_or(after);
    format!("{before}/src/{name}")
}

fn print(shares: &BTreeMap<String, Counts>) {
    println!("{:<32} {:>7} {:>7} {:>6}", "part", "lines", "ran", "share");
    for (name, counts) in shares {
        let floored = PARTS.iter().any(|(part, _)| part == name);
        let note = match counts.percent() {
            percent if floored && percent < FLOOR => format!(" below the floor of {FLOOR} %"),
            _ => String::new(),
        };
        let (lines, covered) = (counts.lines, counts.covered);
        println!(
            "{name:<32} {lines:>7} {covered:>7} {:>5.1}%{note}",
            counts.percent()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, lines: u64, covered: u64) -> Value {
        json!({"filename": path, "summary": {"lines": {"count": lines, "covered": covered}}})
    }

    #[test]
    fn files_add_up_by_part_and_module() {
        let files = [
            file("/r/vmm/core/src/lazy/book.rs", 10, 9),
            file("/r/vmm/src/reclaim/free/walk.rs", 30, 30),
            file("/r/vmm/src/reclaim/pace.rs", 10, 0),
            file("/r/vmm/src/reclaim/tests.rs", 500, 0),
            file("/r/vmm/src/bus.rs", 8, 2),
            file("/elsewhere/core.rs", 100, 0),
        ];
        let shares = shares(&counts_of(&files, Path::new("/r")));
        let percents: Vec<(&str, f64)> = shares
            .iter()
            .map(|(name, counts)| (name.as_str(), counts.percent()))
            .collect();
        let expected = [("lazy", 90.0), ("reclaim", 75.0), ("vmm/src/bus", 25.0)];
        assert_eq!(percents, expected);
    }

    #[test]
    fn a_module_is_named_by_its_first_folder_or_file() {
        assert_eq!(module("vmm/src/kvm/mod.rs"), "vmm/src/kvm");
        assert_eq!(
            module("hypercall-abi/src/call.rs"),
            "hypercall-abi/src/call"
        );
    }
}
