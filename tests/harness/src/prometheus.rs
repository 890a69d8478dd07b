//! Prometheus, and its own checker of metrics and rules, which `cargo xtask` puts into the cache.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// A program of Debian's package.
fn program(name: &str) -> Command {
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache");
    Command::new(cache.join(name))
}

/// The checker, which also asks a server.
#[must_use]
pub fn promtool() -> Command {
    program("promtool")
}

/// The server; it is there for benchmarks only.
#[must_use]
pub fn server() -> Command {
    program("prometheus")
}

/// Runs `promtool check` with these words, and with `input`.
///
/// # Errors
/// What it complains of.
pub fn check(words: &[&str], input: &str) -> Result<()> {
    let mut child = promtool()
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
