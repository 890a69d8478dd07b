//! Memory cgroups (v2) of tests.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::error::{Context, Result};

/// How often removing a busy cgroup is tried.
const ATTEMPTS: u32 = 250;

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

    /// Makes one without controllers, which counts the processors' time all the same.
    ///
    /// # Errors
    /// The host has no cgroups of version 2, or we may not make one.
    pub fn counting(name: &str) -> Result<Self> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let mount = mounts
            .into_iter()
            .find(|it| it.join("cgroup.controllers").exists());
        let mount = mount.context("there are no cgroups of version 2")?;
        let own = mount.join(format!("ebb-test-{}-{name}", std::process::id()));
        fs::create_dir(&own).context(own.display())?;
        Ok(Self(own))
    }

    /// Seconds of processors that its processes have used, those that have ended among them.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let text = self.text("cpu.stat")?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        let micros: Option<f64> = line.and_then(|line| line.parse().ok());
        Ok(micros.context("cpu.stat has no usage_usec")? / 1e6)
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

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
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

    /// Bytes that the kernel has taken from its processes because they had been marked with `MADV_FREE`.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn lazily_freed(&self) -> Result<u64> {
        Ok(self.stat("pglazyfreed")? * rustix::param::page_size() as u64)
    }

    /// Bytes of files in memory (memfd and tmpfs) that its processes were the first to touch.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn shmem(&self) -> Result<u64> {
        self.stat("shmem")
    }

    fn stat(&self, name: &str) -> Result<u64> {
        let stat = self.text("memory.stat")?;
        let mut fields = stat.lines().filter_map(|line| line.split_once(' '));
        let value = fields
            .find(|(field, _)| *field == name)
            .and_then(|(_, value)| value.parse().ok());
        value.context(format_args!("memory.stat has no {name}"))
    }

    /// The processes in it, without those in cgroups below it.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn members(&self) -> Result<Vec<u32>> {
        let text = self.text("cgroup.procs")?;
        Ok(text.lines().filter_map(|pid| pid.parse().ok()).collect())
    }

    /// Writes a value into a file of it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(&self, file: &str, value: impl Display) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value.to_string()).context(path.display())
    }

    /// A command whose process joins this cgroup before `program` starts, so that all its memory is charged here.
    /// Only that process joins. The caller stays where it is, and so does what its other threads start.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]);
        command.arg(self.0.join("cgroup.procs")).arg(program);
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy for as long as a member has not been reaped, such as a helper that frees memory behind a monitor.
        for _ in 0..ATTEMPTS {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays: it is busy", self.0.display());
    }
}
