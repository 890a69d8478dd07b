//! `cargo xtask test`: checks of the source, host tests, and KVM tests where KVM is.

mod kvm;
mod report;
mod tally;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Error, Result};
use ebb_nested_machine::frame::Exit;
use ebb_nested_machine::platform::Platform;
use ebb_nested_machine::runner::run_here;
use ebb_nested_machine::session;
use serde_json::Value;

use self::report::Report;
use crate::cargo::{
    OPTIMIZED_TESTS, TEST_PROGRAMS, build, build_clients, build_debug_monitor, build_malloc, cargo,
    packages,
};
use crate::project::{environment, output_folder, root};
use crate::shell::{progress, recorded, show, visibly};
use crate::{package, setup};

/// How long one test binary may take.
const TIME_LIMIT: Duration = Duration::from_secs(25 * 60);

/// Packages with jemalloc. It takes a minute to build, so all that is done with them is done with optimization: one build.
const WITH_JEMALLOC: [&str; 2] = ["ebb-heap", "ebb-malloc"];

/// Arguments of `test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Tests only: leave out formatting, clippy and documentation
    #[arg(long)]
    quick: bool,
    /// Run only tests whose names, or their binaries' names, contain one of these
    filters: Vec<String>,
}

/// A test binary.
pub struct Binary {
    /// The test target's name.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
    /// The package's folder, which cargo would run it in.
    pub folder: PathBuf,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let mut report = Report::new();
    let assets = setup::ensure()?;
    thread::scope(|scope| {
        // Downloads and packages use one processor at most.
        let others = scope.spawn(|| setup::installed(&assets).and_then(|()| setup::clients()));
        if arguments.quick {
            progress("--quick: formatting, clippy and documentation are not checked");
        } else {
            check_source(&mut report);
        }
        others.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    report.tests("unit tests", |printed| {
        unit_tests(&arguments.filters, printed)
    });
    report.tests("models", models);
    build(&[&package::PROGRAMS[..], &TEST_PROGRAMS].concat())?;
    build_malloc()?;
    build_debug_monitor(unit_test_packages())?;
    build_clients()?;
    if wants_packages(&arguments.filters) {
        report.check("packages", || package::ensure(&assets).map(|()| true));
    }
    let binaries = test_binaries()?;
    let (kvm, host): (Vec<_>, Vec<_>) = binaries
        .into_iter()
        .partition(|binary| binary.name.starts_with("kvm_"));
    let tests = Tests {
        assets,
        filters: arguments.filters.clone(),
        out: output_folder("test")?,
        platform: Platform::probe()?,
    };
    for binary in host {
        let command = tests.command(&binary, None);
        report.tests(&format!("{} (host)", binary.name), |printed| {
            run_here(&command, TIME_LIMIT, &mut |stream, bytes| {
                printed.extend_from_slice(bytes);
                show(stream, bytes);
            })
            .map(Exit::success)
        });
    }
    let retried = kvm::run(&tests, kvm, &mut report)?;
    let passed = report.finish(&root().join("target"), &retried)?;
    Ok(u8::from(!passed))
}

/// Making the packages takes a while.
fn wants_packages(filters: &[String]) -> bool {
    filters.is_empty()
        || filters
            .iter()
            .any(|word| "packages".contains(word.as_str()))
}

fn check_source(report: &mut Report) {
    report.check("formatting", || visibly(cargo(["fmt", "--all", "--check"])));
    report.check("clippy", || {
        let words = ["--all-targets", "--quiet", "--", "-D", "warnings"];
        for_all_packages("clippy", |clippy| clippy.args(words))
    });
    report.check("documentation", || {
        let words = ["--no-deps", "--quiet", "--document-private-items"];
        for_all_packages("doc", |doc| {
            doc.args(words).env("RUSTDOCFLAGS", "-D warnings")
        })
    });
}

/// Runs a command of cargo's for all packages: those with jemalloc as they are released.
fn for_all_packages(name: &str, rest: impl Fn(&mut Command) -> &mut Command) -> Result<bool> {
    let (mut most, mut others) = (cargo([name, "--workspace"]), cargo([name, "--release"]));
    for package in WITH_JEMALLOC {
        most.args(["--exclude", package]);
        others.args(["-p", package]);
    }
    rest(&mut most);
    rest(&mut others);
    Ok(visibly(most)? && visibly(others)?)
}

/// Unit tests and documentation tests.
fn unit_tests(filters: &[String], printed: &mut Vec<u8>) -> Result<bool> {
    let mut tests = cargo(["test", "--no-fail-fast"]);
    tests.args(unit_test_packages()).arg("--").args(filters);
    recorded(tests, printed)
}

/// The words that choose all packages but those with tests of another kind.
fn unit_test_packages() -> impl Iterator<Item = &'static str> {
    let others = OPTIMIZED_TESTS.iter().chain(&["ebb-malloc", "ebb-models"]);
    ["--workspace"]
        .into_iter()
        .chain(others.flat_map(|package| ["--exclude", package]))
}

/// The models of the lazy memory, run by loom: with a folder of their own, as the flag rebuilds everything.
fn models(printed: &mut Vec<u8>) -> Result<bool> {
    let mut models = cargo(["test", "--release", "-p", "ebb-models"]);
    models
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", root().join("target/loom"));
    recorded(models, printed)
}

/// Builds the tests of [`OPTIMIZED_TESTS`] and says where cargo put them.
pub fn test_binaries() -> Result<Vec<Binary>> {
    progress(format_args!(
        "build the tests of {} (release)",
        OPTIMIZED_TESTS.join(", ")
    ));
    let mut build = cargo(["test", "--release", "--no-run"]);
    build.args(packages(&OPTIMIZED_TESTS));
    binaries_of(build)
}

/// Runs a `cargo test --no-run` and says which test binaries it built.
pub fn binaries_of(mut build: Command) -> Result<Vec<Binary>> {
    build
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let what = format!("run {build:?}");
    let output = build.output().context(|| what.clone())?;
    if !output.status.success() {
        return Err(Error::new(format!("{what}: {}", output.status)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut binaries: Vec<Binary> = text.lines().filter_map(test_binary).collect();
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(binaries)
}

fn test_binary(line: &str) -> Option<Binary> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let manifest = Path::new(message["manifest_path"].as_str()?);
    Some(Binary {
        name: message["target"]["name"].as_str()?.to_owned(),
        path: message["executable"].as_str()?.into(),
        folder: manifest.parent()?.to_owned(),
    })
}

/// What the test binaries are run with.
struct Tests {
    assets: Assets,
    filters: Vec<String>,
    out: PathBuf,
    platform: Platform,
}

impl Tests {
    /// Runs a binary, at most so many of its tests at a time.
    fn command(&self, binary: &Binary, threads: Option<usize>) -> session::Command {
        let mut command = session::Command::new([binary.path.to_string_lossy().into_owned()]);
        // A word may mean a binary, all of it.
        if !self.filters.iter().any(|word| binary.name.contains(word)) {
            command.argv.extend(self.filters.iter().cloned());
        }
        command.env = environment(&self.assets, self.platform, &self.out);
        if let Some(threads) = threads {
            let variable = ("RUST_TEST_THREADS".to_owned(), threads.to_string());
            command.env.push(variable);
        }
        command.cwd = Some(binary.folder.clone());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_test_executables_are_taken_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","profile":{"test":true},
            "target":{"name":"kvm_boot"},"executable":"/t/kvm_boot-1","manifest_path":"/p/Cargo.toml"}"#;
        let binary = test_binary(line).unwrap();
        assert_eq!(binary.name, "kvm_boot");
        assert_eq!(binary.path, Path::new("/t/kvm_boot-1"));
        assert_eq!(binary.folder, Path::new("/p"));
        assert!(test_binary(&line.replace("true", "false")).is_none());
        assert!(test_binary(&line.replace("\"/t/kvm_boot-1\"", "null")).is_none());
        assert!(test_binary("warning: not JSON").is_none());
    }
}
