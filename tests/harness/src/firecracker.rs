//! `ebb firecracker`, and what clients of Firecracker do with it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::console::Console;
use crate::error::{Context, Result};
use crate::guest::Guest;
use crate::images::Images;
use crate::wait::{LONG, until, until_often};

/// A process by the name of Firecracker, which is killed when this is dropped.
pub struct Firecracker {
    /// The process.
    pub child: Child,
    /// The guest's serial console.
    pub console: Console,
    input: Option<ChildStdin>,
    images: Images,
    folder: TempDir,
}

impl Firecracker {
    /// Starts it with the flags that `flags` makes of its folder. Its standard error is a pipe.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(flags: impl Fn(&Path) -> Vec<String>) -> Result<Self> {
        let images = Images::from_environment()?;
        let folder = TempDir::with_prefix("ebb-").context("make a temporary folder")?;
        let mut command = Command::new(&images.ebb);
        command
            .arg0("/usr/bin/firecracker")
            .args(flags(folder.path()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context(images.ebb.display())?;
        let console = match child.stdout.take() {
            Some(output) => Console::read(output),
            None => Console::read(std::io::empty()),
        };
        let input = child.stdin.take();
        Ok(Self {
            child,
            console,
            input,
            images,
            folder,
        })
    }

    /// Starts it with the socket that [`Firecracker::api`] asks, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve() -> Result<Self> {
        let flags = |folder: &Path| {
            let socket = folder.join("api").to_string_lossy().into_owned();
            ["--api-sock", &socket, "--id", "vm-1"]
                .map(str::to_owned)
                .to_vec()
        };
        let process = Self::start(flags)?;
        process.answers()?;
        Ok(process)
    }

    /// Waits until the API answers.
    ///
    /// # Errors
    /// It does not.
    pub fn answers(&self) -> Result<()> {
        until_often("the API answers", LONG, || Ok(self.api().get("/").ok())).map(drop)
    }

    /// What there is to boot.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// A file of its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A client of its API.
    pub fn api(&self) -> Api {
        Api::new(&self.path("api"))
    }

    /// PUT.
    ///
    /// # Errors
    /// It is refused.
    pub fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.api().must("PUT", path, body).map(drop)
    }

    /// The test's kernel and initramfs.
    pub fn boot_source(images: &Images, more: &str) -> Value {
        json!({
            "kernel_image_path": images.vmlinuz,
            "initrd_path": images.initramfs,
            "boot_args": format!("console=ttyS0 quiet loglevel=3 reboot=k panic=1 pci=off ebb.mode=run {more}"),
        })
    }

    /// Asks for the start.
    ///
    /// # Errors
    /// It is refused.
    pub fn start_instance(&self) -> Result<()> {
        self.put("/actions", &json!({ "action_type": "InstanceStart" }))
    }

    /// The workload in the guest.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn guest(&mut self) -> Result<Guest> {
        let input = self.input.take();
        Guest::attach(input.context("the console is taken")?, self.console.clone())
    }

    /// The console of a guest that was restored.
    ///
    /// # Errors
    /// When somebody has it already.
    pub fn restored_guest(&mut self) -> Result<Guest> {
        let input = self.input.take();
        Ok(Guest::restored(
            input.context("the console is taken")?,
            self.console.clone(),
        ))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until("firecracker ends", LONG, || {
            self.child.try_wait().context("wait")
        })
    }
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
