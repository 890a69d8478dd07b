//! `cargo xtask test`: checks of the source, host tests, and KVM tests where KVM is.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Error, Result, chain};
use ebb_nested_machine::frame::Exit;
use ebb_nested_machine::platform::Platform;
use ebb_nested_machine::runner::{Runner, run_here};
use ebb_nested_machine::session::{Command, Stream};
use serde_json::Value;

use crate::cargo::{build, build_library, cargo};
use crate::project::{environment, output_folder, root, start_runner};
use crate::shell::{Seconds, progress, visibly};
use crate::verdict::{failed_tests, kernel_broke};
use crate::{selftest, setup};

/// How long one test binary may take.
const TIME_LIMIT: Duration = Duration::from_secs(25 * 60);

/// How often tests that an emulated processor broke are run again.
const AGAIN: u32 = 3;

/// Arguments of `test`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Tests only: leave out formatting, clippy and documentation
    #[arg(long)]
    quick: bool,
    /// Run only tests whose names, or their binaries' names, contain one of these
    filters: Vec<String>,
}

/// Packages whose tests are built with optimization and run where KVM is if their binary's name starts with `kvm_`.
const ACROSS: [&str; 3] = ["ebb-harness", "ebb-benches", "ebb-demo"];

/// A test binary of one of these packages.
struct Binary {
    name: String,
    path: PathBuf,
    /// The package's folder, which cargo would run it in.
    folder: PathBuf,
}

/// What was run, and how it went.
#[derive(Default)]
struct Report(Vec<(String, Result<bool>, Duration)>);

impl Report {
    fn step(&mut self, name: &str, run: impl FnOnce() -> Result<bool>) {
        progress(name);
        let start = Instant::now();
        let result = run();
        if let Err(error) = &result {
            println!("error: {}", chain(error));
        }
        self.0.push((name.to_owned(), result, start.elapsed()));
    }

    /// Prints the summary; whether everything passed.
    fn finish(&self) -> bool {
        progress("summary");
        for (name, result, time) in &self.0 {
            let word = match result {
                Ok(true) => "ok    ",
                Ok(false) => "FAILED",
                Err(_) => "ERROR ",
            };
            println!("    {word} {name} ({})", Seconds(*time));
        }
        self.0
            .iter()
            .all(|(_, result, _)| matches!(result, Ok(true)))
    }
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let start = Instant::now();
    let assets = setup::ensure()?;
    setup::installed(&assets)?;
    let mut report = Report::default();
    if arguments.quick {
        progress("--quick: formatting, clippy and documentation are not checked");
    } else {
        check_source(&mut report);
    }
    report.step("unit tests", || unit_tests(&arguments.filters));
    report.step("models", models);
    report.step("documentation tests", || {
        visibly(cargo(["test", "--workspace", "--doc", "-q"]))
    });
    build(&["ebb-vmm", "ebb-harness"])?;
    build_library("ebb-malloc")?;
    let binaries = test_binaries()?;
    let (kvm, host): (Vec<_>, Vec<_>) = binaries
        .into_iter()
        .partition(|binary| binary.name.starts_with("kvm_"));
    let tests = Tests {
        assets,
        filters: arguments.filters.clone(),
        out: output_folder("test")?,
    };
    let platform = Platform::probe()?;
    for binary in host {
        let command = tests.command(&binary, platform);
        report.step(&format!("{} (host)", binary.name), || {
            run_here(&command, TIME_LIMIT, &mut show).map(Exit::success)
        });
    }
    let mut runner = None;
    if platform == Platform::Nested {
        report.step("nested machine", || {
            let machine = runner.insert(start_runner(&tests.assets)?);
            selftest::check(machine)
        });
    }
    tests.on_kvm(&kvm, runner, &mut report);
    let passed = report.finish();
    let word = if passed {
        "everything passed"
    } else {
        "something FAILED"
    };
    progress(format_args!("{word} in {}", Seconds(start.elapsed())));
    Ok(u8::from(!passed))
}

/// Hands a command's output on as it is.
pub fn show(stream: Stream, bytes: &[u8]) {
    // A closed standard output ends nothing here.
    let _ = match stream {
        Stream::Stdout => write_out(std::io::stdout().lock(), bytes),
        Stream::Stderr => write_out(std::io::stderr().lock(), bytes),
    };
}

fn write_out(mut to: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn check_source(report: &mut Report) {
    report.step("formatting", || visibly(cargo(["fmt", "--all", "--check"])));
    report.step("clippy", || {
        let words = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ];
        visibly(cargo(words))
    });
    report.step("documentation", || {
        let mut doc = cargo(["doc", "--workspace", "--no-deps", "--quiet"]);
        doc.args(["--document-private-items"])
            .env("RUSTDOCFLAGS", "-D warnings");
        visibly(doc)
    });
}

fn unit_tests(filters: &[String]) -> Result<bool> {
    let has_nextest = Process::new("cargo-nextest")
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut tests = if has_nextest {
        cargo(["nextest", "run", "--no-tests", "pass"])
    } else {
        cargo(["test", "--all-targets"])
    };
    tests.args(["--workspace", "--exclude", "ebb-models"]);
    ACROSS.iter().for_each(|package| {
        tests.args(["--exclude", package]);
    });
    if has_nextest {
        tests.args(filters);
    } else {
        tests.arg("--").args(filters);
    }
    visibly(tests)
}

/// The models of the lazy memory, run by loom: with a folder of their own, as the flag rebuilds everything.
fn models() -> Result<bool> {
    let mut models = cargo(["test", "--release", "-p", "ebb-models"]);
    models
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", root().join("target/loom"));
    visibly(models)
}

/// Builds the tests of [`ACROSS`] and says where cargo put them.
fn test_binaries() -> Result<Vec<Binary>> {
    let what = format!("build the tests of {} (release)", ACROSS.join(", "));
    progress(&what);
    let mut build = cargo(["test", "--release", "--no-run"]);
    ACROSS.iter().for_each(|package| {
        build.args(["-p", package]);
    });
    build
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
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

struct Tests {
    assets: Assets,
    filters: Vec<String>,
    out: PathBuf,
}

impl Tests {
    fn command(&self, binary: &Binary, platform: Platform) -> Command {
        let mut command = Command::new([binary.path.to_string_lossy().into_owned()]);
        // A word may mean a binary, all of it.
        if !self.filters.iter().any(|word| binary.name.contains(word)) {
            command.argv.extend(self.filters.iter().cloned());
        }
        command.env = environment(&self.assets, platform, &self.out);
        if platform == Platform::Nested {
            // The machine's CPUs are emulated by what is usually fewer.
            command.env.push(("RUST_TEST_THREADS".into(), "2".into()));
        }
        command.cwd = Some(binary.folder.clone());
        command
    }

    fn on_kvm(&self, binaries: &[Binary], mut runner: Option<Runner>, report: &mut Report) {
        if binaries.is_empty() {
            progress("there is no test binary named kvm_*");
        }
        for binary in binaries {
            report.step(&format!("{} (KVM)", binary.name), || {
                self.on_runner(binary, &mut runner)
            });
        }
    }

    /// Runs one binary; those tests again, `AGAIN` times at most and saying so, that an emulated processor broke.
    fn on_runner(&self, binary: &Binary, runner: &mut Option<Runner>) -> Result<bool> {
        let mut failed = Vec::new();
        for turn in 0..=AGAIN {
            let running = match runner.take() {
                Some(running) => running,
                None => start_runner(&self.assets)?,
            };
            let platform = running.platform();
            let mut command = self.command(binary, platform);
            if !failed.is_empty() {
                command.argv.truncate(1);
                command.argv.push("--exact".into());
                command.argv.append(&mut failed);
            }
            let mut printed = Vec::new();
            let mut keep = |stream, bytes: &[u8]| {
                printed.extend_from_slice(bytes);
                show(stream, bytes);
            };
            match running.run(&command, TIME_LIMIT, &mut keep) {
                Ok(exit) => {
                    let emulated = platform == Platform::Nested && kernel_broke(&printed);
                    if exit.success() || turn == AGAIN || !emulated {
                        *runner = Some(running);
                        return Ok(exit.success());
                    }
                    failed = failed_tests(&printed);
                    progress(format_args!(
                        "a guest broke or went silent on the emulated processor: {} once more, in a fresh machine",
                        failed.join(", ")
                    ));
                }
                // After an error the machine is not trusted: what comes next gets a fresh one.
                Err(error) if turn == AGAIN || running.is_alive() => return Err(error),
                Err(error) => {
                    println!("error: {}", chain(&error));
                    progress("the nested machine itself broke: once more in a fresh one");
                }
            }
        }
        Ok(false)
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
