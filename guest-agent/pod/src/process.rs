//! A process of a container, and its standard streams.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ebb_pod::End;
use ebb_pod::answers::{Exit, locked};
use ebb_pod::error::{Context, Error, Result};
use oci_spec::runtime::Process as Wanted;
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::reaper::Reaper;
use crate::request::{Place, Request};
use crate::streams::Ends;

/// A process of a container: started or not.
#[derive(Debug)]
pub struct Process {
    wanted: Wanted,
    state: Mutex<State>,
    ended: Condvar,
}

/// How far a process is.
#[derive(Debug, Default)]
struct State {
    /// Its number, once it has been started.
    pid: Option<u32>,
    /// How it ended.
    exit: Option<Exit>,
    ends: Ends,
    terminal: Option<File>,
}

impl Process {
    /// One that is not started yet.
    pub fn new(wanted: Wanted) -> Arc<Self> {
        Arc::new(Self {
            wanted,
            state: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    /// True if its streams are a terminal.
    pub fn has_terminal(&self) -> bool {
        self.wanted.terminal().unwrap_or(false)
    }

    /// Its number, once it has been started.
    pub fn pid(&self) -> Option<u32> {
        locked(&self.state).pid
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        locked(&self.state).exit
    }

    /// Gives away the agent's end of one of its streams, once.
    pub fn take_end(&self, end: End) -> Option<File> {
        let ends = &mut locked(&self.state).ends;
        match end {
            End::Input => ends.input.take(),
            End::Output => ends.output.take(),
            End::Errors => ends.errors.take(),
        }
    }

    /// Waits for its end.
    pub fn wait(&self) -> Exit {
        let mut state = locked(&self.state);
        loop {
            if let Some(exit) = state.exit {
                return exit;
            }
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes its end.
    pub fn end(&self, status: u32) {
        let mut state = locked(&self.state);
        state.exit = Some(Exit::now(status));
        state.terminal = None;
        self.ended.notify_all();
    }

    /// Sets the size of its terminal, in characters.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        let state = locked(&self.state);
        let terminal = state.terminal.as_ref().context("it has no terminal")?;
        let short = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = rustix::termios::Winsize {
            ws_row: short(height),
            ws_col: short(width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal, size).context("the terminal's size")
    }

    /// Starts it, and returns the number of the helper that ends with its exit status.
    pub fn start(&self, reaper: &Reaper, cgroup: &Path, place: Place, file: &Path) -> Result<u32> {
        let mut state = locked(&self.state);
        if state.pid.is_some() {
            return Err(Error::new("the process has been started before"));
        }
        let streams = Streams::new(self.has_terminal())?;
        let request = Request {
            cgroup: cgroup.to_owned(),
            process: self.wanted.clone(),
            streams: streams.numbers(),
            place,
        };
        request.write(file)?;
        let mut helper = None;
        let number = reaper.spawn(|| {
            let child = Command::new("/proc/self/exe")
                .arg("enter")
                .arg(file)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .context("start a helper")?;
            let number = child.id();
            helper = child.stdout;
            Ok::<_, Error>(number)
        })?;
        let report = read_report(helper.context("no pipe")?);
        // Nobody waits for a helper that failed: its end is dropped.
        let pid = report.inspect_err(|_| {
            reaper.wait(number);
        })?;
        state.pid = Some(pid);
        (state.ends, state.terminal) = streams.ours;
        Ok(number)
    }
}

/// The process' number, once it has become its program.
fn read_report(report: impl std::io::Read) -> Result<u32> {
    let mut pid = None;
    for line in BufReader::new(report).lines() {
        let line = line.context("the report")?;
        if let Some(error) = line.strip_prefix("error ") {
            return Err(Error::new(error));
        }
        pid = line.strip_prefix("pid ").and_then(|pid| pid.parse().ok());
    }
    pid.context("the helper ended early")
}

/// Both sides of a process' streams while it starts.
struct Streams {
    theirs: [File; 3],
    ours: (Ends, Option<File>),
}

impl Streams {
    fn new(terminal: bool) -> Result<Self> {
        if terminal {
            return Self::terminal();
        }
        let pipe = || pipe_with(PipeFlags::CLOEXEC).context("pipe");
        let ((stdin, input), (output, stdout), (errors, stderr)) = (pipe()?, pipe()?, pipe()?);
        let ends = Ends {
            input: Some(input.into()),
            output: Some(output.into()),
            errors: Some(errors.into()),
        };
        Ok(Self {
            theirs: [stdin.into(), stdout.into(), stderr.into()],
            ours: (ends, None),
        })
    }

    fn terminal() -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).context("a terminal")?;
        grantpt(&ours).context("a terminal")?;
        unlockpt(&ours).context("a terminal")?;
        let name = ptsname(&ours, Vec::new()).context("a terminal")?;
        let name = name.to_str().context("a terminal")?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = open(name, flags, Mode::empty()).context(name)?;
        let (ours, theirs) = (File::from(ours), File::from(theirs));
        let copy = |file: &File| file.try_clone().context("dup");
        let ends = Ends {
            input: Some(copy(&ours)?),
            output: Some(copy(&ours)?),
            errors: None,
        };
        Ok(Self {
            theirs: [copy(&theirs)?, copy(&theirs)?, theirs],
            ours: (ends, Some(ours)),
        })
    }

    fn numbers(&self) -> [i32; 3] {
        self.theirs.each_ref().map(File::as_raw_fd)
    }
}
