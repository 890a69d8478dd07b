//! Machines in an ordinary container: podman and crun, with /dev/kvm passed in and no privileges (docs/security.md).

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};

/// The user and group in it; no account has such a number.
pub const USER: u32 = 64_000;

/// A container that is about to start, and what podman keeps of it; removed at the end.
#[derive(Debug)]
pub struct Container {
    name: String,
    memory: u64,
    folder: TempDir,
    cgroup: Cgroup,
}

impl Container {
    /// One whose files are the program `ebb` and its libraries, limited to so many bytes of memory.
    ///
    /// # Errors
    /// There is no room, we are not root, or the host has no cgroups of version 2.
    pub fn new(ebb: &Path, memory: u64) -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-container-").context("make a temporary folder")?;
        let root = folder.path().join("root");
        crate::libraries::copy_with_libraries(ebb, Path::new("/ebb"), &root)?;
        let container = Self {
            name: format!("ebb-test-{}", std::process::id()),
            memory,
            cgroup: Cgroup::new("container")?,
            folder,
        };
        container.make_device()?;
        Ok(container)
    }

    /// /dev/kvm as udev makes it, for a group. The host's own stays as it is.
    fn make_device(&self) -> Result<()> {
        let number = fs::metadata("/dev/kvm").context("/dev/kvm")?.rdev();
        let path = self.device();
        let name = CString::new(path.as_os_str().as_bytes()).context(path.display())?;
        mknodat(CWD, &name, FileType::CharacterDevice, Mode::empty(), number)
            .map_err(std::io::Error::from)
            .context(path.display())?;
        chown(&path, None, Some(USER)).context(path.display())?;
        // The umask has taken something away.
        fs::set_permissions(&path, Permissions::from_mode(0o660)).context(path.display())
    }

    fn device(&self) -> PathBuf {
        self.folder.path().join("kvm")
    }

    /// podman, with everything that it keeps in a folder of the test's.
    fn podman(&self) -> Command {
        let mut command = Command::new("podman");
        for (option, name) in [
            ("--root", "store"),
            ("--runroot", "run"),
            ("--tmpdir", "tmp"),
        ] {
            command.arg(option).arg(self.folder.path().join(name));
        }
        // Without systemd, and on a file system that overlays may not lie on.
        command.args(["--cgroup-manager", "cgroupfs", "--storage-driver", "vfs"]);
        command.args(["--events-backend", "none", "--runtime", "crun"]);
        command
    }

    /// Starts the monitor in it: what follows are the words of `ebb`. It may write to `folder` and read `images`, which have
    /// there the paths that they have here.
    #[must_use]
    pub fn command(&self, folder: &Path, images: &[&Path]) -> Command {
        let mut command = self.podman();
        command.args([
            "run",
            "--rm",
            "--interactive",
            "--network",
            "none",
            "--read-only",
        ]);
        command.args(["--cap-drop", "all", "--security-opt", "no-new-privileges"]);
        command.args(["--user", &format!("{USER}:{USER}"), "--name", &self.name]);
        command.args(["--memory", &self.memory.to_string(), "--cgroup-parent"]);
        command.arg(self.cgroup.path().file_name().unwrap_or_default());
        command.arg("--pidfile").arg(self.pid_file());
        command
            .arg("--device")
            .arg(format!("{}:/dev/kvm", self.device().display()));
        command
            .arg("--volume")
            .arg(format!("{0}:{0}", folder.display()));
        for image in images {
            command
                .arg("--volume")
                .arg(format!("{0}:{0}:ro", image.display()));
        }
        command
            .arg("--rootfs")
            .arg(self.folder.path().join("root"))
            .arg("/ebb");
        command
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.path().join("pid")
    }

    /// The monitor's process, as the host numbers it.
    ///
    /// # Errors
    /// The container has not started.
    pub fn pid(&self) -> Result<u32> {
        let text = fs::read_to_string(self.pid_file()).context("the container's pid")?;
        text.trim().parse().context("the container's pid")
    }

    /// A file of the cgroup that podman has made for it.
    ///
    /// # Errors
    /// It has ended.
    pub fn cgroup_file(&self, name: &str) -> Result<String> {
        let path = format!("/proc/{}/cgroup", self.pid()?);
        let text = fs::read_to_string(&path).context(&path)?;
        let own = text.trim().strip_prefix("0::/").context(&text)?;
        let path = Path::new("/sys/fs/cgroup").join(own).join(name);
        fs::read_to_string(&path).context(path.display())
    }

    /// Has podman stop it, as an operator does.
    ///
    /// # Errors
    /// podman fails.
    pub fn stop(&self) -> Result<()> {
        self.must(&["stop", "--time", "60", &self.name]).map(drop)
    }

    /// Succeeds if nothing is left of it: no container, no process, no cgroup.
    ///
    /// # Errors
    /// What is left.
    pub fn vanished(&self) -> Result<()> {
        let containers = self.must(&["ps", "--all", "--quiet"])?;
        let mine = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("libpod-");
        let groups = fs::read_dir(self.cgroup.path()).context("the container's cgroups")?;
        let groups: Vec<_> = groups.flatten().map(|entry| entry.file_name()).collect();
        if containers.is_empty() && !groups.iter().any(|name| mine(name)) && !self.is_busy() {
            return Ok(());
        }
        Err(Error::new(format!(
            "containers: {containers:?}; {groups:?}"
        )))
    }

    fn is_busy(&self) -> bool {
        let events = self.cgroup.text("cgroup.events");
        events.is_ok_and(|events| events.contains("populated 1"))
    }

    fn must(&self, words: &[&str]) -> Result<String> {
        let output = self
            .podman()
            .args(words)
            .stdin(Stdio::null())
            .output()
            .context("podman")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(format!("podman {words:?}: {said}")))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // After a test that failed.
        if self.is_busy()
            && let Err(error) = self.must(&["rm", "--force", "--time", "0", &self.name])
        {
            eprintln!("{error}");
        }
        // podman leaves the cgroup of its helper. There is none if it has not come so far.
        let _ = fs::remove_dir(self.cgroup.path().join("conmon"));
    }
}
