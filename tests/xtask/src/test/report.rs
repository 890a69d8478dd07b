//! What was run, how it went, and the summary for people and for programs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use ebb_nested_machine::error::{Context, Result, chain};
use serde_json::{Value, json};

use super::tally::Tally;
use crate::shell::{Seconds, progress};

/// One step: a check of the source, or programs that ran tests.
pub struct Step {
    name: String,
    result: Result<bool>,
    time: Duration,
    tally: Tally,
}

impl Step {
    /// Runs a step that appends to a text what its tests print.
    pub fn run(name: &str, run: impl FnOnce(&mut Vec<u8>) -> Result<bool>) -> Self {
        let start = Instant::now();
        let mut printed = Vec::new();
        let result = run(&mut printed);
        Self {
            name: name.to_owned(),
            result,
            time: start.elapsed(),
            tally: Tally::read(&String::from_utf8_lossy(&printed)),
        }
    }

    fn word(&self) -> &'static str {
        match self.result {
            Ok(true) => "ok",
            Ok(false) => "FAILED",
            Err(_) => "ERROR",
        }
    }

    /// The tests that failed, by the step's name and theirs, and what they printed last; the step itself where it failed
    /// without naming one.
    fn failed(&self) -> Vec<(String, &str)> {
        let tests = self.tally.failed.iter();
        let mut failed: Vec<(String, &str)> = tests
            .map(|(test, printed)| (format!("{}: {test}", self.name), printed.as_str()))
            .collect();
        if failed.is_empty() && !matches!(self.result, Ok(true)) {
            failed.push((self.name.clone(), ""));
        }
        failed
    }
}

/// All steps of a run.
pub struct Report {
    steps: Vec<Step>,
    start: Instant,
}

impl Report {
    /// A report of a run that begins now.
    pub fn new() -> Self {
        Self {
            steps: Vec::new(),
            start: Instant::now(),
        }
    }

    /// Runs a step that runs no tests.
    pub fn check(&mut self, name: &str, run: impl FnOnce() -> Result<bool>) {
        self.tests(name, |_| run());
    }

    /// Runs a step that appends to a text what its tests print.
    pub fn tests(&mut self, name: &str, run: impl FnOnce(&mut Vec<u8>) -> Result<bool>) {
        progress(name);
        self.add(Step::run(name, run));
    }

    /// Adds a step that was run, and prints what kept it from its end.
    pub fn add(&mut self, step: Step) {
        if let Err(error) = &step.result {
            println!("error: {}", chain(error));
        }
        self.steps.push(step);
    }

    /// Prints the summary and writes it to `test/summary.json` in the folder `target`, with what was `retried` and the
    /// summaries of other commands that are in that folder. Returns true if everything passed.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self, target: &Path, retried: &[String]) -> Result<bool> {
        let failed: Vec<(String, &str)> = self.steps.iter().flat_map(Step::failed).collect();
        progress("summary");
        for step in &self.steps {
            println!(
                "    {:6} {} ({})",
                step.word(),
                step.name,
                Seconds(step.time)
            );
        }
        for (name, printed) in &failed {
            println!("    failed: {name}");
            for line in printed.lines() {
                println!("        {line}");
            }
        }
        retried.iter().for_each(|what| println!("    {what}"));
        let names: Vec<&String> = failed.iter().map(|(name, _)| name).collect();
        let mut summary = self.summary(&names, retried);
        for command in ["fuzz", "coverage"] {
            if let Some(last) = read(&target.join(command).join("summary.json")) {
                summary[command] = last;
            }
        }
        let file = target.join("test/summary.json");
        std::fs::write(&file, format!("{summary:#}\n"))
            .context(|| format!("write {}", file.display()))?;
        let time = Seconds(self.start.elapsed());
        progress(format_args!("{time}; written to {}", file.display()));
        println!("{} passed, {} failed", self.passed(), failed.len());
        Ok(failed.is_empty())
    }

    fn passed(&self) -> u64 {
        self.steps.iter().map(|step| step.tally.passed).sum()
    }

    fn summary(&self, failed: &[&String], retried: &[String]) -> Value {
        let steps = self.steps.iter().map(|step| {
            json!({
                "name": step.name,
                "result": step.word(),
                "seconds": step.time.as_secs_f64(),
                "tests": step.tally.passed + step.tally.failed.len() as u64,
            })
        });
        let steps: Vec<Value> = steps.collect();
        let tests = steps.iter().filter_map(|step| step["tests"].as_u64());
        let mut figures = BTreeMap::<&str, u64>::new();
        for (name, value) in self.steps.iter().flat_map(|step| &step.tally.figures) {
            *figures.entry(name).or_default() += value;
        }
        json!({
            "run": tests.sum::<u64>(),
            "passed": self.passed(),
            "failed": failed,
            "retried": retried,
            "seconds": self.start.elapsed().as_secs_f64(),
            "figures": figures,
            "steps": steps,
        })
    }
}

/// The summary of another command; `None` if there is none.
fn read(file: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_tests_and_names_what_failed() {
        let mut report = Report::new();
        report.check("format", || Ok(true));
        report.check("lints", || Ok(false));
        report.tests("kvm_boot", |printed| {
            let text = "\nFIGURE kill_points 5\n\nfailures:\n    a\n\ntest result: FAILED. 2 passed; 1 failed;";
            printed.extend_from_slice(text.as_bytes());
            Ok(false)
        });
        let folder = std::env::temp_dir().join(format!("ebb-report-{}", std::process::id()));
        for name in ["test", "fuzz"] {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("fuzz/summary.json"), r#"{"executions":9}"#).unwrap();
        let retried = ["boot: ok after 1 retries".to_owned()];
        assert!(!report.finish(&folder, &retried).unwrap());
        let summary = read(&folder.join("test/summary.json")).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(summary["run"], 3);
        assert_eq!(summary["passed"], 2);
        assert_eq!(summary["failed"], json!(["lints", "kvm_boot: a"]));
        assert_eq!(summary["retried"], json!(retried));
        assert_eq!(summary["figures"], json!({ "kill_points": 5 }));
        assert_eq!(summary["fuzz"], json!({ "executions": 9 }));
        assert!(summary.get("coverage").is_none());
        assert_eq!(summary["steps"][1]["result"], "FAILED");
        assert_eq!(summary["steps"][2]["tests"], 3);
    }
}
