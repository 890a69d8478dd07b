//! Memory cgroups (v2) of tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::error::{Context, Result};

/// How often a busy cgroup is tried to be removed.
const PATIENCE: u32 = 250;

/// A cgroup of our own, with the memory controller; removed at the end.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one below the root.
    ///
    /// # Errors
    /// The host has no cgroups of version 2 with memory, or we may not make one.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("ebb-test-{}-{name}", std::process::id());
        Self::make(Path::new("/sys/fs/cgroup"), &name)
    }

    /// Makes one below this.
    ///
    /// # Errors
    /// As for [`Cgroup::new`].
    pub fn below(&self, name: &str) -> Result<Self> {
        Self::make(&self.0, name)
    }

    fn make(above: &Path, name: &str) -> Result<Self> {
        let controllers = above.join("cgroup.subtree_control");
        fs::write(&controllers, "+memory").context(controllers.display())?;
        let own = above.join(name);
        fs::create_dir(&own).context(own.display())?;
        Ok(Self(own))
    }

    /// A file of it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn text(&self, file: &str) -> Result<String> {
        let path = self.0.join(file);
        fs::read_to_string(&path).context(path.display())
    }

    /// A file of it that is a number.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn number(&self, file: &str) -> Result<u64> {
        let text = self.text(file)?;
        let number = text.trim().parse().ok();
        number.context(format_args!("{text:?} in {file} of {}", self.0.display()))
    }

    /// Writes a number into a file of it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(&self, file: &str, value: u64) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value.to_string()).context(path.display())
    }

    /// Runs `start` as a member, so that what it starts is one from its first page on.
    ///
    /// # Errors
    /// Joining or leaving fails, or `start` does.
    pub fn within<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let join = |folder: &Path| {
            let procs = folder.join("cgroup.procs");
            fs::write(&procs, std::process::id().to_string()).context(procs.display())
        };
        let before = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
        let before = before.lines().find_map(|line| line.strip_prefix("0::"));
        let before = before.context("this process is in no cgroup of version 2")?;
        join(&self.0)?;
        let started = start();
        join(&Path::new("/sys/fs/cgroup").join(before.trim_start_matches('/')))?;
        started
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy for as long as a member has not been reaped, such as a helper that frees memory behind a monitor.
        for _ in 0..PATIENCE {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays: it is busy", self.0.display());
    }
}
