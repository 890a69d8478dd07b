//! Between agent and container: joins namespaces and starts the container's process in them, since only a child is in a new
//! process namespace. It ends as that process ends. It stays out of the container's cgroup, where it could be killed instead
//! of what needs the memory.
//!
//! Lines on standard output: `pid N`, then, unless the program could be started, `error TEXT`. Its end without an error means
//! that the program runs.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ebb_pod::error::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::request::{Place, Request};

/// The namespaces of a container but those of its mounts and cgroups, which its process enters by itself.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWIPC
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWPID);

/// Runs the process that the file `request` describes, and returns its exit status: 128 and the signal's number if a signal
/// ended it.
pub fn run(request: &str) -> Result<u8> {
    match start(request) {
        Ok(mut child) => {
            close_report()?;
            let status = child.wait().context("wait")?;
            let status = status.code().or(status.signal().map(|signal| 128 + signal));
            Ok(status.and_then(|it| u8::try_from(it).ok()).unwrap_or(255))
        }
        Err(error) => {
            println!("error {error}");
            Ok(255)
        }
    }
}

/// The report ends when the container's process has become its program: not when this process ends.
fn close_report() -> Result<()> {
    let null = fs::File::options().write(true).open("/dev/null");
    rustix::stdio::dup2_stdout(null.context("/dev/null")?).context("the report")
}

fn join(pid: u32, namespaces: CloneFlags) -> Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("no process to join")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).context("the process to join")?;
    setns(&process, namespaces).context("setns")
}

/// The namespaces that a container has from the pod's first one: those that somebody has made before.
fn joined(spec: &Spec) -> CloneFlags {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_ref());
    let made = all.into_iter().flatten().filter(|it| it.path().is_some());
    let flags = made.map(|namespace| match namespace.typ() {
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        _ => CloneFlags::empty(),
    });
    flags.fold(CloneFlags::empty(), CloneFlags::union)
}

fn start(request: &str) -> Result<Child> {
    let wanted = Request::read(Path::new(request))?;
    match wanted.place {
        Place::New {
            container, sandbox, ..
        } => {
            let joined = sandbox.map_or(CloneFlags::empty(), |_| joined(&container.spec));
            unshare(NAMESPACES - joined).context("unshare")?;
            if let Some(pid) = sandbox.filter(|_| !joined.is_empty()) {
                join(pid, joined)?;
            }
        }
        Place::Beside(pid) => join(pid, NAMESPACES)?,
    }
    // The child writes to the report, too: its lines come after this one.
    let child = Command::new("/proc/self/exe")
        .args(["inside", request])
        .stdin(Stdio::piped())
        .spawn();
    let mut child = child.context("start the container's process")?;
    println!("pid {}", child.id());
    let go = child.stdin.take().context("no pipe")?.write_all(b"\n");
    go.context("start the container's process").map(|()| child)
}
