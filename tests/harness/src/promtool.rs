//! Prometheus' own checker of metrics and rules, which `cargo xtask setup` puts into the cache.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// Where it is.
fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/promtool")
}

/// Runs `promtool check` with these words, and with `input`.
///
/// # Errors
/// What it complains of.
pub fn check(words: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program())
        .arg("check")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start promtool; `cargo xtask setup` fetches it")?;
    // It reads all before it says anything.
    let mut stdin = child.stdin.take().context("its input")?;
    stdin.write_all(input.as_bytes()).context("write")?;
    drop(stdin);
    let output = child.wait_with_output().context("wait for promtool")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::new(format!("promtool check {words:?}: {said}"))),
    }
}
