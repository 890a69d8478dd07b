//! Machines that are locked in (`ebb jail`).

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use ebb_payload::Program;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::idle::signal_to;
use crate::wait::{LONG, until_often};
use crate::{Api, Images};

/// Users of jails begin here; no account has such a number.
const FIRST_USER: u32 = 64_100;

/// A machine's place: its name and user, and what it boots.
pub struct Jail {
    ebb: PathBuf,
    id: String,
    uid: u32,
    files: TempDir,
    options: Vec<OsString>,
}

/// A running `ebb jail`; killed when this is dropped.
pub struct Prisoner {
    child: Child,
    stderr: PathBuf,
}

impl Jail {
    /// One with a user of its own, for a guest that runs `program`.
    ///
    /// # Errors
    /// When the environment lacks the monitor, or there is no room.
    pub fn new(id: &str, program: &Program) -> Result<Self> {
        static USERS: AtomicU32 = AtomicU32::new(FIRST_USER);
        let ebb = Images::from_environment()?.ebb;
        let files = TempDir::with_prefix("ebb-jail-").context("make a temporary folder")?;
        program
            .write(&files.path().join("kernel"))
            .context("write the guest")?;
        let uid = USERS.fetch_add(1, Ordering::Relaxed);
        // Tests of several binaries may run at once.
        let id = format!("{id}-{}", std::process::id());
        let options = Vec::new();
        Ok(Self {
            ebb,
            id,
            uid,
            files,
            options,
        })
    }

    /// With these options of `ebb jail`, too.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(OsString::from));
        self
    }

    /// The number of its user and group.
    #[must_use]
    pub const fn user(&self) -> u32 {
        self.uid
    }

    /// A file of the test's, outside of the machine's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Makes a disk for its user.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.file(name);
        fs::write(&path, [0; 4096]).context(path.display())?;
        chown(&path, Some(self.uid), Some(self.uid)).context(path.display())?;
        Ok(path)
    }

    /// The machine's folder.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Path::new("/run/ebb/jail").join(&self.id)
    }

    /// The machine's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let is_version_2 = |it: &&Path| it.join("cgroup.controllers").exists();
        let mount = mounts.into_iter().find(is_version_2);
        mount.unwrap_or(mounts[0]).join("ebb").join(&self.id)
    }

    /// A client of its API.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::new(&self.folder().join("api"))
    }

    /// The words of `ebb jail`, with more for `ebb run`.
    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(&self.ebb);
        let uid = self.uid.to_string();
        command
            .args(["jail", "--uid", &uid, "--gid", &uid])
            .args(&self.options);
        command.args([
            "--",
            "--id",
            &self.id,
            "--serial",
            "null",
            "--memory",
            "size=64M,thp=off",
        ]);
        command.arg("--kernel").arg(self.file("kernel")).args(more);
        command
    }

    /// Runs a machine that must be refused, with more options for `ebb run`; what is said on standard error.
    ///
    /// # Errors
    /// When it is not refused in one line, with status 35.
    pub fn refused(&self, more: &[&str]) -> Result<String> {
        let Output { status, stderr, .. } = self.command(more).output().context("ebb jail")?;
        let said = String::from_utf8_lossy(&stderr).into_owned();
        if status.code() == Some(35) && said.lines().count() == 1 {
            return Ok(said);
        }
        Err(Error::new(format!("{status}: {said}")))
    }

    /// Starts the machine, with more options for `ebb run`, and waits until it runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(&self, more: &[&str]) -> Result<Prisoner> {
        let stderr = self.file("stderr");
        let mut command = self.command(more);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let file = File::create(&stderr).context("make stderr")?;
        let child = command.stderr(file).spawn().context("ebb jail")?;
        let mut prisoner = Prisoner { child, stderr };
        let api = self.api();
        until_often("the machine runs", LONG, || {
            if let Some(status) = prisoner.child.try_wait().context("wait")? {
                return Err(Error::new(format!(
                    "it has ended: {status}: {}",
                    prisoner.said()
                )));
            }
            let state = api.get("/").map(|info| info["state"] == "Running");
            Ok(state.is_ok_and(|running| running).then_some(()))
        })?;
        Ok(prisoner)
    }

    /// The processes in the jail by name, as the host numbers them.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<(u32, String)>> {
        let path = self.cgroup().join("cgroup.procs");
        let text = fs::read_to_string(&path).context(path.display())?;
        let named = |pid: u32| Some((pid, fs::read_to_string(format!("/proc/{pid}/comm")).ok()?));
        let numbers = text.lines().filter_map(|line| line.parse().ok());
        let named = numbers.filter_map(named);
        Ok(named
            .map(|(pid, name)| (pid, name.trim().to_owned()))
            .collect())
    }

    /// The monitor's process, as the host numbers it.
    ///
    /// # Errors
    /// When there is none.
    pub fn monitor(&self) -> Result<u32> {
        let processes = self.processes()?;
        let monitor = processes.iter().find(|(_, name)| name == "ebb");
        Ok(monitor.context(format_args!("{processes:?}"))?.0)
    }

    /// Process 1 of its namespace, as the host numbers it.
    ///
    /// # Errors
    /// When there is none.
    pub fn init(&self) -> Result<u32> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.monitor()?)).context("stat")?;
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        parent.context("no parent")?.parse().context("parent")
    }

    /// Waits until the host has nothing of the machine any more.
    ///
    /// # Errors
    /// What is left.
    pub fn vanished(&self) -> Result<()> {
        let places = [self.folder(), self.cgroup()];
        let done = until_often("everything is gone", LONG, || {
            Ok((!places.iter().any(|place| place.exists())).then_some(()))
        });
        let left = places.map(|place| place.exists());
        done.context(format_args!(
            "folder, cgroup: {left:?}, {:?}",
            self.processes()
        ))
    }
}

impl Prisoner {
    /// The process that was started.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        signal_to(self.pid(), signal);
    }

    /// What it has said on standard error.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until_often("the jail ends", LONG, || {
            self.child.try_wait().context("wait")
        })
    }
}

impl Drop for Prisoner {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
