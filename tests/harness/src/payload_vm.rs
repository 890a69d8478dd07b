//! A machine that runs the freestanding guest of the package `payload`.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ebb_payload::freestanding::{self, Counts, Parameters, Task, marker};
use tempfile::TempDir;

use crate::api::Api;
use crate::error::{Context, Error, Result};
use crate::images::Images;
use crate::wait::until;

/// What such a machine is started with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// What the guest does.
    pub task: Task,
    /// vCPUs, 1 to 4.
    pub vcpus: u64,
    /// RAM in MiB.
    pub mib: u64,
    /// It is in files.
    pub shared: bool,
    /// `operations` of the guest's parameters.
    pub operations: u64,
    /// Seed of everything that is random.
    pub seed: u64,
}

/// A running monitor with that guest; killed when this is dropped.
pub struct PayloadVm {
    monitor: Child,
    folder: TempDir,
}

impl PayloadVm {
    /// Starts it, with more options for `ebb run`.
    ///
    /// # Errors
    /// When the environment lacks the monitor, or it cannot be started.
    pub fn start(setup: Setup, options: &[&str]) -> Result<Self> {
        let images = Images::from_environment()?;
        let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
        let path = |name: &str| folder.path().join(name);
        let parameters = Parameters {
            task: setup.task as u64,
            vcpus: setup.vcpus,
            ram: setup.mib << 20,
            operations: setup.operations,
            seed: setup.seed,
        };
        freestanding::write(&path("payload"), &parameters).context("write the guest")?;
        let shared = if setup.shared { "on" } else { "off" };
        let memory = format!("size={}M,shared={shared}", setup.mib);
        let serial = format!("file={}", path("serial").display());
        let monitor = Command::new(&images.ebb)
            .args(["run", "--memory", &memory])
            .args(["--cpus", &format!("boot={}", setup.vcpus)])
            .args(["--serial", &serial, "--kernel"])
            .arg(path("payload"))
            .arg("--api-socket")
            .arg(path("api"))
            .args(options)
            .stderr(File::create(path("log")).context("create the log")?)
            .stdin(Stdio::null())
            .spawn()
            .context(images.ebb.display())?;
        Ok(Self { monitor, folder })
    }

    /// The monitor's process id.
    pub fn pid(&self) -> u32 {
        self.monitor.id()
    }

    /// A client of its API.
    pub fn api(&self) -> Api {
        Api::new(&self.path("api"))
    }

    /// What the monitor has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// What the guest has written so far.
    pub fn serial(&self) -> Vec<u8> {
        fs::read(self.path("serial")).unwrap_or_default()
    }

    /// Waits until the guest has said `word`.
    ///
    /// # Errors
    /// When it does not within `limit`, or the monitor ends before.
    pub fn wait_for(&mut self, word: u64, limit: Duration) -> Result<()> {
        let said = until(format_args!("the guest says {word:#x}"), limit, || {
            let ended = self.monitor.try_wait().context("wait")?;
            if freestanding::has_sent(&self.serial(), word) {
                return Ok(Some(()));
            }
            match ended {
                Some(status) => Err(Error::new(format!("the monitor ended: {status}"))),
                None => Ok(None),
            }
        });
        said.map_err(|error| self.explain(&error))
    }

    /// Whether the guest has ended its machine, and how.
    ///
    /// # Errors
    /// When the monitor did not end with status 0, or the guest has panicked.
    pub fn ended(&mut self) -> Result<bool> {
        let status = self.monitor.try_wait().context("wait")?;
        if freestanding::has_sent(&self.serial(), marker::PANIC) {
            return Err(self.explain(&Error::new("the guest has panicked")));
        }
        match status {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(self.explain(&Error::new(format!("the monitor ended: {status}")))),
        }
    }

    /// What the guest has counted, at its end.
    ///
    /// # Errors
    /// When it has not come to its end.
    pub fn counts(&self) -> Result<Counts> {
        let counts = freestanding::counts(&self.serial());
        counts.ok_or_else(|| self.explain(&Error::new("the guest has not told its counts")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The error, with what the guest has said and the monitor logged last.
    #[must_use]
    pub fn explain(&self, error: &Error) -> Error {
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(8).collect();
        let words = ebb_payload::results(&self.serial());
        Error::new(format!("{error}\nguest: {words:x?}\nebb: {tail:#?}"))
    }
}

impl Drop for PayloadVm {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}
