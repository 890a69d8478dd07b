//! A monitor under test: started, timed and ended.

use std::fs::{self, File};
use std::io::{self, Seek};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How a process went.
#[derive(Debug)]
pub struct Outcome {
    /// From before it was started until its end was seen.
    pub visible: Duration,
    /// From before it was started until the last of its processes had ended, all memory freed.
    pub wall: Duration,
    /// User and system time of all its threads, in seconds; without its helper processes.
    pub cpu: f64,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote.
    pub output: String,
}

/// A running process, killed when dropped. Both its outputs go to one unnamed file, so that nobody has to
/// read along while the clock runs.
pub struct Process {
    child: Child,
    /// As in /proc/PID/cmdline.
    command_line: Vec<u8>,
    output: File,
    start: Instant,
}

impl Process {
    /// Starts `command`; its input is a pipe that stays open and silent.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let output = tempfile::tempfile()?;
        command
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let command_line = words.flat_map(|word| [word.as_encoded_bytes(), b"\0"].concat());
        let command_line = command_line.collect();
        let start = Instant::now();
        let child = command.spawn()?;
        Ok(Self {
            child,
            command_line,
            output,
            start,
        })
    }

    /// Waits for its end and that of its helpers. When it has not ended in time, it is killed, and what it wrote comes
    /// back as the inner error.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn finish(mut self, limit: Duration) -> io::Result<Result<Outcome, String>> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        if !ends(Pid::from_child(&self.child), &limit)? {
            return Ok(Err(self.output()?));
        }
        let visible = self.start.elapsed();
        for helper in running(&self.command_line)? {
            if !ends(helper, &limit)? {
                return Ok(Err(format!("its helper {helper:?} has not ended")));
            }
        }
        let wall = self.start.elapsed();
        // Not reaped yet, so its figures are still to be had.
        let cpu = cpu_seconds(&self.proc("stat")?);
        let status = self.child.wait()?;
        let output = self.output()?;
        Ok(Ok(Outcome {
            visible,
            wall,
            cpu,
            status,
            output,
        }))
    }

    /// Waits until its output holds `text`. Whether it does.
    ///
    /// # Errors
    /// The output cannot be read.
    pub fn await_output(&mut self, text: &str, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        while !self.output()?.contains(text) {
            if Instant::now() > deadline || self.child.try_wait()?.is_some() {
                return Ok(false);
            }
            sleep(Duration::from_millis(100));
        }
        Ok(true)
    }

    /// What it has written so far. The file's position is the process's own: it must not be moved while
    /// it runs.
    ///
    /// # Errors
    /// The output cannot be read.
    pub fn output(&self) -> io::Result<String> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; (&self.output).stream_position()? as usize];
        self.output.read_exact_at(&mut bytes, 0)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file of its folder in /proc.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn proc(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(format!("/proc/{}/{name}", self.child.id()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended and was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for the end of a process. Returns false when it has not ended in time.
fn ends(process: Pid, limit: &Timespec) -> io::Result<bool> {
    let pidfd = match pidfd_open(process, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(true),
        pidfd => pidfd?,
    };
    Ok(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(limit))? > 0)
}

/// The living processes of this command line: of a monitor that has ended, its helpers.
fn running(command: &[u8]) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_str().and_then(|it| it.parse().ok());
        // It may end at any time, and has no command line then.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !line.is_empty() && line == command {
            found.extend(pid.and_then(Pid::from_raw));
        }
    }
    Ok(found)
}

/// User and system time in seconds from /proc/PID/stat (proc(5), fields 14 and 15).
fn cpu_seconds(stat: &str) -> f64 {
    // The second field, the name, may hold anything; it ends at the last parenthesis.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_timed_and_its_output_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let process = Process::start(&mut command).unwrap();
        let outcome = process.finish(Duration::from_secs(20)).unwrap().unwrap();
        assert_eq!(
            (outcome.output.as_str(), outcome.status.code()),
            ("out\nerr\n", Some(3))
        );
        assert!(outcome.wall >= outcome.visible && outcome.cpu < 10.0);
    }

    #[test]
    fn helpers_are_waited_for() {
        // A subshell has its parent's command line.
        let mut command = Command::new("sh");
        command.args(["-c", "(sleep 0.4; :) & exit 0"]);
        let process = Process::start(&mut command).unwrap();
        let outcome = process.finish(Duration::from_secs(20)).unwrap().unwrap();
        assert!(outcome.visible < Duration::from_millis(300), "{outcome:?}");
        assert!(outcome.wall >= Duration::from_millis(350), "{outcome:?}");
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let mut process = Process::start(Command::new("cat").arg("-")).unwrap();
        assert!(
            !process
                .await_output("text", Duration::from_millis(10))
                .unwrap()
        );
        assert_eq!(
            process
                .finish(Duration::from_millis(10))
                .unwrap()
                .unwrap_err(),
            ""
        );
    }

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let hz = rustix::param::clock_ticks_per_second();
        let stat = format!("7 (a ) b) S 1 2 3 4 5 6 7 8 9 10 {hz} {hz} 0 0 20");
        assert!((cpu_seconds(&stat) - 2.0).abs() < 1e-9);
    }
}
