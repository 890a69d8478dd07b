//! Files for systemd. No KVM is needed.

use std::fs;
use std::process::Command;

use ebb_harness::error::{Context, Result};

/// The drop-in is read without complaint.
#[test]
fn systemd_understands_the_drop_in() -> Result<()> {
    let folder = tempfile::tempdir().context("make a folder")?;
    let unit = folder.path().join("machine.service");
    let drop_ins = folder.path().join("machine.service.d");
    let drop_in = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../resources/package/ebb-teardown.conf"
    );
    fs::write(&unit, "[Service]\nExecStart=/bin/true\n").context("write the unit")?;
    fs::create_dir(&drop_ins).context("make the drop-in's folder")?;
    fs::copy(drop_in, drop_ins.join("ebb-teardown.conf")).context(drop_in)?;
    let mut command = Command::new("systemd-analyze");
    let said = command.arg("verify").arg(&unit).output();
    let said = said.context("systemd-analyze; install the package systemd")?;
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(
        said.status.success() && !text.contains("ebb-teardown.conf"),
        "{text}"
    );
    Ok(())
}
