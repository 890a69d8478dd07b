//! Puts together the command line of a monitor and starts it.

use std::fs::File;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::container::{Container, USER};
use crate::error::{Context, Result};
use crate::images::Images;
use crate::monitor::Monitor;
use crate::terminal::Terminal;

/// A monitor that is about to start.
#[derive(Debug)]
pub struct Launch {
    images: Images,
    /// The monitor's program, with the words before the options of `ebb run`.
    command: Command,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    mode: String,
    cmdline: String,
    memory: String,
    cpus: u32,
    serial: String,
    more: Vec<String>,
    folder: TempDir,
}

impl Launch {
    /// 1 vCPU, 256 MiB, the distribution's kernel, and the workload on the console.
    ///
    /// # Errors
    /// When the environment lacks something, or there is no room for temporary files.
    pub fn new() -> Result<Self> {
        let images = Images::from_environment()?;
        let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
        let mut command = Command::new(&images.ebb);
        command.arg("run");
        Ok(Self {
            command,
            kernel: images.vmlinuz.clone(),
            initramfs: Some(images.initramfs.clone()),
            images,
            mode: "run".to_owned(),
            cmdline: String::new(),
            memory: "size=256M".to_owned(),
            cpus: 1,
            serial: "tty".to_owned(),
            more: Vec::new(),
            folder,
        })
    }

    /// What there is to boot.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// A folder that lives as long as the monitor.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts the monitor as a member of a cgroup.
    #[must_use]
    pub fn within(mut self, cgroup: &Cgroup) -> Self {
        self.command = cgroup.command(&self.images.ebb);
        self.command.arg("run");
        self
    }

    /// Locks the monitor in, as the user and group `user`, by the name `stock`.
    ///
    /// # Errors
    /// When its folder or images cannot be given to it.
    pub fn jailed(mut self, user: u32, options: &[&str]) -> Result<Self> {
        let folder = self.folder.path();
        chown(folder, Some(user), Some(user)).context(folder.display())?;
        let number = user.to_string();
        self.command = Command::new(&self.images.ebb);
        self.command
            .args(["jail", "--uid", &number, "--gid", &number, "--folder"]);
        self.command.arg(folder).args(options);
        self.command.args(["--", "--id", "stock"]);
        // A jail follows no links.
        self.follow_links()?;
        Ok(self)
    }

    /// Puts the monitor into a container.
    ///
    /// # Errors
    /// When its folder or images cannot be given to it.
    pub fn contained(mut self, container: &Container) -> Result<Self> {
        let folder = self.folder.path();
        chown(folder, Some(USER), Some(USER)).context(folder.display())?;
        self.follow_links()?;
        let initramfs = self.initramfs.as_deref();
        let images: Vec<&Path> = initramfs.into_iter().chain([&*self.kernel]).collect();
        self.command = container.command(self.folder.path(), &images);
        self.command.arg("run");
        Ok(self)
    }

    /// Names the images by paths without symbolic links.
    fn follow_links(&mut self) -> Result<()> {
        for image in [Some(&mut self.kernel), self.initramfs.as_mut()]
            .into_iter()
            .flatten()
        {
            *image = image.canonicalize().context(image.display())?;
        }
        Ok(())
    }

    /// Another kernel.
    #[must_use]
    pub fn kernel(mut self, path: &Path) -> Self {
        self.kernel = path.to_owned();
        self
    }

    /// Another initramfs.
    #[must_use]
    pub fn initramfs(mut self, path: &Path) -> Self {
        self.initramfs = Some(path.to_owned());
        self
    }

    /// `ebb.mode=`, see resources/guest-init.sh; or what else is to be said to the kernel.
    #[must_use]
    pub fn mode(mut self, mode: &str) -> Self {
        mode.clone_into(&mut self.mode);
        self
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// The Debian with systemd, from its disk and with its own initramfs: see `tests/xtask/src/setup/system_disk.rs`.
    #[must_use]
    pub fn system(self) -> Self {
        let (disk, initramfs) = (&self.images.system_disk, &self.images.system_initramfs);
        let (disk, initramfs) = (disk.clone(), initramfs.clone());
        let this = self.initramfs(&initramfs).disk(&disk, true);
        this.cmdline("root=/dev/vda ro").memory("size=768M")
    }

    /// The same, without its service: it goes on until it is asked to shut down, and says how far it is. It has no getty on
    /// the console, which would discard what has not been written there when it starts (agetty(8) flushes the terminal).
    #[must_use]
    pub fn system_without_service(self) -> Self {
        self.system().cmdline(
            "systemd.mask=system.service systemd.mask=serial-getty@ttyS0.service systemd.show_status=yes",
        )
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(mut self, options: &str) -> Self {
        options.clone_into(&mut self.memory);
        self
    }

    /// `--cpus boot=`.
    #[must_use]
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// `--serial`.
    #[must_use]
    pub fn serial(mut self, options: &str) -> Self {
        options.clone_into(&mut self.serial);
        self
    }

    /// Another option and its value.
    #[must_use]
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.more.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// `--disk`.
    #[must_use]
    pub fn disk(self, path: &Path, readonly: bool) -> Self {
        let toggle = if readonly { "on" } else { "off" };
        self.option(
            "--disk",
            &format!("path={},readonly={toggle}", path.display()),
        )
    }

    /// Starts the monitor with its console on pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(self) -> Result<Monitor> {
        self.start_with(Stdio::piped(), Stdio::piped())
    }

    /// Starts the monitor with its console in a terminal.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_in(self, terminal: &Terminal) -> Result<Monitor> {
        self.start_with(terminal.near()?, terminal.near()?)
    }

    fn start_with(self, stdin: Stdio, stdout: Stdio) -> Result<Monitor> {
        let socket = self.folder.path().join("api");
        let log = self.folder.path().join("log");
        let stderr = self.folder.path().join("stderr");
        let words = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 ebb.mode={}",
            self.mode
        );
        let mut command = self.command;
        command.arg("--kernel").arg(&self.kernel);
        if let Some(initramfs) = &self.initramfs {
            command.arg("--initramfs").arg(initramfs);
        }
        command
            .args(["--cmdline", &format!("{words}{}", self.cmdline)])
            .args([
                "--memory",
                &self.memory,
                "--cpus",
                &format!("boot={}", self.cpus),
            ])
            .args(["--serial", &self.serial, "-v", "--log-file"])
            .arg(&log)
            .arg("--api-socket")
            .arg(&socket)
            .args(&self.more)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(File::create(&stderr).context(stderr.display())?);
        // By hand, for tests of any kind.
        let is_given = self.more.iter().any(|word| word == "--transport");
        if let Some(transport) = std::env::var_os("EBB_TRANSPORT").filter(|_| !is_given) {
            command.arg("--transport").arg(transport);
        }
        let child = command.spawn().context(self.images.ebb.display())?;
        Ok(Monitor::new(child, self.images, self.folder))
    }
}
