//! A running monitor.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::api::Api;
use crate::console::Console;
use crate::error::{Context, Error, Result};
use crate::guest::Guest;
use crate::images::Images;
use crate::wait::{LONG, until};

/// A running `ebb run`, which is killed when this is dropped.
pub struct Monitor {
    child: Child,
    input: Option<ChildStdin>,
    /// The guest's serial console.
    pub console: Console,
    images: Images,
    folder: TempDir,
    started: Instant,
}

impl Monitor {
    pub(crate) fn new(mut child: Child, images: Images, folder: TempDir) -> Self {
        let console = match child.stdout.take() {
            Some(output) => Console::read(output),
            None => Console::read(std::io::empty()),
        };
        let input = child.stdin.take();
        Self {
            child,
            input,
            console,
            images,
            folder,
            started: Instant::now(),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Time since it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Its temporary files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The socket of its API.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    /// A client of its API.
    pub fn api(&self) -> Api {
        Api::new(&self.socket())
    }

    /// Kills it, and starts another one from the snapshot in the files `state` and `memory` of its folder, with more options.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn kill_and_restore(&mut self, more: &[&str]) -> Result<()> {
        self.kill_and_restore_from("state", &["memory"], more)
    }

    /// The same with these files of its folder: the state, and each memory file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn kill_and_restore_from(
        &mut self,
        state: &str,
        memory: &[&str],
        more: &[&str],
    ) -> Result<()> {
        self.child.kill().context("kill the monitor")?;
        self.child.wait().context("wait for the monitor")?;
        let path = |name: &str| self.folder.path().join(name);
        let mut command = Command::new(&self.images.ebb);
        command
            .args(["restore", "-v", "--state"])
            .arg(path(state))
            .args(memory.iter().flat_map(|it| ["--memory".into(), path(it)]))
            .arg("--api-socket")
            .arg(path("api"))
            .arg("--log-file")
            .arg(path("log"))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(path("stderr")).context("create stderr")?);
        let mut child = command.spawn().context("ebb restore")?;
        if let Some(output) = child.stdout.take() {
            self.console = Console::read(output);
        }
        self.input = child.stdin.take();
        self.child = child;
        Ok(())
    }

    /// The workload in the guest of a restored machine.
    ///
    /// # Errors
    /// When somebody has it already.
    pub fn restored_guest(&mut self) -> Result<Guest> {
        let input = self.input.take();
        let input = input.context("the guest's console is taken already")?;
        Ok(Guest::restored(input, self.console.clone()))
    }

    /// Waits for the workload in the guest and drives it from then on.
    ///
    /// # Errors
    /// When it is not ready in time; with what the monitor said.
    pub fn guest(&mut self) -> Result<Guest> {
        let input = self
            .input
            .take()
            .context("the guest's console is taken already")?;
        let guest = Guest::attach(input, self.console.clone());
        guest.map_err(|error| self.explain(error))
    }

    /// What it wrote to its log.
    pub fn log(&self) -> String {
        self.file("log")
    }

    /// What it wrote to standard error.
    pub fn stderr(&self) -> String {
        self.file("stderr")
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }

    /// An error with what the monitor said.
    pub fn explain(&self, error: Error) -> Error {
        let (stderr, log) = (self.stderr(), self.log());
        let tail: Vec<&str> = log.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        Error::new(format!(
            "{error}\nebb said: {stderr}\nebb's log:\n  {}",
            tail.join("\n  ")
        ))
    }

    /// Runs `ebb ctl` with these words.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ctl(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.images.ebb);
        command
            .args(["ctl", "--api-socket"])
            .arg(self.socket())
            .args(words);
        command.output().context(format_args!("ebb ctl {words:?}"))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("no pid")?, signal).context("signal the monitor")
    }

    /// Waits for its end; the exit code.
    ///
    /// # Errors
    /// When it does not end in time, or a signal killed it.
    pub fn wait(&mut self) -> Result<i32> {
        let ended = until("the monitor ends", LONG, || {
            self.child.try_wait().context("wait")
        });
        match ended {
            Ok(status) => match status.code() {
                Some(code) => Ok(code),
                None => Err(self.explain(Error::new(format!("the monitor ended with {status}")))),
            },
            Err(error) => {
                let text = format!("{error}\n{}", self.console.tail());
                Err(self.explain(Error::new(text)))
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
