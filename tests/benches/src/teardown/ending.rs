//! Ends of machines, and how they are watched.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::system::sysinfo;

use super::Results;
use crate::{BenchError, system};

/// The unit of times.
const MS: &str = "ms";

/// How often the host's free memory is looked at.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000,
};

/// How long after the last process's end memory may come back.
const SETTLE: Duration = Duration::from_secs(1);

/// How a machine is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By request.
    Stop,
    /// By SIGKILL.
    Kill,
    /// By SIGKILL for it and all its helpers, as the end of a cgroup is.
    KillAll,
}

impl End {
    /// Its name in the report.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::KillAll => "kill-all",
        }
    }

    /// The signal that ends a monitor so.
    pub(super) const fn signal(self) -> Signal {
        match self {
            Self::Stop => Signal::TERM,
            Self::Kill | Self::KillAll => Signal::KILL,
        }
    }
}

/// Milliseconds from an end's beginning.
pub(super) struct Times {
    /// The monitor's end is seen.
    visible: f64,
    /// The host has its memory again, but for a fiftieth: each processor keeps some free pages to itself. Nothing when
    /// that was not seen.
    free: Option<f64>,
    /// The last process has ended.
    gone: f64,
    /// When the end began.
    began: Instant,
    /// What the processors spent on it, if that was counted.
    pub(super) cpu: Option<f64>,
}

impl Times {
    /// From the beginning until the last process has ended.
    pub(super) fn span(&self) -> Range<Instant> {
        self.began..self.began + Duration::from_secs_f64(self.gone / 1e3)
    }

    /// Adds them to a system's case.
    pub(super) fn record(&self, results: &mut Results, (system, case): (&str, &str)) {
        results.add((system, case), ("visible", MS), self.visible);
        results.add((system, case), ("gone", MS), self.gone);
        if let Some(cpu) = self.cpu {
            results.add((system, case), ("cpu", MS), cpu);
        }
        match self.free {
            Some(free) => results.add((system, case), ("free", MS), free),
            None => results.add((system, case), ("free-not-seen", ""), 1.0),
        }
    }
}

/// The metric by which two ends, each by system and case, are compared: `free`, or `gone` if the memory was not seen free
/// each time.
pub(super) fn compared(results: &Results, ends: [(&str, &str); 2]) -> &'static str {
    let unseen = |(system, case)| !results.of(system, case, "free-not-seen").is_empty();
    if ends.into_iter().any(unseen) {
        "gone"
    } else {
        "free"
    }
}

/// A machine that is about to end.
pub(super) struct Watch {
    processes: Vec<OwnedFd>,
    bytes: u64,
}

impl Watch {
    /// Of a monitor, the processes that share its memory, and so many bytes that the host will have again.
    pub(super) fn new(monitor: u32, others: &[u32], bytes: u64) -> Result<Self, BenchError> {
        let all = std::iter::once(&monitor).chain(others);
        Ok(Self {
            processes: all.map(|pid| open(*pid)).collect::<Result<_, _>>()?,
            bytes: bytes - bytes / 50,
        })
    }

    /// Ends it and waits until the last process has ended and the memory is free, for the latter at most [`SETTLE`].
    pub(super) fn end(
        self,
        end: impl FnOnce() -> Result<(), BenchError>,
    ) -> Result<Times, BenchError> {
        let before = free_memory();
        let start = Instant::now();
        end()?;
        let (mut visible, mut free) = (None, None);
        let mut left: Vec<&OwnedFd> = self.processes.iter().collect();
        let mut passed = 0.0;
        while !left.is_empty() {
            let mut fds: Vec<_> = left
                .iter()
                .map(|process| PollFd::new(*process, PollFlags::IN))
                .collect();
            poll(&mut fds, Some(&TICK)).map_err(system("wait for a process"))?;
            let ended: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            passed = start.elapsed().as_secs_f64() * 1e3;
            // The monitor is the first; it stays so until it has ended.
            if ended[0] && visible.is_none() {
                visible = Some(passed);
            }
            if free.is_none() && free_memory().saturating_sub(before) >= self.bytes {
                free = Some(passed);
            }
            let mut ended = ended.into_iter();
            left.retain(|_| ended.next() == Some(false));
        }
        let gone = start.elapsed();
        while free.is_none() && start.elapsed() < gone + SETTLE {
            if free_memory().saturating_sub(before) >= self.bytes {
                free = Some(start.elapsed().as_secs_f64() * 1e3);
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(Times {
            visible: visible.unwrap_or(passed),
            free,
            gone: passed,
            began: start,
            cpu: None,
        })
    }
}

/// A descriptor that polls readable when the process has ended.
fn open(pid: u32) -> Result<OwnedFd, BenchError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid
        .ok_or(std::io::ErrorKind::InvalidInput)
        .map_err(system("read a pid"))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(system("watch a process"))
}

/// Bytes of the host that nothing is in.
fn free_memory() -> u64 {
    let info = sysinfo();
    info.freeram * u64::from(info.mem_unit)
}
