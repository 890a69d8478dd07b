//! The pod's machine: `ebb run` as a child, and what is asked of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use ebb_pod::answers::locked;
use ebb_pod::error::{Context, Error, Result};
use ebb_vmm::api::request;
use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::settings::Settings;

/// How many disks a machine has, which start empty: the most root file systems of a pod at a time.
pub const DISKS: usize = 8;

/// How long the monitor may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

const MIB: u64 = 1 << 20;

/// A running machine.
pub struct Machine {
    /// The monitor's process.
    pub pid: u32,
    folder: PathBuf,
    memory_mib: u64,
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

impl Machine {
    /// Starts it with memory for this limit in bytes, if the pod has one.
    pub fn start(
        settings: &Settings,
        namespace: &str,
        id: &str,
        limit: Option<u64>,
    ) -> Result<Self> {
        let folder = folder(settings, namespace, id);
        fs::create_dir_all(&folder).context(folder.display())?;
        let empty = folder.join("empty");
        File::create(&empty).context(empty.display())?;
        let memory_mib = limit.map_or(settings.memory_mib, |bytes| {
            // A guest's memory is whole blocks of 2 MiB.
            (bytes.div_ceil(MIB) + settings.overhead_mib).next_multiple_of(2)
        });
        let mut command = command(settings, &folder, memory_mib)?;
        let child = command.spawn().context(settings.ebb.display())?;
        let end = Arc::new(End::default());
        let machine = Self {
            pid: child.id(),
            folder,
            memory_mib,
            end: Arc::clone(&end),
        };
        std::thread::spawn(move || end.when(child));
        Ok(machine)
    }

    /// The socket by which the guest's ports are reached.
    pub fn vsock(&self) -> PathBuf {
        self.folder.join("vsock")
    }

    /// True once the monitor has ended.
    pub fn has_ended(&self) -> bool {
        *locked(&self.end.ended)
    }

    /// The end of the monitor's log: why it may have ended.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("; ")
    }

    /// Gives a disk of the machine this file as its content; none: it becomes empty.
    pub fn set_disk(&self, number: usize, file: Option<&Path>) -> Result<()> {
        let empty = self.folder.join("empty");
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

    fn ask(&self, method: Method, path: &str, body: &Value) -> Result<()> {
        let done = request(&self.folder.join("api"), method, path, Some(body), PATIENCE);
        done.map(drop).context(format_args!("{path} {body}"))
    }

    /// Ends it, and waits until that is seen; its memory is freed behind it.
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
        let _ = fs::remove_dir_all(&self.folder);
    }
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

fn disk_id(number: usize) -> String {
    format!("layer{number}")
}

fn command(settings: &Settings, folder: &Path, memory_mib: u64) -> Result<Command> {
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
    command.args([
        "--serial",
        &format!("file={}", at("console")),
        "--rng",
        "on",
    ]);
    for number in 0..DISKS {
        let disk = format!("path={},readonly=on,id={}", at("empty"), disk_id(number));
        command.args(["--disk", &disk]);
    }
    for path in [&settings.images, &folder.to_owned()] {
        command.arg("--allow-paths").arg(path);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
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
    let stop = request(
        &socket,
        Method::PUT,
        "/actions",
        Some(&json!({"action_type": "InstanceStop"})),
        PATIENCE,
    );
    if let Err(error) = stop.map_err(|error| Error::new(error.to_string())) {
        eprintln!("{error}");
    }
    let _ = fs::remove_dir_all(folder);
}
