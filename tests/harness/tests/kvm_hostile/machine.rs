//! A machine whose guest runs scripts, and what the host sees of its monitor.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::{LONG, until_often};
use ebb_harness::{Api, Images};
use ebb_payload::freestanding::{self, Parameters, Task, marker};
use ebb_payload::script::{PASSED, Scripts};
use tempfile::TempDir;

/// What should come soon. Emulated processors are slow on a busy host.
pub const PATIENCE: Duration = LONG;
/// RAM of each machine in MiB.
pub const RAM_MIB: u64 = 32;
/// RAM of each machine in bytes.
pub const RAM: u64 = RAM_MIB << 20;

/// A monitor with a guest that runs scripts; killed when this is dropped.
pub struct Machine {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    folder: TempDir,
}

/// What can be seen of a monitor from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Open descriptors: what they refer to, and how many.
    pub descriptors: BTreeMap<String, usize>,
    /// Threads by name.
    pub threads: BTreeMap<String, usize>,
}

/// How a script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps went as expected; the last result.
    Passed(u64),
    /// The guest ended the machine, with this exit code.
    Exit(i32),
}

impl Machine {
    /// Starts it with these scripts and more options, and waits until the guest has written to all of its memory.
    pub fn start(scripts: &Scripts, vcpus: u64, options: &[&str]) -> Result<Self> {
        let command = Command::new(Images::from_environment()?.ebb);
        Self::start_by(command, scripts, vcpus, options)
    }

    /// As [`Self::start`], of a debug build whose thread of this name panics as soon as it has something to do.
    pub fn panicking(thread: &str, scripts: &Scripts, options: &[&str]) -> Result<Self> {
        let mut command = Command::new(Images::debug_ebb()?);
        command.env("EBB_PANIC", thread);
        Self::start_by(command, scripts, 1, options)
    }

    fn start_by(
        mut command: Command,
        scripts: &Scripts,
        vcpus: u64,
        options: &[&str],
    ) -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-hostile-").context("make a temporary folder")?;
        let path = |name: &str| folder.path().join(name);
        let parameters = Parameters {
            task: Task::Scripts as u64,
            vcpus,
            ram: RAM,
            operations: 0,
            seed: 0,
        };
        freestanding::write_with(&path("guest"), &parameters, Some(scripts))
            .context("write the guest")?;
        command
            .args(["run", "--api-socket", "api", "--kernel", "guest"])
            .args(["--memory", &format!("size={RAM_MIB}M")])
            .args(["--cpus", &format!("boot={vcpus}")])
            .args(options)
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(path("log")).context("create the log")?);
        let mut child = command.spawn().context("start the monitor")?;
        let input = child.stdin.take().context("no input")?;
        let mut stdout = child.stdout.take().context("no output")?;
        let (sender, output) = channel();
        // Ends with the monitor.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut machine = Self {
            child,
            input,
            output,
            seen: Vec::new(),
            folder,
        };
        match machine.said(marker::READY, 0, PATIENCE)? {
            Some(_) => Ok(machine),
            None => Err(machine.explain("the guest ended before it began")),
        }
    }

    /// Runs a script to its end.
    ///
    /// # Errors
    /// When a step does not go as expected, or the guest says nothing for `limit`.
    pub fn run(&mut self, script: u8, limit: Duration) -> Result<End> {
        self.seen.clear();
        self.input.write_all(&[script]).context("name a script")?;
        let Some(words) = self.said(marker::SCRIPT, 2, limit)? else {
            let status = until_often("the monitor ends", PATIENCE, || {
                self.child.try_wait().context("wait")
            })?;
            let code = status.code();
            return code
                .map(End::Exit)
                .ok_or_else(|| self.explain(format!("the monitor ended: {status}")));
        };
        match words[..] {
            [PASSED, last] => Ok(End::Passed(last)),
            [step, result] => Err(self.explain(format!("step {step} gave {result:#x}"))),
            _ => Err(self.explain("two words were expected")),
        }
    }

    /// Waits until the guest has said `word`, and returns the words behind it. `None`: the monitor has ended.
    fn said(&mut self, word: u64, more: usize, limit: Duration) -> Result<Option<Vec<u64>>> {
        let deadline = Instant::now() + limit;
        loop {
            let at = self
                .seen
                .windows(8)
                .position(|raw| raw == word.to_le_bytes());
            let words = at.and_then(|at| self.seen.get(at + 8..at + 8 + 8 * more));
            if let Some(raw) = words {
                return Ok(Some(ebb_payload::results(raw)));
            }
            let panic = marker::PANIC.to_le_bytes();
            if self.seen.windows(8).any(|raw| raw == panic) && self.seen.len() >= 24 {
                return Err(self.explain("the guest has panicked"));
            }
            match self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    let hung = format!("the guest says nothing for {} s", limit.as_secs());
                    return Err(self.explain(hung));
                }
            }
        }
    }

    /// Ends it as an operator does. Returns its exit code.
    pub fn stop(&mut self) -> Result<Option<i32>> {
        self.api().stop()?;
        let status = until_often("the monitor ends", PATIENCE, || {
            self.child.try_wait().context("wait")
        })?;
        Ok(status.code())
    }

    pub fn api(&self) -> Api {
        Api::new(&self.path("api"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Its descriptors and threads.
    pub fn observe(&self) -> Result<Observed> {
        let folder = |name: &str| format!("/proc/{}/{name}", self.child.id());
        let mut observed = Observed {
            descriptors: BTreeMap::new(),
            threads: BTreeMap::new(),
        };
        // Either may be gone before it is looked at.
        for entry in fs::read_dir(folder("fd")).context("descriptors")?.flatten() {
            if let Ok(target) = fs::read_link(entry.path()) {
                let target = target.to_string_lossy().into_owned();
                *observed.descriptors.entry(target).or_default() += 1;
            }
        }
        for entry in fs::read_dir(folder("task")).context("threads")?.flatten() {
            // The kernel's threads for io_uring come and go as it likes.
            if let Ok(name) = fs::read_to_string(entry.path().join("comm"))
                && !name.starts_with("iou-wrk-")
            {
                *observed.threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        Ok(observed)
    }

    /// Memory of the monitor and of its guest, in bytes.
    pub fn anonymous(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).context(&path)?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.context(path)? * 1024)
    }

    /// An error, with what the guest said and the monitor logged last.
    pub fn explain(&self, what: impl std::fmt::Display) -> Error {
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(12).collect();
        let words = ebb_payload::results(&self.seen[self.seen.len().saturating_sub(64)..]);
        Error::new(format!("{what}\nguest: {words:x?}\nebb: {tail:#?}"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
