//! Command lines that the monitor must refuse: one line, exit code 35, nothing left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::images::Images;

/// `exit::BAD_ARGUMENTS` of the monitor.
const BAD_ARGUMENTS: i32 = 35;

/// A folder with files to get wrong, and the monitor.
pub struct Bench {
    ebb: PathBuf,
    folder: TempDir,
}

impl Bench {
    /// An empty folder.
    ///
    /// # Errors
    /// When the environment lacks the monitor, or there is no room.
    pub fn new() -> Result<Self> {
        let ebb = Images::from_environment()?.ebb;
        let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
        Ok(Self { ebb, folder })
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into the folder.
    ///
    /// # Errors
    /// When that fails.
    pub fn file(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, content).context(path.display())?;
        Ok(path)
    }

    /// `ebb run` in the folder, with outputs that would be left there if it started.
    pub fn run(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.ebb);
        command.arg("run").args(words);
        for (option, value) in [("--api-socket", "api"), ("--serial", "file=serial")] {
            if !words.contains(&option) {
                command.args([option, value]);
            }
        }
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Runs `command`, which must be refused in one line that has all of `parts`.
    ///
    /// # Errors
    /// What it did instead.
    pub fn refused(&self, mut command: Command, parts: &[&str]) -> Result<()> {
        let before = listing(self.folder.path())?;
        let output = command.output().context("run the monitor")?;
        let after = listing(self.folder.path())?;
        let fault = fault(&output, parts).or_else(|| {
            let new: Vec<_> = after.symmetric_difference(&before).collect();
            (!new.is_empty()).then(|| format!("the folder changed: {new:?}"))
        });
        match fault {
            None => Ok(()),
            Some(fault) => Err(Error::new(format!("{command:?}\n  {fault}\n  {output:?}"))),
        }
    }

    /// `ebb run` with these words must be refused, before it even begins a log; see [`Bench::refused`].
    ///
    /// # Errors
    /// What it did instead.
    pub fn run_refused(&self, words: &[&str], parts: &[&str]) -> Result<()> {
        let mut command = self.run(words);
        if !words.contains(&"--log-file") {
            command.args(["--log-file", "log"]);
        }
        self.refused(command, parts)
    }
}

fn listing(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = fs::read_dir(folder).context(folder.display())?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).context(folder.display()))
        .collect()
}

/// What is wrong about a refusal.
fn fault(output: &Output, parts: &[&str]) -> Option<String> {
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.code() != Some(BAD_ARGUMENTS) {
        return Some(format!("ended with {}, not {BAD_ARGUMENTS}", output.status));
    }
    if !text.starts_with("ebb: ") || text.trim_end().contains('\n') || !text.ends_with('\n') {
        return Some("the message is not one line `ebb: …`".to_owned());
    }
    if !output.stdout.is_empty() {
        return Some("something was written to standard output".to_owned());
    }
    let missing = parts.iter().find(|part| !text.contains(**part))?;
    Some(format!("the message lacks {missing:?}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn output(code: i32, stderr: &str) -> Output {
        let status = ExitStatus::from_raw(code << 8);
        Output {
            status,
            stdout: Vec::new(),
            stderr: stderr.into(),
        }
    }

    #[test]
    fn only_a_good_refusal_passes() {
        assert_eq!(fault(&output(35, "ebb: no x; use y\n"), &["x", "y"]), None);
        for (code, text) in [
            (0, "ebb: x\n"),
            (35, "x\n"),
            (35, "ebb: x\ny\n"),
            (35, "ebb: x"),
            (35, "ebb: z\n"),
        ] {
            assert!(
                fault(&output(code, text), &["x"]).is_some(),
                "{code} {text:?}"
            );
        }
    }
}
