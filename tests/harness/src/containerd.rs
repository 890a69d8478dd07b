//! Debian's containerd with Ebb's shim: pods in guests (docs/kubernetes.md).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::images::Images;
use crate::wait::{LONG, until};

/// The image that containers are made of: busybox.
pub const IMAGE: &str = "ebb.test/busybox:1";

/// The programs of the image.
const PROGRAMS: &[&str] = &["sh", "cat", "sleep", "dd", "grep", "true"];

/// A containerd with everything that it keeps in a folder of the test's.
#[derive(Debug)]
pub struct Containerd {
    folder: TempDir,
    /// Where the shim is found.
    path: String,
    child: Child,
}

fn succeeded(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("run")?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{command:?}: {said}")))
}

impl Containerd {
    /// Starts it, with [`IMAGE`].
    ///
    /// # Errors
    /// It cannot be started, or has no answer.
    pub fn start() -> Result<Self> {
        let images = Images::from_environment()?;
        let folder = TempDir::with_prefix("ebb-ctd-").context("make a temporary folder")?;
        write_settings(folder.path(), &images)?;
        let programs = images.ebb.parent().context("the monitor's folder")?;
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
        let log = fs::File::create(folder.path().join("log")).context("log")?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(folder.path().join("config.toml"))
            .env("PATH", &path)
            .env("EBB_PODS", folder.path().join("pods.toml"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn();
        let containerd = Self {
            child: child.context("containerd")?,
            folder,
            path,
        };
        until("containerd answers", LONG, || {
            Ok(containerd.done(&["version"]).ok())
        })?;
        let archive = make_image(containerd.folder.path())?;
        containerd.done(&["images", "import", &archive.display().to_string()])?;
        Ok(containerd)
    }

    /// `ctr` with these words.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.env("PATH", &self.path).arg("--address");
        command.arg(self.folder.path().join("sock")).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// Runs `ctr` and returns what it said.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub fn done(&self, words: &[&str]) -> Result<String> {
        succeeded(&mut self.command(words))
    }

    /// Runs `ctr`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, words: &[&str]) -> Result<Output> {
        self.command(words).output().context("ctr")
    }

    /// Starts a container in the background.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, options: &[&str], name: &str, program: &[&str]) -> Result<()> {
        let runtime = ["run", "--detach", "--runtime", "io.containerd.ebb.v2"];
        let words = [&runtime, options, &[IMAGE, name], program].concat();
        self.done(&words).map(drop)
    }

    /// The state that containerd gives a container's task; none: it has no task.
    ///
    /// # Errors
    /// `ctr` fails.
    pub fn state(&self, name: &str) -> Result<Option<String>> {
        let list = self.done(&["tasks", "list"])?;
        let words = list.lines().map(|line| line.split_whitespace());
        let found = words.map(Vec::from_iter).find(|words| words[0] == name);
        Ok(found.and_then(|words| words.last().map(|state| (*state).to_owned())))
    }

    /// Waits for a state.
    ///
    /// # Errors
    /// It does not come.
    pub fn await_state(&self, name: &str, state: &str) -> Result<()> {
        let what = format!("the task {name} is {state}");
        until(what, LONG, || {
            Ok((self.state(name)?.as_deref() == Some(state)).then_some(()))
        })
    }

    /// The processes whose command lines name files of its pods, or the shims of its socket.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn relatives(&self) -> Result<Vec<crate::host::Relative>> {
        let mut all = crate::host::relatives(self.folder.path())?;
        all.retain(|relative| relative.pid != self.child.id());
        Ok(all)
    }

    /// The folders of pods that are left.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn pods(&self) -> Result<usize> {
        let folder = self.folder.path().join("pods");
        Ok(fs::read_dir(&folder).context(folder.display())?.count())
    }

    /// Waits until no process and no file of a pod is left.
    ///
    /// # Errors
    /// What is left.
    pub fn vanished(&self) -> Result<()> {
        let what = || Ok::<_, Error>((self.relatives()?, self.pods()?));
        let done = until("nothing is left of the pods", LONG, || {
            let (relatives, pods) = what()?;
            Ok((relatives.is_empty() && pods == 0).then_some(()))
        });
        done.map_err(|error| match what() {
            Ok((relatives, pods)) => Error::new(format!("{error}: {relatives:?}, {pods} folders")),
            Err(other) => other,
        })
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // After a test that failed.
        for relative in self.relatives().unwrap_or_default() {
            if let Some(pid) = rustix::process::Pid::from_raw(relative.pid.cast_signed()) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_settings(folder: &Path, images: &Images) -> Result<()> {
    let at = |name: &str| folder.join(name).display().to_string();
    let config = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
        at("root"),
        at("state"),
        at("sock"),
        at("sock.ttrpc")
    );
    let pods = format!(
        "ebb = {:?}\nkernel = {:?}\ninitramfs = {:?}\nimages = {:?}\npods = {:?}\nmemory_mib = 256\n",
        images.ebb,
        images.vmlinux,
        images.pod_initramfs,
        at("images"),
        at("pods")
    );
    fs::write(folder.join("config.toml"), config).context("config.toml")?;
    fs::write(folder.join("pods.toml"), pods).context("pods.toml")
}

/// An image in docker's archive format, with a busybox as its only layer.
fn make_image(folder: &Path) -> Result<PathBuf> {
    let (root, parts) = (folder.join("busybox"), folder.join("image"));
    for path in [root.join("bin"), root.join("tmp"), parts.clone()] {
        fs::create_dir_all(&path).context(path.display())?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox")?;
    for name in PROGRAMS {
        symlink("busybox", root.join("bin").join(name)).context(name)?;
    }
    let (layer, archive) = (parts.join("layer.tar"), folder.join("image.tar"));
    let tar = |from: &Path, to: &Path, names: &[&str]| {
        let mut command = Command::new("tar");
        command.arg("-C").arg(from).arg("-cf").arg(to).args(names);
        succeeded(&mut command)
    };
    tar(&root, &layer, &["."])?;
    let sum = succeeded(Command::new("sha256sum").arg(&layer))?;
    let sum = sum.split(' ').next().context("sha256sum")?;
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{sum}")]},
    });
    let manifest = serde_json::json!([
        {"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}
    ]);
    for (name, content) in [("config.json", config), ("manifest.json", manifest)] {
        fs::write(parts.join(name), content.to_string()).context(name)?;
    }
    let names = ["config.json", "layer.tar", "manifest.json"];
    tar(&parts, &archive, &names).map(|_| archive)
}
