//! Whole machines: how soon an end is seen, and when memory is free. The guest sleeps; its memory was touched by
//! its monitor before.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use super::{Arguments, GIB, Results};
use crate::bench::{BenchError, system};
use crate::error::Context;
use crate::host::rss_estimate;
use crate::idle::{Idle, Place, signal_to};
use crate::wait::{LONG, until_often};

const MS: &str = "ms";

/// How a machine is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By request.
    Stop,
    /// By SIGKILL.
    Kill,
}

impl End {
    const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Kill => "kill",
        }
    }
}

/// Milliseconds from an end's beginning.
struct Times {
    visible: f64,
    free: f64,
}

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let place = Place::new()?;
    for run in 1..=arguments.runs {
        for gib in [1, 4, 12].into_iter().filter(|gib| *gib <= arguments.gib) {
            let times = ended(&place, (gib, false), "on", End::Stop)?;
            let case = format!("stop {gib}G");
            results.add("ebb", &case, ("visible", MS), times.visible);
            results.add("ebb", &case, ("free", MS), times.free);
        }
        for thp in [false, true] {
            for end in [End::Stop, End::Kill] {
                for (system, guardian) in [("ebb", "on"), ("ebb-alone", "off")] {
                    let times = ended(&place, (arguments.gib, thp), guardian, end)?;
                    record(results, system, (end, thp), &times);
                }
                if !arguments.no_qemu {
                    let times = qemu(arguments.gib, thp, end)?;
                    record(results, "qemu", (end, thp), &times);
                }
            }
        }
        eprintln!("teardown: machines, run {run} of {}", arguments.runs);
    }
    let kill = case_of(End::Kill, false);
    results.divide(
        "kill_speedup",
        ["ebb-alone", &kill, "free"],
        ["ebb", &kill, "free"],
    );
    for (end, thp) in [
        (End::Stop, false),
        (End::Kill, false),
        (End::Stop, true),
        (End::Kill, true),
    ] {
        let case = case_of(end, thp);
        let suffix = if thp { "_thp" } else { "" };
        let name = format!("vs_qemu_{}{suffix}", end.name());
        results.divide(&name, ["qemu", &case, "free"], ["ebb", &case, "free"]);
    }
    for gib in [1, 4, 12] {
        if let Some(row) = results.row("ebb", &format!("stop {gib}G"), "visible") {
            results.ratio(&format!("visible_stop_ms_{gib}g"), row.median);
        }
    }
    Ok(())
}

fn case_of(end: End, thp: bool) -> String {
    format!("{} {}", end.name(), if thp { "thp" } else { "4k" })
}

fn record(results: &mut Results, system: &str, (end, thp): (End, bool), times: &Times) {
    let case = case_of(end, thp);
    results.add(system, &case, ("visible", MS), times.visible);
    results.add(system, &case, ("free", MS), times.free);
}

fn ended(
    place: &Place,
    (gib, thp): (u64, bool),
    guardian: &str,
    end: End,
) -> Result<Times, BenchError> {
    let thp = if thp { "on" } else { "off" };
    let memory = format!("size={gib}G,thp={thp},prefault=on");
    let mut idle = place.running(&memory, guardian)?;
    let monitor = open(idle.pid())?;
    let heir = place
        .relatives()?
        .into_iter()
        .find(|it| it.name == "ebb-heir");
    let heir = heir.map(|heir| open(heir.pid)).transpose()?;
    let start = Instant::now();
    match end {
        End::Stop => stop(place)?,
        End::Kill => idle.signal(Signal::KILL),
    }
    let visible = await_end(&monitor, start)?;
    let free = match heir {
        Some(heir) => await_end(&heir, start)?,
        None => visible,
    };
    finish(place, &mut idle, guardian)?;
    Ok(Times { visible, free })
}

/// Asks for the stop over the API, without a client's start-up time.
fn stop(place: &Place) -> Result<(), BenchError> {
    let body = r#"{"action_type":"InstanceStop"}"#;
    let request = format!(
        "PUT /actions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let sent = UnixStream::connect(place.path("api"))
        .and_then(|mut stream| stream.write_all(request.as_bytes()).map(|()| stream));
    // Open until the answer is there: a client that hangs up is not answered.
    let mut stream = sent.map_err(system("ask for the stop"))?;
    let _ = std::io::Read::read(&mut stream, &mut [0; 256]);
    Ok(())
}

fn finish(place: &Place, idle: &mut Idle, guardian: &str) -> Result<(), BenchError> {
    idle.wait()?;
    if guardian == "off" {
        // Nobody removes what a killed monitor leaves then.
        for path in place.litter()? {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(place.vanished(LONG)?)
}

/// QEMU with the same memory touched; its CPUs never start.
fn qemu(gib: u64, thp: bool, end: End) -> Result<Times, BenchError> {
    // Inherited: QEMU asks for huge pages by itself.
    let small = |small| rustix::thread::disable_transparent_huge_pages(small);
    small(!thp).map_err(system("prctl"))?;
    let child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-S", "-nodefaults", "-display", "none"])
        .args([
            "-m",
            &format!("{gib}G"),
            "-machine",
            "pc,memory-backend=ram",
        ])
        .args([
            "-object",
            &format!("memory-backend-ram,id=ram,size={gib}G,prealloc=on,prealloc-threads=2"),
        ])
        .stdin(Stdio::null())
        .spawn();
    small(false).map_err(system("prctl"))?;
    let child = child.map_err(system("start QEMU; leave it out with --no-qemu"))?;
    let mut child = Killed(child);
    let pid = child.0.id();
    until_often("QEMU has touched its memory", LONG, || {
        let resident = rss_estimate(pid).context("QEMU has ended")?;
        Ok((resident >= gib * GIB).then_some(()))
    })?;
    // It is still to set up its signals.
    std::thread::sleep(Duration::from_millis(500));
    let process = open(pid)?;
    let start = Instant::now();
    signal_to(
        pid,
        match end {
            End::Stop => Signal::TERM,
            End::Kill => Signal::KILL,
        },
    );
    let visible = await_end(&process, start)?;
    let _ = child.0.wait();
    Ok(Times {
        visible,
        free: visible,
    })
}

/// Does not outlive an error.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open(pid: u32) -> Result<OwnedFd, BenchError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid
        .ok_or(std::io::ErrorKind::InvalidInput)
        .map_err(system("read a pid"))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(system("watch a process"))
}

/// Milliseconds from `start` until the process has ended, its memory free unless another shares it.
fn await_end(process: &OwnedFd, start: Instant) -> Result<f64, BenchError> {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, None).map_err(system("wait for a process"))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}
