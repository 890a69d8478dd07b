//! From the start of the process to the API's answers: the first one, and the first one that says that the guest runs.
//! Needs KVM, but no guest that does anything.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::guest::Files;
use super::results::{Metric, Results};
use super::{BenchError, system};

/// Until the API answers at all: the machine is still being built.
const ANSWER: Metric = ("answer", "ms");
/// Until it answers that the machine runs: its vCPUs have been started.
const RUNNING: Metric = ("running", "ms");
/// The case of the figure.
const CACHED: &str = "start-cached";

/// Time between two questions.
const PAUSE: Duration = Duration::from_micros(300);
/// A monitor that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// Starts Debian's kernel `runs` times: from the cache, unpacked each time, and as a file that is not packed.
///
/// # Errors
/// [`BenchError`].
pub(super) fn measure(files: &Files, runs: u32, results: &mut Results) -> Result<(), BenchError> {
    let folder = tempfile::tempdir().map_err(system("make a folder"))?;
    let bench = Bench {
        ebb: &files.ebb,
        folder: folder.path(),
    };
    let cache = folder.path().join("cache").display().to_string();
    let cases = [
        (CACHED, &files.vmlinuz, cache.as_str()),
        ("start-unpack", &files.vmlinuz, "off"),
        ("start-elf", &files.vmlinux, "off"),
    ];
    for (_, kernel, cache) in cases {
        // It fills the caches: Ebb's and the kernel's.
        bench.start(kernel, cache)?;
    }
    for _ in 0..runs {
        for (case, kernel, cache) in cases {
            let (answer, running) = bench.start(kernel, cache)?;
            for (metric, time) in [(ANSWER, answer), (RUNNING, running)] {
                results.add(("ebb", case), metric, time.as_secs_f64() * 1e3);
            }
        }
    }
    if let Some(time) = results.median("ebb", CACHED, RUNNING.0) {
        results.lower("api_ms", time);
    }
    results.note("api_ms: from the start of the process until the API says that the machine runs; its kernel was in the cache");
    Ok(())
}

struct Bench<'a> {
    ebb: &'a Path,
    folder: &'a Path,
}

/// A monitor, asked to end when dropped.
pub(super) struct Monitor(pub Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id())
            && let Some(pid) = Pid::from_raw(pid)
        {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

impl Bench<'_> {
    /// The times of both answers.
    fn start(&self, kernel: &Path, cache: &str) -> Result<(Duration, Duration), BenchError> {
        let socket = self.folder.join("api");
        let mut command = Command::new(self.ebb);
        command
            .args(["run", "--serial", "null", "--memory", "size=512M"])
            .args(["--kernel-cache", cache, "--kernel"])
            .arg(kernel)
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null());
        let start = Instant::now();
        let child = command.spawn().map_err(system("start ebb"))?;
        let _monitor = Monitor(child);
        let mut answered = None;
        loop {
            let answer = ask(&socket);
            let time = start.elapsed();
            match answer {
                Some(text) if text.contains("Running") => {
                    return Ok((answered.unwrap_or(time), time));
                }
                Some(_) => answered = answered.or(Some(time)),
                None if time > LIMIT => {
                    return Err(system("wait for the API")(io::Error::from(
                        io::ErrorKind::TimedOut,
                    )));
                }
                None => {}
            }
            sleep(PAUSE);
        }
    }
}

/// What the API says of the machine; `None` as long as nobody answers.
pub(super) fn ask(socket: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    let question = b"GET / HTTP/1.1\r\nHost: ebb\r\nConnection: close\r\n\r\n";
    stream.write_all(question).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
