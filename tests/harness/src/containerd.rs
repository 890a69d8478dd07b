//! Debian's containerd with Ebb's shim: pods in guests (docs/kubernetes.md).

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::api::Api;
use crate::error::{Context, Error, Result};
use crate::host::succeeded;
use crate::images::Images;
use crate::thin_pool::ThinPool;
use crate::wait::{LONG, until};

/// The image that containers are made of: busybox.
pub const IMAGE: &str = "ebb.test/busybox:1";

/// The host's address in the network of its pods.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 9, 1);

/// The programs of the image.
const PROGRAMS: &[&str] = &[
    "sh", "cat", "sleep", "dd", "grep", "true", "httpd", "wget", "ip", "readlink", "tail", "tr",
    "mkfifo", "id", "hostname",
];

/// The list of its users: one, who is not root.
const USERS: &str = "web:x:33:33::/home/web:/bin/sh\n";

/// A containerd with everything that it keeps in a folder of the test's.
#[derive(Debug)]
pub struct Containerd {
    folder: TempDir,
    /// Where the shim is found.
    path: String,
    namespace: &'static str,
    child: Child,
}

impl Containerd {
    /// Starts it, with [`IMAGE`].
    ///
    /// # Errors
    /// It cannot be started, or has no answer.
    pub fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-ctd-").context("make a temporary folder")?;
        let without = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        write_config(folder.path(), without, "")?;
        Self::start_in(folder, "default", None, Command::new("containerd"))
    }

    /// Starts it with the CRI, for pods whose runtime handler is `ebb`. They have addresses in a network of [`GATEWAY`]'s.
    ///
    /// # Errors
    /// It cannot be started, or has no answer.
    pub fn start_with_pods() -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-ctd-").context("make a temporary folder")?;
        write_config(folder.path(), "", &cri_config(folder.path())?)?;
        // libcni keeps its results in /var/lib/cni, wherever everything else is.
        let mut command = Command::new("unshare");
        let script = "mount -t tmpfs tmpfs /var/lib && exec containerd \"$@\"";
        command.args(["--mount", "sh", "-ec", script, "sh"]);
        Self::start_in(folder, "k8s.io", None, command)
    }

    /// Starts it with the snapshotter `devmapper`, whose snapshots are devices of this pool.
    ///
    /// # Errors
    /// It cannot be started, or has no answer.
    pub fn start_with_blocks(pool: &ThinPool) -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-ctd-").context("make a temporary folder")?;
        let without = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        let root = folder.path().join("devmapper");
        let last = format!(
            "[plugins.\"io.containerd.snapshotter.v1.devmapper\"]\nroot_path = {root:?}\npool_name = {:?}\nbase_image_size = \"32MB\"\n",
            pool.name()
        );
        write_config(folder.path(), without, &last)?;
        let mut command = Command::new("containerd");
        // There is no udev that would make the devices' nodes: the program dmsetup does.
        command.env("DM_DISABLE_UDEV", "1");
        Self::start_in(folder, "default", Some("devmapper"), command)
    }

    fn start_in(
        folder: TempDir,
        namespace: &'static str,
        snapshotter: Option<&str>,
        mut containerd: Command,
    ) -> Result<Self> {
        let images = Images::from_environment()?;
        write_settings(folder.path(), &images)?;
        let programs = images.ebb.parent().context("the monitor's folder")?;
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
        let log = fs::File::create(folder.path().join("log")).context("log")?;
        let child = containerd
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
            namespace,
        };
        until("containerd answers", LONG, || {
            Ok(containerd.done(&["version"]).ok())
        })?;
        let archive = make_image(containerd.folder.path())?;
        let archive = archive.display().to_string();
        let option = snapshotter.map(|name| ["--snapshotter", name]);
        let option = option.as_ref().map_or(&[][..], |words| words);
        containerd.done(&[&["images", "import"], option, &[archive.as_str()]].concat())?;
        Ok(containerd)
    }

    /// Has the machines of pods that are made from now on started by this program.
    ///
    /// # Errors
    /// The settings cannot be read or written.
    pub fn set_monitor(&self, program: &Path) -> Result<()> {
        let path = self.folder.path().join("pods.toml");
        let text = fs::read_to_string(&path).context(path.display())?;
        let others = text.lines().filter(|line| !line.starts_with("ebb = "));
        let own = format!("ebb = {program:?}");
        let lines: Vec<&str> = others.chain([own.as_str()]).collect();
        fs::write(&path, lines.join("\n")).context(path.display())
    }

    /// `ctr` with these words.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.env("PATH", &self.path).arg("--address");
        command.arg(self.socket());
        command.args(["--namespace", self.namespace]).args(words);
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

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    /// What containerd runs in the folder of a container's bundle to have its shim started.
    #[must_use]
    pub fn start_shim(&self, bundle: &Path, id: &str) -> Command {
        let mut command = Command::new("containerd-shim-ebb-v2");
        let (own, events) = (self.socket(), self.folder.path().join("sock.ttrpc"));
        command.env("PATH", &self.path).env("TTRPC_ADDRESS", events);
        command.env("EBB_PODS", self.folder.path().join("pods.toml"));
        command.args(["-namespace", self.namespace, "-id", id, "-address"]);
        command.arg(own).arg("start").current_dir(bundle);
        command
    }

    /// The only pod's machine.
    ///
    /// # Errors
    /// There is not one.
    pub fn machine(&self) -> Result<Api> {
        let folder = self.folder.path().join("pods");
        let mut pods = fs::read_dir(&folder).context(folder.display())?;
        let pod = pods.next().context("no pod")?.context(folder.display())?;
        Ok(Api::new(&pod.path().join("api")))
    }

    /// The interfaces of the networks of all pods, and their queues of tc, as `ip` and `tc` say.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn interfaces(&self) -> Result<String> {
        let script = "for net in /run/netns/cni-*; do for words in 'ip -brief link' 'tc qdisc show'; do nsenter --net=$net $words; done; done";
        let pid = self.child.id().to_string();
        let mut command = Command::new("nsenter");
        // Their names are in containerd's own mount namespace.
        succeeded(command.args(["--target", &pid, "--mount", "sh", "-ec", script]))
    }

    /// How many addresses pods have.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn addresses(&self) -> Result<usize> {
        let folder = self.folder.path().join("addresses/pods");
        let entries = fs::read_dir(&folder).context(folder.display())?;
        let names = entries.flatten().map(|entry| entry.file_name());
        Ok(names
            .filter(|name| name.to_string_lossy().starts_with("10."))
            .count())
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

/// Writes containerd's configuration: `first` stands before the first table, `last` behind the others.
fn write_config(folder: &Path, first: &str, last: &str) -> Result<()> {
    let at = |name: &str| folder.join(name).display().to_string();
    let config = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n{first}[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n{last}",
        at("root"),
        at("state"),
        at("sock"),
        at("sock.ttrpc")
    );
    fs::write(folder.join("config.toml"), config).context("config.toml")
}

/// The tables of the CRI, with Debian's network plugins. The image's own program waits, as that of a pod's first container must.
fn cri_config(folder: &Path) -> Result<String> {
    let plugins = folder.join("cni");
    fs::create_dir_all(&plugins).context(plugins.display())?;
    let network = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "ebb-pods",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": folder.join("addresses"),
                "ranges": [[{"subnet": "10.88.9.0/24", "gateway": GATEWAY}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    });
    let file = plugins.join("pods.conflist");
    fs::write(&file, network.to_string()).context(file.display())?;
    Ok(format!(
        "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {IMAGE:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {plugins:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"ebb\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.ebb]\nruntime_type = \"io.containerd.ebb.v2\"\n"
    ))
}

fn write_settings(folder: &Path, images: &Images) -> Result<()> {
    let at = |name: &str| folder.join(name).display().to_string();
    let pods = format!(
        "ebb = {:?}\nkernel = {:?}\ninitramfs = {:?}\nimages = {:?}\npods = {:?}\nmemory_mib = 256\n",
        images.ebb,
        images.vmlinux,
        images.pod_initramfs,
        at("images"),
        at("pods")
    );
    fs::write(folder.join("pods.toml"), pods).context("pods.toml")
}

/// An image in docker's archive format, with a busybox as its only layer.
fn make_image(folder: &Path) -> Result<PathBuf> {
    let (root, parts) = (folder.join("busybox"), folder.join("image"));
    for path in [
        root.join("bin"),
        root.join("tmp"),
        root.join("etc"),
        root.join("var"),
        parts.clone(),
    ] {
        fs::create_dir_all(&path).context(path.display())?;
    }
    fs::write(root.join("etc/passwd"), USERS).context("passwd")?;
    // As in Debian's images.
    symlink("/run", root.join("var/run")).context("var/run")?;
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
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000000"]},
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
