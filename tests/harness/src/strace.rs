//! Watches system calls of a running process.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Context, Error, Result};
use crate::wait::{LONG, until};

/// System calls by which a guest's memory changes hands.
pub const MEMORY_CALLS: &str = "madvise,process_madvise,munmap,mmap,mremap,mprotect,fallocate";

/// Calls whose first argument is no address: each one counts.
const ELSEWHERE: [&str; 3] = ["process_madvise", "fallocate", "fdatasync"];

/// A strace that is attached to a process and all its threads.
pub struct Watching {
    strace: Child,
    report: PathBuf,
}

impl Watching {
    /// Attaches to `pid` and watches `calls`, names with commas; `folder` gets strace's files.
    ///
    /// # Errors
    /// When strace is missing or may not attach.
    pub fn start(pid: u32, folder: &Path, calls: &str) -> Result<Self> {
        let report = folder.join("strace.calls");
        let said = folder.join("strace.stderr");
        let stderr = fs::File::create(&said).context(said.display())?;
        let strace = Command::new("strace")
            .args([
                "-fy",
                "-e",
                &format!("trace={calls}"),
                "-p",
                &pid.to_string(),
                "-o",
            ])
            .arg(&report)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context("start strace")?;
        let mut watching = Self { strace, report };
        until("strace attaches", LONG, || {
            let text = fs::read_to_string(&said).unwrap_or_default();
            if watching.strace.try_wait().context("strace")?.is_some() {
                return Err(Error::new(format!("strace ended: {text}")));
            }
            Ok(text.contains(" attached").then_some(()))
        })?;
        Ok(watching)
    }

    /// Detaches; the calls that touched one of `areas`, addresses of the process. Threads come and go
    /// meanwhile, and so do their stacks: those calls do not count.
    ///
    /// # Errors
    /// When strace does not end, or wrote no report.
    pub fn finish(mut self, areas: &[Range<u64>]) -> Result<Vec<String>> {
        let pid = i32::try_from(self.strace.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("strace has no pid")?, Signal::INT).context("stop strace")?;
        until("strace ends", Duration::from_secs(60), || {
            self.strace.try_wait().context("strace")
        })?;
        let report = fs::read_to_string(&self.report).context(self.report.display())?;
        let touching = report.lines().filter(|line| touches(line, areas));
        Ok(touching.map(str::to_owned).collect())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Whether a line like `123 madvise(0x7f0000000000, 4096, MADV_DONTNEED) = 0` touches one of `areas`.
fn touches(line: &str, areas: &[Range<u64>]) -> bool {
    let Some((head, arguments)) = line.split_once('(') else {
        return false;
    };
    let name = head.rsplit(' ').next().unwrap_or(head);
    if ELSEWHERE.contains(&name) {
        return true;
    }
    let mut arguments = arguments.split([',', ')']).map(str::trim);
    let address = arguments.next().and_then(|word| word.strip_prefix("0x"));
    let address = address.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let length = arguments.next().and_then(|word| word.parse::<u64>().ok());
    let Some((start, length)) = address.zip(length) else {
        return false;
    };
    let end = start.saturating_add(length);
    areas
        .iter()
        .any(|area| start < area.end && area.start < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_on_the_areas_count() {
        let areas = [0x1000..0x3000, 0x9000..0xa000];
        for (line, touched) in [
            ("7 madvise(0x2000, 4096, MADV_DONTNEED) = 0", true),
            ("7 madvise(0x0, 8192, MADV_FREE) = 0", true),
            ("7 madvise(0x3000, 24576, MADV_FREE) = 0", false),
            ("7 munmap(0x9000, 1) = 0", true),
            (
                "7 mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE, -1, 0) = 0x1000",
                false,
            ),
            (
                "7 process_madvise(3, [{iov_base=0x5000, iov_len=1}], 1, MADV_COLD, 0) = 1",
                true,
            ),
            ("7 fallocate(4, FALLOC_FL_PUNCH_HOLE, 0, 4096) = 0", true),
            ("7 fdatasync(5</disk>) = 0", true),
            ("7 +++ exited with 0 +++", false),
        ] {
            assert_eq!(touches(line, &areas), touched, "{line}");
        }
    }
}
