//! The pod's machine: `ebb run` as a child, and what is asked of it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ebb_pod::answers::locked;
use ebb_pod::carry_bytes;
use ebb_pod::error::{Context, Result};
use ebb_pod::network::Network;
use ebb_vmm::api::request;
use ebb_vmm::devices::serial::SerialFile;
use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use crate::settings::Settings;
use crate::{cgroup, network};

/// The disks of a machine, which start empty: each takes the root file system of a container. What guests may write is fixed when
/// the machine starts. With the four interfaces of a pod and all else it has 19 devices: as many fit on either transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disks {
    read_only: usize,
    writable: usize,
}

impl Disks {
    /// Those of a pod whose snapshots are layers, or blocks.
    pub fn of_blocks(blocks: bool) -> Self {
        let (read_only, writable) = if blocks { (4, 8) } else { (8, 0) };
        Self {
            read_only,
            writable,
        }
    }

    /// The numbers of those that the guest may write to, or may not.
    pub fn numbers(self, writable: bool) -> Range<usize> {
        let all = self.read_only + self.writable;
        if writable {
            self.read_only..all
        } else {
            0..self.read_only
        }
    }

    /// The content of a disk without one. A file that may be written has one disk only.
    fn empty(self, folder: &Path, number: usize) -> PathBuf {
        if self.numbers(true).contains(&number) {
            folder.join(format!("empty{number}"))
        } else {
            folder.join("empty")
        }
    }

    /// The options of these disks, whose content is in the folder.
    fn options(self, folder: &Path) -> Result<Vec<String>> {
        let all = 0..self.numbers(true).end;
        let option = |number| {
            let empty = self.empty(folder, number);
            File::create(&empty).context(empty.display())?;
            let path = empty.display();
            let readonly = if self.numbers(true).contains(&number) {
                "off"
            } else {
                "on"
            };
            Ok(format!(
                "path={path},readonly={readonly},id={}",
                disk_id(number)
            ))
        };
        all.map(option).collect()
    }
}

/// How long the monitor may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take for an answer when containerd has no patience.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);

const MIB: u64 = 1 << 20;

/// Bytes of the guest's console in a file. There are two: the other one has what came before.
const CONSOLE: u64 = MIB;
/// The environment variable that names the folder of caches: the monitor keeps the unpacked kernel there.
const CACHE: &str = "XDG_CACHE_HOME";

/// The folder of caches, if the environment says this of it: a service's has neither that nor a home.
fn cache(told: Option<OsString>) -> OsString {
    told.unwrap_or_else(|| "/var/cache".into())
}

/// A running machine.
pub struct Machine {
    /// The monitor's process.
    pub pid: u32,
    folder: PathBuf,
    memory_mib: u64,
    disks: Disks,
    end: Arc<End>,
}

/// Whether the monitor has ended.
#[derive(Default)]
struct End {
    ended: Mutex<bool>,
    changed: Condvar,
}

/// The folder of a pod's sockets.
fn folder(settings: &Settings, namespace: &str, id: &str) -> PathBuf {
    // A socket's path has 107 bytes at most: an id may have 76.
    let digest = blake3::hash(format!("{namespace}/{id}").as_bytes());
    let name: String = digest.to_hex().chars().take(32).collect();
    settings.pods.join(name)
}

/// What a pod wants of its machine.
pub struct Wanted {
    /// The pod's memory limit in bytes, if it has one.
    pub limit: Option<u64>,
    /// Its network namespace, if it has one.
    pub network: Option<PathBuf>,
    /// The cgroup that the machine is to be in, if it has one.
    pub cgroup: Option<PathBuf>,
    /// Its disks.
    pub disks: Disks,
}

/// Where it is noted what has to be undone in the pod's network namespace.
fn record(folder: &Path) -> PathBuf {
    folder.join("network")
}

/// A link to the machine's cgroup.
fn cgroup_link(folder: &Path) -> PathBuf {
    folder.join("cgroup")
}

impl Machine {
    /// Starts it. What its interfaces are to have comes beside it.
    pub fn start(
        settings: &Settings,
        namespace: &str,
        id: &str,
        wanted: &Wanted,
    ) -> Result<(Self, Network)> {
        let folder = folder(settings, namespace, id);
        fs::create_dir_all(&folder).context(folder.display())?;
        Self::start_in(settings, &folder, wanted).inspect_err(|_| remove(&folder))
    }

    fn start_in(settings: &Settings, folder: &Path, wanted: &Wanted) -> Result<(Self, Network)> {
        let memory_mib = wanted.limit.map_or(settings.memory_mib, |bytes| {
            // A guest's memory is whole blocks of 2 MiB.
            (bytes.div_ceil(MIB) + settings.overhead_mib).next_multiple_of(2)
        });
        let (cards, network) = match &wanted.network {
            Some(namespace) => network::join(namespace, &record(folder))?,
            None => (Vec::new(), Network::default()),
        };
        let console = folder.join("console");
        let console = SerialFile::with_limit(&console, CONSOLE).context(console.display())?;
        let mut command = command(settings, folder, memory_mib, wanted.disks)?;
        for card in &cards {
            let tap = card.tap.as_raw_fd();
            fcntl_setfd(&card.tap, FdFlags::empty()).context("pass the tap on")?;
            let card = format!("fd={tap},mac={},mtu={}", card.mac, card.mtu);
            command.args(["--net", &card]);
        }
        // The taps live as long as the machine: it has the last copies of their descriptors.
        let mut spawn = || command.spawn().context(settings.ebb.display());
        let mut child = match &wanted.cgroup {
            Some(cgroup) => {
                let link = cgroup_link(folder);
                symlink(cgroup, &link).context(link.display())?;
                cgroup::within(cgroup, spawn)?
            }
            None => spawn()?,
        };
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || keep(output, console));
        }
        let end = Arc::new(End::default());
        let machine = Self {
            pid: child.id(),
            folder: folder.to_owned(),
            memory_mib,
            disks: wanted.disks,
            end: Arc::clone(&end),
        };
        std::thread::spawn(move || end.when(child));
        Ok((machine, network))
    }

    /// The socket by which the guest's ports are reached.
    pub fn vsock(&self) -> PathBuf {
        self.folder.join("vsock")
    }

    /// True once the monitor has ended.
    pub fn has_ended(&self) -> bool {
        *locked(&self.end.ended)
    }

    /// Waits for the monitor's end, and returns true if it came in time.
    pub fn ends_within(&self, limit: Duration) -> bool {
        self.end.came_within(limit)
    }

    /// The end of the monitor's log: why it may have ended.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("; ")
    }

    /// Gives a disk of the machine this file as its content; none: it becomes empty.
    pub fn set_disk(&self, number: usize, file: Option<&Path>) -> Result<()> {
        let empty = self.disks.empty(&self.folder, number);
        let file = file.unwrap_or(&empty);
        let body = json!({"drive_id": disk_id(number), "path_on_host": file});
        self.ask(
            Method::PATCH,
            &format!("/drives/{}", disk_id(number)),
            &body,
        )
    }

    /// Limits what the guest uses to these bytes and the overhead, by its balloon; none: to all that it has.
    pub fn limit(&self, settings: &Settings, bytes: Option<u64>) -> Result<()> {
        let wanted = bytes.map_or(self.memory_mib, |it| {
            it.div_ceil(MIB) + settings.overhead_mib
        });
        let amount = self.memory_mib.saturating_sub(wanted);
        self.ask(Method::PATCH, "/balloon", &json!({"amount_mib": amount}))
    }

    /// Bytes of the host's memory that are free in the guest, and that the host can have when it needs them. `None`: the monitor does
    /// not say.
    pub fn free_bytes(&self) -> Option<u64> {
        let socket = self.folder.join("api");
        let state = request(&socket, Method::GET, "/lazy-memory", None, SHORT_PATIENCE).ok()?;
        let bytes = |at: &str| state.pointer(at)?.as_u64();
        Some(bytes("/lazy_resident_bytes")? + bytes("/free_pages/resident_bytes")?)
    }

    fn ask(&self, method: Method, path: &str, body: &Value) -> Result<()> {
        let done = request(&self.folder.join("api"), method, path, Some(body), PATIENCE);
        done.map(drop).context(format_args!("{path} {body}"))
    }

    /// Ends it, and waits until its memory is free and its cgroup removed, for the latter a minute at most.
    pub fn stop(&self) {
        let stop = json!({"action_type": "InstanceStop"});
        let asked = self.ask(Method::PUT, "/actions", &stop);
        if (asked.is_err() || !self.end.came_within(PATIENCE)) && !self.has_ended() {
            let pid = Pid::from_raw(self.pid.cast_signed());
            if let Err(error) = kill(pid, Signal::SIGKILL) {
                eprintln!("kill the machine: {error}");
            }
            self.end.came_within(PATIENCE);
        }
        remove(&self.folder);
    }
}

/// Keeps the end of the guest's console: pods are many, and their folders may be in memory.
fn keep(mut output: ChildStdout, mut console: SerialFile) {
    carry_bytes(&mut output, &mut console);
}

impl End {
    fn when(&self, mut child: Child) {
        if let Err(error) = child.wait() {
            eprintln!("wait for the machine: {error}");
        }
        *locked(&self.ended) = true;
        self.changed.notify_all();
    }

    /// Waits for it, and returns true if it came in time.
    fn came_within(&self, limit: Duration) -> bool {
        let ended = locked(&self.ended);
        let waited = self.changed.wait_timeout_while(ended, limit, |it| !*it);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Removes a pod's folder and what is beside it. All may be gone.
fn remove(folder: &Path) {
    network::leave(&record(folder));
    let cgroup = fs::read_link(cgroup_link(folder));
    let _ = fs::remove_dir_all(folder);
    // Last: containerd gives a clean-up 5 s, and kills it then.
    if let Ok(cgroup) = cgroup {
        cgroup::remove(&cgroup);
    }
}

fn disk_id(number: usize) -> String {
    format!("root{number}")
}

fn command(settings: &Settings, folder: &Path, memory_mib: u64, disks: Disks) -> Result<Command> {
    let log = folder.join("log");
    let log = File::create(&log).context(log.display())?;
    let at = |name: &str| folder.join(name).display().to_string();
    let mut command = Command::new(&settings.ebb);
    command.arg("run").arg("--kernel").arg(&settings.kernel);
    command.arg("--initramfs").arg(&settings.initramfs);
    command.args(["--memory", &format!("size={memory_mib}M")]);
    command.args(["--cpus", &format!("boot={}", settings.cpus)]);
    command.args(["--balloon", "deflate_on_oom=on,reporting=lazy"]);
    command.args([
        "--api-socket",
        &at("api"),
        "--vsock",
        &format!("cid=3,path={}", at("vsock")),
    ]);
    command.args(["--serial", "tty", "--rng", "on"]);
    for disk in disks.options(folder)? {
        command.args(["--disk", &disk]);
    }
    if disks == Disks::of_blocks(true) {
        // Wherever the snapshotter has its devices and files. Who may ask the monitor for a disk is root.
        command.args(["--allow-paths", "/"]);
    } else {
        for path in [&settings.images, &folder.to_owned()] {
            command.arg("--allow-paths").arg(path);
        }
    }
    command.env(CACHE, cache(std::env::var_os(CACHE)));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    Ok(command)
}

/// Ends a pod's machine whose shim has died, and removes its folder.
pub fn clean(settings: &Settings, namespace: &str, id: &str) {
    let folder = folder(settings, namespace, id);
    if !folder.exists() {
        return;
    }
    let socket = folder.join("api");
    let stop = json!({"action_type": "InstanceStop"});
    let asked = request(
        &socket,
        Method::PUT,
        "/actions",
        Some(&stop),
        SHORT_PATIENCE,
    );
    if let Err(error) = asked {
        eprintln!("stop the machine: {error}");
        if let Ok(cgroup) = fs::read_link(cgroup_link(&folder)) {
            cgroup::kill(&cgroup);
        }
    }
    remove(&folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_only_or_writable_and_fit_beside_the_interfaces() {
        let folder = tempfile::tempdir().unwrap();
        let of = |blocks| Disks::of_blocks(blocks).options(folder.path()).unwrap();
        let layers = of(false);
        assert_eq!(layers.len(), 8);
        assert!(layers.iter().all(|disk| disk.contains("readonly=on")));
        let blocks = of(true);
        // Balloon, random bytes, vsock and four interfaces are the other ones of 19.
        assert_eq!(blocks.len(), 12);
        let writable = Disks::of_blocks(true).numbers(true);
        for (number, disk) in blocks.iter().enumerate() {
            let wanted = if writable.contains(&number) {
                "off"
            } else {
                "on"
            };
            assert!(disk.contains(&format!("readonly={wanted}")), "{disk}");
        }
        // Nobody else has the file of a writable disk.
        let mut files: Vec<_> = blocks[4..]
            .iter()
            .map(|disk| disk.split(',').next())
            .collect();
        files.dedup();
        assert_eq!(files.len(), 8);
    }

    #[test]
    fn a_machine_of_a_service_without_a_home_has_a_cache() {
        assert_eq!(cache(None), "/var/cache");
        assert_eq!(cache(Some("/elsewhere".into())), "/elsewhere");
        let settings: Settings = toml::from_str("kernel = '/k'\ninitramfs = '/i'\n").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let command = command(&settings, folder.path(), 256, Disks::of_blocks(false)).unwrap();
        assert!(
            command
                .get_envs()
                .any(|(name, value)| name == CACHE && value.is_some())
        );
    }
}
