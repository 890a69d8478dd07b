//! Requests of all kinds that `docs/openapi.json` describes, made by schemathesis: no answer is 500, and each is one that the document
//! knows.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::error::{Context, Error, Result};

/// Makes the requests, so many of each kind in each of `phases`, with further options of schemathesis.
///
/// # Errors
/// An answer that should not be, or schemathesis cannot be started.
pub fn fuzz(socket: &Path, examples: &str, phases: &str, more: &[&str]) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // It leaves files where it works.
    let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let output = Command::new(root.join(".cache/python-clients/bin/python"))
        .arg(root.join("tests/clients/python/fuzz_api.py"))
        .arg(socket)
        .args([examples, phases])
        .args(more)
        .current_dir(&folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    let output = output.context("start Python; `cargo xtask test` installs what it needs")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if output.status.success() && said.contains(" passed") {
        return Ok(());
    }
    Err(Error::new(format!("{}\n{said}", output.status)))
}
