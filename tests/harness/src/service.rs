//! A running systemd with the unit `ebb@.service`: process 1 of namespaces of its own, in a Debian of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};
use crate::images::Images;
use crate::wait::{LONG, until};

/// The unit of the machine that is configured.
pub const UNIT: &str = "ebb@web";
/// Where its guest's console is.
const CONSOLE: &str = "/var/log/ebb/web.console";

/// The systemd, killed with all its processes when this is dropped.
pub struct Service {
    /// unshare(1), whose child systemd is.
    child: Child,
    init: u32,
    folder: TempDir,
    cgroup: Cgroup,
}

impl Service {
    /// Boots it, and waits until it has started what it starts by itself.
    ///
    /// # Errors
    /// It does not come up, with what it said.
    pub fn boot() -> Result<Self> {
        let images = Images::from_environment()?;
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = TempDir::with_prefix("ebb-systemd-").context("make a temporary folder")?;
        let cgroup = Cgroup::new("systemd")?;
        let mut command = cgroup.command(Path::new("unshare"));
        command
            .args(["--pid", "--fork", "--kill-child", "--mount", "--uts"])
            .args(["--ipc", "--cgroup", "sh"])
            .arg(sources.join("programs/systemd.sh"))
            .arg(&images.system_disk)
            .arg(folder.path())
            .arg(sources.join("../../resources/package"))
            .args([&images.ebb, &images.vmlinuz, &images.initramfs]);
        let log = File::create(folder.path().join("log")).context("create a log")?;
        let error_log = log.try_clone().context("create a log")?;
        let streams = (Stdio::from(log), Stdio::from(error_log));
        let child = command
            .stdin(Stdio::null())
            .stdout(streams.0)
            .stderr(streams.1);
        let mut service = Self {
            child: child.spawn().context("unshare")?,
            init: 0,
            folder,
            cgroup,
        };
        let up = until("systemd is up", LONG, || {
            service.init = service.child_of_unshare()?;
            let state = service.systemctl(&["is-system-running"]);
            // The Debian has a unit that wants an arena.
            Ok(state
                .is_ok_and(|it| ["running", "degraded"].contains(&it.trim()))
                .then_some(()))
        });
        let said = fs::read_to_string(service.folder.path().join("log")).unwrap_or_default();
        up.map_err(|error| Error::new(format!("{error}\n{said}")))?;
        Ok(service)
    }

    /// The process that becomes systemd; 0 if there is none yet.
    fn child_of_unshare(&self) -> Result<u32> {
        let pid = self.child.id();
        let children = format!("/proc/{pid}/task/{pid}/children");
        let children = fs::read_to_string(&children).context(children)?;
        let first = children.split_whitespace().next();
        Ok(first.and_then(|it| it.parse().ok()).unwrap_or(0))
    }

    /// Runs a program where systemd is; what it wrote, whatever its status.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &self.init.to_string(), "--"]);
        let output = command.args(words).stdin(Stdio::null()).output();
        let output = output.context(format_args!("{words:?}"))?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    /// systemctl(1).
    ///
    /// # Errors
    /// It cannot be started.
    pub fn systemctl(&self, words: &[&str]) -> Result<String> {
        self.run(&[&["systemctl"], words].concat())
    }

    /// A property of the unit.
    ///
    /// # Errors
    /// systemd does not say.
    pub fn property(&self, name: &str) -> Result<String> {
        let value = self.systemctl(&["show", "--value", "--property", name, UNIT])?;
        Ok(value.trim().to_owned())
    }

    /// A file of the Debian.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// What the unit's guest has said.
    #[must_use]
    pub fn console(&self) -> String {
        let file = self.path(CONSOLE);
        let said = fs::read(file).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }

    /// Forgets what the guests have said so far: the next one has a new file.
    ///
    /// # Errors
    /// They have said nothing.
    pub fn forget_console(&self) -> Result<()> {
        fs::remove_file(self.path(CONSOLE)).context("the console")
    }

    /// Waits until the guest's program is ready.
    ///
    /// # Errors
    /// It is not; with the journal.
    pub fn guest_is_ready(&self) -> Result<()> {
        let ready = until("the guest is ready", LONG, || {
            Ok(self.console().contains("EBB-GUEST-OK ready").then_some(()))
        });
        ready.map_err(|error| self.explain(&error))
    }

    /// Waits until a property has a value that pleases.
    ///
    /// # Errors
    /// It has not; with the journal.
    pub fn await_property(&self, name: &str, pleases: impl Fn(&str) -> bool) -> Result<String> {
        let found = until(format_args!("{name} of the unit"), LONG, || {
            let value = self.property(name)?;
            Ok(pleases(&value).then_some(value))
        });
        found.map_err(|error| self.explain(&error))
    }

    fn explain(&self, error: &Error) -> Error {
        let journal = self.run(&["journalctl", "--no-pager", "--unit", UNIT]);
        Error::new(format!("{error}\n{}", journal.unwrap_or_default()))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // unshare kills systemd when it dies, and the kernel all others of the namespace.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let empty = until("no process is left", LONG, || {
            let events = self.cgroup.text("cgroup.events")?;
            Ok(events.contains("populated 0").then_some(()))
        });
        if let Err(error) = empty {
            eprintln!("{error}");
        }
        remove_below(self.cgroup.path());
    }
}

/// Removes the empty cgroups that systemd has made, the lowest first.
fn remove_below(folder: &Path) {
    let groups = fs::read_dir(folder).into_iter().flatten().flatten();
    for group in groups.filter(|it| it.file_type().is_ok_and(|it| it.is_dir())) {
        remove_below(&group.path());
        let _ = fs::remove_dir(group.path());
    }
}
