//! Runs commands where KVM is: on this host, or in the nested machine.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command as Process, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::assets::Assets;
use crate::error::{Context, Error, Result};
use crate::frame::Exit;
use crate::interactive;
use crate::machine::{Machine, Options};
use crate::platform::Platform;
use crate::session::{Command, Stream};

/// How long to wait for more output after a process has ended.
const DRAIN: Duration = Duration::from_secs(2);

/// Where commands run.
pub enum Runner {
    /// On this host.
    Direct,
    /// In this machine.
    Nested(Box<Machine>),
}

impl Runner {
    /// Probes the host, and boots a nested machine if it has no KVM.
    ///
    /// # Errors
    /// Those of [`Platform::probe`] and [`Machine::boot`].
    pub fn start(assets: &Assets, options: &Options) -> Result<Self> {
        match Platform::probe()? {
            Platform::Direct => Ok(Self::Direct),
            Platform::Nested => Machine::boot(assets, options)
                .map(Box::new)
                .map(Self::Nested),
        }
    }

    /// Where commands run.
    pub fn platform(&self) -> Platform {
        match self {
            Self::Direct => Platform::Direct,
            Self::Nested(_) => Platform::Nested,
        }
    }

    /// How many boots of the nested machine failed before it came up.
    pub fn boot_retries(&self) -> u32 {
        match self {
            Self::Direct => 0,
            Self::Nested(machine) => machine.boot_retries(),
        }
    }

    /// Returns false if the nested machine has ended.
    pub fn is_alive(&self) -> bool {
        match self {
            Self::Direct => true,
            Self::Nested(machine) => machine.is_alive(),
        }
    }

    /// Runs a command with empty input until it ends, and passes its output to `on_output` as it comes.
    ///
    /// # Errors
    /// If it cannot be started, runs longer than `timeout` (then it is killed), or the machine has ended.
    pub fn run(
        &self,
        command: &Command,
        timeout: Duration,
        on_output: &mut dyn FnMut(Stream, &[u8]),
    ) -> Result<Exit> {
        match self {
            Self::Direct => run_here(command, timeout, on_output),
            Self::Nested(machine) => {
                let session = machine.exec(command)?;
                session.close_stdin()?;
                session.wait(timeout, on_output)
            }
        }
    }

    /// Runs a command on this process's terminal.
    ///
    /// # Errors
    /// If it cannot be started, or the machine has ended.
    pub fn interactive(&self, command: &Command) -> Result<Exit> {
        match self {
            Self::Direct => {
                let status = process(command)?.status().context(|| starting(command))?;
                Ok(exit(status))
            }
            Self::Nested(machine) => interactive::run(machine, command),
        }
    }
}

fn starting(command: &Command) -> String {
    format!("run {:?}", command.argv.join(" "))
}

fn process(command: &Command) -> Result<Process> {
    let program = command
        .argv
        .first()
        .context(|| "run an empty command".into())?;
    let mut process = Process::new(program);
    process
        .args(&command.argv[1..])
        .envs(command.env.iter().map(|(name, value)| (name, value)));
    process.current_dir(command.cwd.as_deref().unwrap_or(std::path::Path::new("/")));
    Ok(process)
}

fn exit(status: std::process::ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(0)),
    }
}

/// Runs a command on this host in its own process group, which is killed at the end.
pub fn run_here(
    command: &Command,
    timeout: Duration,
    on_output: &mut dyn FnMut(Stream, &[u8]),
) -> Result<Exit> {
    let mut process = process(command)?;
    process
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut group = Group(process.spawn().context(|| starting(command))?);
    let (sender, output) = mpsc::channel();
    if let Some(pipe) = group.0.stdout.take() {
        pump(Stream::Stdout, pipe, sender.clone());
    }
    if let Some(pipe) = group.0.stderr.take() {
        pump(Stream::Stderr, pipe, sender.clone());
    }
    drop(sender);
    let mut deadline = Instant::now() + timeout;
    let mut ended = None;
    loop {
        match output.recv_timeout(Duration::from_millis(20)) {
            Ok((stream, bytes)) => on_output(stream, &bytes),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(2)),
        }
        if ended.is_none() {
            ended = group.0.try_wait().context(|| starting(command))?;
            if ended.is_some() {
                group.kill(); // Processes that it has left behind.
                deadline = Instant::now() + DRAIN;
            }
        }
        if let Some(status) = ended {
            for (stream, bytes) in output.try_iter() {
                on_output(stream, &bytes);
            }
            let done = matches!(output.try_recv(), Err(mpsc::TryRecvError::Disconnected));
            if done || Instant::now() > deadline {
                return Ok(exit(status));
            }
        } else if Instant::now() > deadline {
            let seconds = timeout.as_secs_f32();
            return Err(Error::new(format!(
                "{} was killed after {seconds} s",
                starting(command)
            )));
        }
    }
}

/// A child. Dropping it kills its process group.
struct Group(Child);

impl Group {
    fn kill(&self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

fn pump(stream: Stream, mut from: impl Read + Send + 'static, to: Sender<(Stream, Vec<u8>)>) {
    thread::spawn(move || {
        let mut buffer = vec![0; crate::frame::CHUNK];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.send((stream, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(argv: &[&str], timeout: Duration) -> (Result<Exit>, Vec<u8>, Vec<u8>) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let command = Command::new(argv.iter().copied()).env("EBB_TEST", "there");
        let result = Runner::Direct.run(&command, timeout, &mut |stream, bytes| match stream {
            Stream::Stdout => stdout.extend(bytes),
            Stream::Stderr => stderr.extend(bytes),
        });
        (result, stdout, stderr)
    }

    #[test]
    fn output_and_exit_code_come_back() {
        let script = "echo here; echo $EBB_TEST >&2; exit 3";
        let (result, stdout, stderr) = run(&["sh", "-c", script], Duration::from_secs(10));
        assert_eq!(result.unwrap(), Exit::Code(3));
        assert_eq!(
            (stdout.as_slice(), stderr.as_slice()),
            (&b"here\n"[..], &b"there\n"[..])
        );
    }

    #[test]
    fn a_command_that_runs_too_long_is_killed() {
        let start = Instant::now();
        let (result, _, _) = run(&["sh", "-c", "sleep 60 & wait"], Duration::from_millis(100));
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains("killed after 0.1 s")
        );
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn processes_that_a_command_leaves_behind_are_killed() {
        let start = Instant::now();
        let (result, _, _) = run(&["sh", "-c", "sleep 60 & exit 0"], Duration::from_secs(50));
        assert!(result.unwrap().success());
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_missing_program_is_named() {
        let (result, _, _) = run(&["/nosuch/program"], Duration::from_secs(1));
        assert!(result.unwrap_err().to_string().contains("/nosuch/program"));
    }
}
