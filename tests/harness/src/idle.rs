//! Machines whose guest only sleeps: for tests and measurements of how machines end.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use ebb_payload::Program;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::error::{Context, Result};
pub use crate::host::Relative;
use crate::host::relatives;
use crate::wait::{LONG, until_often};
use crate::{Api, Images};

/// Where one machine after the other lives: a kernel that halts, and what the monitor makes beside it.
pub struct Place {
    ebb: PathBuf,
    loader: Vec<String>,
    folder: TempDir,
}

/// A running monitor; killed when this is dropped.
pub struct Idle {
    child: Child,
}

impl Place {
    /// A new one.
    ///
    /// # Errors
    /// When the environment lacks the monitor, or there is no room.
    pub fn new() -> Result<Self> {
        let ebb = Images::from_environment()?.ebb;
        let folder = TempDir::with_prefix("ebb-idle-").context("make a temporary folder")?;
        let mut program = Program::kernel();
        program.halt();
        let kernel = folder.path().join("kernel");
        program.write(&kernel).context("write the payload")?;
        let loader = Vec::new();
        Ok(Self {
            ebb,
            loader,
            folder,
        })
    }

    /// A new one whose monitors run with the C library of the emulator, where that has its own: a newer one.
    ///
    /// # Errors
    /// As for [`Place::new`]; when the environment does not name the emulator.
    pub fn with_newer_library() -> Result<Self> {
        let words = std::env::var("EBB_QEMU").context("EBB_QEMU")?;
        let words: Vec<_> = words.lines().map(str::to_owned).collect();
        let loader = match &words[..] {
            [_, option, _, ..] if option == "--library-path" => words[..3].to_vec(),
            // This host's own library is as new as the emulator needs.
            _ => Vec::new(),
        };
        Ok(Self {
            loader,
            ..Self::new()?
        })
    }

    /// A path in it: `api`, `log`, `stderr`, `kernel`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What stands in a file of it.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Starts a machine with this `--memory`, this `--guardian`, and more words, without which the
    /// serial port goes nowhere.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, memory: &str, guardian: &str, more: &[&str]) -> Result<Idle> {
        let command = match &self.loader[..] {
            [] => Command::new(&self.ebb),
            [loader, options @ ..] => {
                let mut command = Command::new(loader);
                command.args(options).arg(&self.ebb);
                command
            }
        };
        self.launch(command, memory, guardian, more)
    }

    fn launch(
        &self,
        mut command: Command,
        memory: &str,
        guardian: &str,
        more: &[&str],
    ) -> Result<Idle> {
        let stderr = fs::File::create(self.path("stderr")).context("make stderr")?;
        let _ = fs::remove_file(self.path("log"));
        command
            .args(["run", "-v", "--memory", memory])
            .args(["--guardian", guardian, "--kernel"])
            .arg(self.path("kernel"))
            .arg("--api-socket")
            .arg(self.path("api"))
            .arg("--log-file")
            .arg(self.path("log"))
            .args(if more.is_empty() {
                &["--serial", "null"]
            } else {
                more
            })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let child = command.spawn().context(self.ebb.display())?;
        Ok(Idle { child })
    }

    /// Starts one and waits for its API: its memory is there then.
    ///
    /// # Errors
    /// As for [`Place::start`]; when the API does not come up.
    pub fn running(&self, memory: &str, guardian: &str) -> Result<Idle> {
        self.until_it_runs(self.start(memory, guardian, &[])?)
    }

    /// As [`Place::running`], with all its processes in `cgroup`.
    ///
    /// # Errors
    /// As for [`Place::running`].
    pub fn running_in(&self, cgroup: &Cgroup, memory: &str, guardian: &str) -> Result<Idle> {
        self.until_it_runs(self.start_in(cgroup, memory, guardian)?)
    }

    /// As [`Place::start`], with all its processes in `cgroup`.
    ///
    /// # Errors
    /// As for [`Place::start`].
    pub fn start_in(&self, cgroup: &Cgroup, memory: &str, guardian: &str) -> Result<Idle> {
        self.launch(cgroup.command(&self.ebb), memory, guardian, &[])
    }

    /// Waits for the API of a machine that was started.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn until_it_runs(&self, mut idle: Idle) -> Result<Idle> {
        let api = Api::new(&self.path("api"));
        until_often("the API answers", LONG, || {
            if let Some(status) = idle.child.try_wait().context("wait")? {
                let (log, said) = (self.text("log"), self.text("stderr"));
                let text = format!("the monitor has ended: {status}\n{log}\n{said}");
                return Err(crate::Error::new(text));
            }
            Ok(api.is_running(idle.pid()).then_some(()))
        })?;
        Ok(idle)
    }

    /// Runs `ebb ctl` with these words.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ctl(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.ebb);
        command
            .args(["ctl", "--api-socket"])
            .arg(self.path("api"))
            .args(words);
        command.output().context(format_args!("ebb ctl {words:?}"))
    }

    /// The living processes of its machines, monitors and helpers, by name.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn relatives(&self) -> Result<Vec<Relative>> {
        relatives(self.folder.path())
    }

    /// What is left there of machines: all but the kernel, the log and standard error.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn litter(&self) -> Result<Vec<PathBuf>> {
        let known = ["kernel", "log", "stderr"];
        let entries = fs::read_dir(self.folder.path()).context("list the folder")?;
        let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let strange = |path: &PathBuf| !known.iter().any(|name| path.ends_with(name));
        Ok(paths.filter(strange).collect())
    }

    /// Waits until neither process nor file is left.
    ///
    /// # Errors
    /// What is left after `limit`.
    pub fn vanished(&self, limit: Duration) -> Result<()> {
        let done = until_often("everything is gone", limit, || {
            Ok((self.relatives()?.is_empty() && self.litter()?.is_empty()).then_some(()))
        });
        let (left, litter) = (self.relatives()?, self.litter()?);
        done.context(format_args!("{left:?} {litter:?}"))
    }
}

impl Idle {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal; nothing happens when it has ended.
    pub fn signal(&self, signal: Signal) {
        signal_to(self.child.id(), signal);
    }

    /// Waits for its end; the exit code, nothing when a signal killed it.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self) -> Result<Option<i32>> {
        let status = until_often("the monitor ends", LONG, || {
            self.child.try_wait().context("wait")
        })?;
        Ok(status.code())
    }
}

/// Sends a signal to a process that may have ended.
pub fn signal_to(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
