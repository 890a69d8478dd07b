//! How long a pod takes to start, beside the same guest alone in Firecracker's mode.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_harness::Images;
use ebb_harness::containerd::Containerd;
use ebb_harness::error::{Context, Result};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until_often};
use serde_json::json;
use tempfile::TempDir;

use super::fleet::{Fleet, System};
use super::{LIMIT, OVERHEAD, Results, START};

/// The case of the rows.
pub const CASE: &str = "start";
/// A pod: from the start of `ctr` until its program runs.
pub const POD: &str = "ebb";
/// A machine: from the start of `ebb firecracker` until the agent in the guest answers.
pub const FIRECRACKER: &str = "firecracker-mode";

/// The port of the guest at which the agent listens (`ebb_pod::TASK_PORT`).
const PORT: u32 = 1024;
/// How long the answer to one attempt may take: a guest whose driver is just starting can miss the request.
const ANSWER: Duration = Duration::from_secs(1);

/// Starts each `runs` times, in turn, after one pod for which the image of its layers is made.
pub fn measure(runs: u32, results: &mut Results) -> Result<()> {
    let containerd = Containerd::start()?;
    let one = |run| -> Result<Duration> {
        let mut fleet = Fleet::new(&containerd, System::Ebb, None)?;
        let time = fleet.add(LIMIT)?;
        eprintln!("pods: start {run}: {time:?}");
        fleet.end()?;
        Ok(time)
    };
    one(0)?;
    for run in 1..=runs {
        results.add((POD, CASE), START, one(run)?.as_secs_f64());
        let time = firecracker()?;
        eprintln!("pods: start {run} in Firecracker's mode: {time:?}");
        results.add((FIRECRACKER, CASE), START, time.as_secs_f64());
    }
    results.note("start: ebb: `ctr run --detach`; firecracker-mode: `ebb firecracker` with the same kernel, initramfs and memory, until the guest's agent answers");
    Ok(())
}

/// A monitor, killed when dropped.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn firecracker() -> Result<Duration> {
    let images = Images::from_environment()?;
    let folder = TempDir::with_prefix("ebb-start-").context("make a temporary folder")?;
    let (file, socket) = (folder.path().join("config"), folder.path().join("vsock"));
    let config = json!({
        "boot-source": {"kernel_image_path": images.vmlinux, "initrd_path": images.pod_initramfs},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": (LIMIT + OVERHEAD) / MIB},
        "vsock": {"guest_cid": 3, "uds_path": socket},
        "entropy": {},
        "drives": [],
    });
    std::fs::write(&file, config.to_string()).context(file.display())?;
    let start = Instant::now();
    let mut command = Command::new(&images.ebb);
    command.args(["firecracker", "--no-api", "--config-file"]);
    command
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let _monitor = Monitor(command.spawn().context(images.ebb.display())?);
    until_often("the guest's agent answers", LONG, || {
        Ok(answers(&socket).then_some(()))
    })?;
    Ok(start.elapsed())
}

/// True if somebody listens at the port.
fn answers(socket: &Path) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        writeln!(stream, "CONNECT {PORT}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("OK "))
}
