//! `cargo xtask fuzz`: the targets of `tests/fuzz` under libFuzzer, which looks for inputs that reach new code.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ebb_nested_machine::error::{Context, Error, Result};
use ebb_nested_machine::runner::run_here;
use ebb_nested_machine::session;
use serde_json::{Map, Value, json};

use crate::cargo::cargo;
use crate::project::{output_folder, root};
use crate::setup;
use crate::shell::{progress, visibly};

/// What coverage needs of LLVM, as cargo-fuzz asks for it. All of this is there on a stable compiler; a sanitizer would need
/// another one.
const INSTRUMENTED: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

/// Given with it, the flags do not reach build scripts.
const HOST: &str = "x86_64-unknown-linux-gnu";

/// Longest input in bytes, and memory of a run in MiB, above which it is a finding.
const MAX_LEN: u32 = 4096;
const MEMORY_MIB: u32 = 2048;
/// Seconds that one input may take.
const TIMEOUT_S: u32 = 60;

/// Arguments of `fuzz`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Run only these targets: the names of the folders in tests/fuzz/corpus
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 120)]
    seconds: u64,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    setup::debian_packages(&["g++"])?;
    let out = output_folder("fuzz")?;
    let binary = build()?;
    let mut targets = Map::new();
    let mut crashes = 0;
    for name in names(&arguments.targets)? {
        progress(format_args!("{name}: {} s", arguments.seconds));
        let result = fuzz(&binary, &name, arguments.seconds, &out)?;
        crashes += result["crashes"].as_u64().unwrap_or(0);
        targets.insert(name, result);
        // After each one, so that what is interrupted is not lost.
        let of = |what: &str| {
            targets
                .values()
                .filter_map(|one| one[what].as_u64())
                .sum::<u64>()
        };
        let summary = json!({
            "executions": of("executions"), "seconds": of("seconds"), "crashes": of("crashes"), "targets": targets,
        });
        let path = out.join("summary.json");
        std::fs::write(&path, format!("{summary:#}\n"))
            .context(|| format!("write {}", path.display()))?;
    }
    progress(format_args!("{}", out.join("summary.json").display()));
    Ok(u8::from(crashes > 0))
}

fn build() -> Result<PathBuf> {
    let target = root().join("target/fuzz/build");
    let manifest = root().join("tests/fuzz/libfuzzer/Cargo.toml");
    let mut build = cargo(["build", "--release", "--locked", "--target", HOST]);
    build
        .arg("--manifest-path")
        .arg(manifest)
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", INSTRUMENTED);
    if !visibly(build)? {
        return Err(Error::new("the fuzzer cannot be built"));
    }
    Ok(target.join(HOST).join("release/fuzz"))
}

/// The targets that were asked for; all of them if none was.
fn names(wanted: &[String]) -> Result<Vec<String>> {
    let corpora = root().join("tests/fuzz/corpus");
    let entries = std::fs::read_dir(&corpora).context(|| corpora.display().to_string())?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    if let Some(unknown) = wanted.iter().find(|name| !names.contains(name)) {
        let all = names.join(", ");
        return Err(Error::new(format!(
            "there is no target {unknown}; there are {all}"
        )));
    }
    if !wanted.is_empty() {
        names.retain(|name| wanted.contains(name));
    }
    Ok(names)
}

/// Runs one target. What it finds goes to `target/fuzz/NAME`, and what was known is not changed.
fn fuzz(binary: &Path, name: &str, seconds: u64, out: &Path) -> Result<Value> {
    let (new, findings) = (out.join(name).join("new"), out.join(name).join("findings/"));
    for folder in [&new, &findings] {
        std::fs::create_dir_all(folder).context(|| folder.display().to_string())?;
    }
    let known = root().join("tests/fuzz/corpus").join(name);
    let mut words = vec![binary.display().to_string()];
    words.extend([
        format!("-max_total_time={seconds}"),
        format!("-max_len={MAX_LEN}"),
        format!("-rss_limit_mb={MEMORY_MIB}"),
        format!("-timeout={TIMEOUT_S}"),
        format!("-artifact_prefix={}", findings.display()),
        "-print_final_stats=1".to_owned(),
        "-verbosity=1".to_owned(),
    ]);
    words.extend([&new, &known].map(|folder| folder.display().to_string()));
    let mut command = session::Command::new(words);
    command
        .env
        .push(("EBB_FUZZ_TARGET".to_owned(), name.to_owned()));
    let start = Instant::now();
    let mut printed = Vec::new();
    let limit = Duration::from_secs(seconds + 300);
    let exit = run_here(&command, limit, &mut |_, bytes| {
        printed.extend_from_slice(bytes);
    })?;
    let log = out.join(format!("{name}.log"));
    std::fs::write(&log, &printed).context(|| format!("write {}", log.display()))?;
    if !exit.success() {
        let (log, findings) = (log.display(), findings.display());
        progress(format_args!("{name}: {exit:?}: see {log} and {findings}"));
    }
    let executions = executions(&String::from_utf8_lossy(&printed));
    Ok(json!({
        "executions": executions,
        "seconds": start.elapsed().as_secs(),
        "crashes": u64::from(!exit.success()),
    }))
}

/// How many inputs were run, by libFuzzer's last words, or its last line if it has none.
fn executions(printed: &str) -> u64 {
    let of = |line: &str| {
        let number = match line.strip_prefix("stat::number_of_executed_units:") {
            Some(number) => number.trim(),
            None => line.strip_prefix('#')?.split_whitespace().next()?,
        };
        number.parse().ok()
    };
    printed.lines().rev().find_map(of).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_counted_also_when_the_fuzzer_dies() {
        let died = "#2\tINITED cov: 12\n#4096\tpulse  cov: 13\nthread panicked\nSUMMARY: libFuzzer: deadly signal\n";
        assert_eq!(executions(died), 4096);
        let ended =
            "#9\tDONE   cov: 13\nstat::number_of_executed_units: 12345\nstat::peak_rss_mb: 40\n";
        assert_eq!(executions(ended), 12345);
        assert_eq!(executions("no such file"), 0);
    }
}
