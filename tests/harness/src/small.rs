//! A file system that is soon full.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::error::{Context, Error, Result};

/// A file system in memory, which is gone when this is dropped.
pub struct SmallFileSystem(TempDir);

impl SmallFileSystem {
    /// With room for `bytes` bytes.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn new(bytes: u64) -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-small-").context("make a folder")?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]);
        let output = mount.arg(folder.path()).output().context("mount")?;
        if !output.status.success() {
            return Err(Error::new(format!("{mount:?}: {output:?}")));
        }
        Ok(Self(folder))
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
