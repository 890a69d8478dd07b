//! System calls that fail, by strace.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::error::{Context, Error, Result};
use crate::idle::signal_to;
use crate::wait::{LONG, until_often};

/// How a call fails: its error, and the calls that fail so. Without these, it is `EIO`.
const ERRORS: &[(&str, &str)] = &[
    (
        "ENOMEM",
        "mmap mprotect madvise brk munmap mremap ioctl newfstatat prctl",
    ),
    (
        "EMFILE",
        "openat open eventfd2 epoll_create1 signalfd4 pidfd_open socket fcntl accept4 dup3",
    ),
    ("EAGAIN", "clone clone3 tgkill sched_setaffinity"),
    ("EACCES", "statx rename unlink bind fchmod mkdir poll"),
    ("ENOSPC", "write pwrite64 epoll_ctl"),
    ("EINTR", "epoll_wait process_madvise process_mrelease"),
    ("EADDRINUSE", "listen"),
    ("ENOLCK", "flock"),
    ("ENOENT", "getcwd"),
];

/// Calls that do not fail when their arguments are right, and those that do not return. A futex that is waited for may be
/// interrupted, one that is woken not, and strace does not tell them apart.
const CANNOT: &str = "rt_sigprocmask rt_sigaction rt_sigreturn sigaltstack getpid gettid geteuid getuid \
                      sched_getaffinity exit exit_group restart_syscall close sched_yield set_robust_list rseq \
                      clock_nanosleep futex getrandom setpriority getpriority setsid";

/// A system call, as one of those that a thread makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// It is the thread's call number so much of this name, from 1 on.
    pub number: usize,
    /// What strace has written.
    pub text: String,
}

impl Call {
    /// The error that it can fail with; none if it cannot.
    #[must_use]
    pub fn error(&self) -> Option<&'static str> {
        let is_one = |names: &str| names.split_whitespace().any(|name| name == self.name);
        // Those of an eventfd of ours have room, and do not wait.
        if is_one(CANNOT) || self.text.contains("[eventfd]") {
            return None;
        }
        let found = ERRORS.iter().find(|(_, names)| is_one(names));
        Some(found.map_or("EIO", |(error, _)| error))
    }

    /// strace's options with which it fails.
    #[must_use]
    pub fn failing(&self) -> Vec<String> {
        let error = self.error().unwrap_or("EIO");
        let inject = format!("inject={}:error={error}:when={}", self.name, self.number);
        [
            "-e".to_owned(),
            format!("trace={}", self.name),
            "-e".to_owned(),
            inject,
        ]
        .into()
    }
}

/// The calls in strace's report on one thread, in order.
#[must_use]
pub fn calls(report: &str) -> Vec<Call> {
    let mut numbers = BTreeMap::<&str, usize>::new();
    let lines = report
        .lines()
        .filter_map(|line| Some((line, line.split_once('(')?.0)));
    let calls =
        lines.filter(|(_, name)| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
    calls
        .map(|(line, name)| {
            let number = numbers.entry(name).or_default();
            *number += 1;
            Call {
                name: name.to_owned(),
                number: *number,
                text: line.chars().take(100).collect(),
            }
        })
        .collect()
}

/// strace as the parent of nobody: what it starts stays the caller's child, and only its first thread is traced.
#[must_use]
pub fn tracing(report: &Path, options: &[String], program: &Path) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-D", "-y", "-o"])
        .arg(report)
        .args(options)
        .arg(program);
    command
}

/// A strace that is attached to one thread.
pub struct Attached {
    strace: Child,
    report: PathBuf,
}

impl Attached {
    /// Attaches to the thread `tid`, with strace's `options`. `folder` gets strace's files.
    ///
    /// # Errors
    /// When strace is missing or may not attach.
    pub fn to(tid: u32, folder: &Path, options: &[String]) -> Result<Self> {
        let [report, said] = ["calls", "attached"].map(|name| folder.join(name));
        let stderr = fs::File::create(&said).context(said.display())?;
        let strace = Command::new("strace")
            .args(["-y", "-p", &tid.to_string(), "-o"])
            .arg(&report)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("start strace")?;
        let mut attached = Self { strace, report };
        until_often("strace attaches", LONG, || {
            let text = fs::read_to_string(&said).unwrap_or_default();
            if text.contains(" attached") {
                return Ok(Some(()));
            }
            match attached.strace.try_wait().context("strace")? {
                Some(_) => Err(Error::new(format!("strace has ended: {text}"))),
                None => Ok(None),
            }
        })?;
        Ok(attached)
    }

    /// Detaches.
    ///
    /// # Errors
    /// When strace does not end.
    pub fn detach(mut self) -> Result<()> {
        signal_to(self.strace.id(), Signal::INT);
        until_often("strace ends", LONG, || {
            self.strace.try_wait().context("strace")
        })
        .map(drop)
    }

    /// Waits until the thread has ended, and with it strace; the calls that it has made.
    ///
    /// # Errors
    /// When strace does not end, or wrote no report.
    pub fn finish(mut self) -> Result<Vec<Call>> {
        until_often("strace ends", LONG, || {
            self.strace.try_wait().context("strace")
        })?;
        let report = fs::read_to_string(&self.report).context(self.report.display())?;
        Ok(calls(&report))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_counted_by_its_name() {
        let report = "openat(AT_FDCWD, \"a(b\", O_RDONLY) = 3\nread(3, \"x\", 1) = 1\n--- SIGTERM {si_signo=SIGTERM} ---\n\
                      read(3, \"\", 1) = 0\ngetpid() = 7\n+++ exited with 0 +++\n";
        let calls = calls(report);
        let named: Vec<_> = calls
            .iter()
            .map(|it| (it.name.as_str(), it.number, it.error()))
            .collect();
        let expected = [
            ("openat", 1, Some("EMFILE")),
            ("read", 1, Some("EIO")),
            ("read", 2, Some("EIO")),
            ("getpid", 1, None),
        ];
        assert_eq!(named, expected);
        let options = ["-e", "trace=read", "-e", "inject=read:error=EIO:when=2"];
        assert_eq!(calls[2].failing(), options);
    }
}
