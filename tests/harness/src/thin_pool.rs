//! A pool of thin block devices (Linux, Documentation/admin-guide/device-mapper/thin-provisioning.rst), for snapshots of containerd's.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::error::{Context, Result};
use crate::host::succeeded;

/// Bytes of its data, and of what it notes of that.
const SIZES: [(&str, u64); 2] = [("data", 256 << 20), ("metadata", 4 << 20)];

/// Sectors of 512 bytes that it hands out at a time.
const BLOCK: u64 = 128;

/// The pool. Removed, with its devices, when this is dropped.
#[derive(Debug)]
pub struct ThinPool {
    name: String,
    /// The loop devices that it is on.
    under: Vec<String>,
    folder: TempDir,
}

fn dmsetup(words: &[&str]) -> Result<String> {
    // There is no udev that would make the devices' nodes.
    succeeded(
        Command::new("dmsetup")
            .env("DM_DISABLE_UDEV", "1")
            .args(words),
    )
}

impl ThinPool {
    /// Makes one, on files.
    ///
    /// # Errors
    /// When `losetup` or `dmsetup` fails.
    pub fn create() -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-thin-").context("make a temporary folder")?;
        let name = folder.path().file_name().context("the folder's name")?;
        let mut pool = Self {
            name: name.to_string_lossy().into_owned(),
            under: Vec::new(),
            folder,
        };
        for (name, size) in SIZES {
            let path = pool.folder.path().join(name);
            let file = File::create(&path).context(path.display())?;
            file.set_len(size).context(path.display())?;
            pool.under.push(attach(&path)?);
        }
        let ([data, metadata], sectors) = ([&pool.under[0], &pool.under[1]], SIZES[0].1 / 512);
        let table =
            format!("0 {sectors} thin-pool {metadata} {data} {BLOCK} 0 1 skip_block_zeroing");
        dmsetup(&["create", &pool.name, "--table", &table])?;
        Ok(pool)
    }

    /// Its name, with which the names of its devices begin.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A loop device of this file.
fn attach(file: &Path) -> Result<String> {
    let mut command = Command::new("losetup");
    command.args(["--find", "--show"]).arg(file);
    Ok(succeeded(&mut command)?.trim().to_owned())
}

impl Drop for ThinPool {
    fn drop(&mut self) {
        let all = dmsetup(&["ls"]).unwrap_or_default();
        let names = all
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        let devices = names.filter(|name| name.starts_with(&format!("{}-", self.name)));
        for name in devices.chain([self.name.as_str()]) {
            let _ = dmsetup(&["remove", "--retry", name]);
        }
        for device in &self.under {
            let _ = succeeded(Command::new("losetup").args(["--detach", device]));
        }
    }
}
