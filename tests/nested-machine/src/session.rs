//! The host's side of commands in the nested machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::frame::{CHUNK, Exec, Exit, Frame};
use crate::machine::Link;

/// A command to run, here or in the nested machine.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// The program, found through PATH, and its arguments.
    pub argv: Vec<String>,
    /// Working directory; `/` when `None`.
    pub cwd: Option<PathBuf>,
    /// Variables added to the environment.
    pub env: Vec<(String, String)>,
    /// Rows and columns of a pseudo-terminal, instead of pipes. Ignored on the host.
    pub tty: Option<(u16, u16)>,
}

impl Command {
    /// A command from its program and arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// Adds one variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub(crate) fn exec(&self) -> Exec {
        let cwd = self
            .cwd
            .as_ref()
            .map(|path| path.to_string_lossy().into_owned());
        Exec {
            argv: self.argv.clone(),
            cwd: cwd.unwrap_or_default(),
            env: self.env.clone(),
            tty: self.tty,
        }
    }
}

/// The stream of some output. A terminal has only `Stdout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Exit status and output of a command.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: Exit,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

/// An event of a session.
#[derive(Debug)]
pub enum Event {
    /// Bytes from a stream.
    Output(Stream, Vec<u8>),
    /// The command has ended. No event follows.
    Exited(Exit),
}

/// A command that runs in the machine. Dropping it kills the command's process group.
pub struct Session {
    link: Arc<Link>,
    id: u32,
    events: Receiver<Frame>,
    what: String,
    ended: bool,
}

impl Session {
    pub(crate) fn start(link: Arc<Link>, command: &Command) -> Result<Self> {
        let (id, events) = link.register()?;
        let what = command.argv.join(" ");
        let session = Self {
            link,
            id,
            events,
            what,
            ended: false,
        };
        session.send(Frame::Exec(command.exec()))?;
        Ok(session)
    }

    /// Writes to the command's standard input.
    ///
    /// # Errors
    /// If the machine has ended.
    pub fn write_stdin(&self, bytes: &[u8]) -> Result<()> {
        bytes
            .chunks(CHUNK)
            .try_for_each(|chunk| self.send(Frame::Stdin(chunk.to_vec())))
    }

    /// Closes the command's standard input.
    ///
    /// # Errors
    /// If the machine has ended.
    pub fn close_stdin(&self) -> Result<()> {
        self.send(Frame::StdinEof)
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// If the machine has ended.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.send(Frame::Signal(number))
    }

    /// Sets the size of the command's terminal.
    ///
    /// # Errors
    /// If the machine has ended.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        self.send(Frame::Resize(rows, columns))
    }

    /// The next event, or `None` when none came within `timeout`.
    ///
    /// # Errors
    /// If the command could not be started, or the machine has ended.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>> {
        match self.events.recv_timeout(timeout) {
            Ok(Frame::Stdout(bytes)) => Ok(Some(Event::Output(Stream::Stdout, bytes))),
            Ok(Frame::Stderr(bytes)) => Ok(Some(Event::Output(Stream::Stderr, bytes))),
            Ok(Frame::Exited(exit)) => {
                self.ended = true;
                Ok(Some(Event::Exited(exit)))
            }
            Ok(Frame::Failed(text)) => {
                self.ended = true;
                Err(Error::new(text))
            }
            Ok(other) => Err(Error::new(format!(
                "unexpected message from the agent: {other:?}"
            ))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.link.gone(&self.what)),
        }
    }

    /// Waits for the end, and passes output to `on_output` as it comes.
    ///
    /// # Errors
    /// If the command could not be started, ran longer than `timeout`, or the machine has ended.
    pub fn wait(
        mut self,
        timeout: Duration,
        on_output: &mut dyn FnMut(Stream, &[u8]),
    ) -> Result<Exit> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_event(left)? {
                Some(Event::Output(stream, bytes)) => on_output(stream, &bytes),
                Some(Event::Exited(exit)) => return Ok(exit),
                None => {
                    let seconds = timeout.as_secs_f32();
                    let text = format!("{:?} was killed after {seconds} s", self.what);
                    return Err(Error::new(text));
                }
            }
        }
    }

    fn send(&self, frame: Frame) -> Result<()> {
        self.link.send(self.id, frame)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.send(Frame::Kill); // Fails if the machine has ended.
        }
        self.link.forget(self.id);
    }
}
