//! Requests of all kinds that `docs/openapi.json` describes, made by schemathesis to a process that waits for its machine: no
//! answer is 500, and each is one that the document knows. `EBB_SCHEMA_EXAMPLES=N` makes more of them.

use std::path::Path;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::firecracker::Firecracker;
use tempfile::TempDir;

/// Makes the requests.
fn fuzz(socket: &Path) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let examples = std::env::var("EBB_SCHEMA_EXAMPLES").unwrap_or_else(|_| "2".to_owned());
    // It leaves files where it works.
    let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
    let output = Command::new(root.join(".cache/python-clients/bin/python"))
        .arg(root.join("tests/clients/python/fuzz_api.py"))
        .arg(socket)
        .arg(examples)
        .current_dir(&folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    let output = output.context("start Python; `cargo xtask test` installs what it needs")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{}\n{said}", output.status);
    assert!(said.contains(" passed"), "{said}");
    Ok(())
}

#[test]
fn a_process_without_a_machine() -> Result<()> {
    let vm = Firecracker::serve()?;
    fuzz(&vm.path("api"))?;
    assert_eq!(vm.api().get("/")?["state"], "Not started");
    Ok(())
}
