//! A session: a process group, its pipes or terminal, and the threads that copy their bytes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::frame::{CHUNK, Exec, Exit, Frame};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::serve::Port;

/// How long to wait for more output after the process has ended and its group was killed.
const DRAIN: Duration = Duration::from_secs(2);

/// A running session. [`Session::kill`] and the end of the process kill its process group.
pub struct Session {
    group: Pid,
    ended: Arc<AtomicBool>,
    input: Option<Sender<Vec<u8>>>,
    terminal: Option<File>,
}

/// One output stream of a process, and the kind of message that carries it.
type Outlet = (File, fn(Vec<u8>) -> Frame);

/// The agent's ends of a process's streams.
struct Streams {
    input: Option<File>,
    output: Vec<Outlet>,
    terminal: Option<File>,
}

impl Session {
    /// Starts the process and its threads.
    pub fn start(port: &Port, id: u32, exec: &Exec) -> Result<Self> {
        let mut command = command(exec)?;
        let (child, streams) = match exec.tty {
            Some(size) => spawn_on_terminal(&mut command, size)?,
            None => spawn_on_pipes(&mut command)?,
        };
        let group = Pid::from_child(&child);
        let (done, drained) = mpsc::channel::<()>();
        for (file, frame) in streams.output {
            let (port, done) = (port.clone(), done.clone());
            thread::spawn(move || {
                pump_output(file, &|bytes| port.send(id, frame(bytes)));
                drop(done);
            });
        }
        drop(done);
        let input = streams.input.map(pump_input);
        let ended = Arc::new(AtomicBool::new(false));
        let waiter = (port.clone(), Arc::clone(&ended));
        thread::spawn(move || {
            let exit = wait(child, group, &drained);
            waiter.1.store(true, Ordering::Release);
            waiter.0.send(id, Frame::Exited(exit));
        });
        Ok(Self {
            group,
            ended,
            input,
            terminal: streams.terminal,
        })
    }

    /// Returns true if the process has ended.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Writes to the process's input. Never blocks.
    pub fn input(&mut self, bytes: Vec<u8>) {
        if let Some(input) = &self.input {
            let _ = input.send(bytes); // Fails if the process has closed its input.
        }
    }

    /// Closes the process's input, on a terminal by the end-of-file character.
    pub fn end_input(&mut self) {
        if self.terminal.is_some() {
            self.input(vec![4]);
        } else {
            self.input = None;
        }
    }

    /// Sends a signal to the process group.
    pub fn signal(&self, number: i32) {
        let Some(signal) = Signal::from_named_raw(number) else {
            return;
        };
        if !self.ended() {
            let _ = kill_process_group(self.group, signal);
        }
    }

    /// Sets the terminal's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetwinsize(terminal, winsize((rows, columns)));
        }
    }

    /// Kills the process group.
    pub fn kill(&self) {
        self.signal(Signal::KILL.as_raw());
    }
}

fn command(exec: &Exec) -> Result<Command> {
    let program = exec
        .argv
        .first()
        .context(|| "run an empty command".into())?;
    let mut command = Command::new(program);
    command
        .args(&exec.argv[1..])
        .current_dir(if exec.cwd.is_empty() { "/" } else { &exec.cwd })
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/tmp")
        .env("TERM", "dumb")
        .envs(exec.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().context(|| {
        let folder = command
            .get_current_dir()
            .unwrap_or(std::path::Path::new("/"));
        format!("run {:?} in {}", command.get_program(), folder.display())
    })
}

fn spawn_on_pipes(command: &mut Command) -> Result<(Child, Streams)> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = spawn(command)?;
    let input = child
        .stdin
        .take()
        .map(|pipe| File::from(OwnedFd::from(pipe)));
    let mut output: Vec<Outlet> = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        output.push((File::from(OwnedFd::from(pipe)), Frame::Stdout));
    }
    if let Some(pipe) = child.stderr.take() {
        output.push((File::from(OwnedFd::from(pipe)), Frame::Stderr));
    }
    Ok((
        child,
        Streams {
            input,
            output,
            terminal: None,
        },
    ))
}

fn spawn_on_terminal(command: &mut Command, size: (u16, u16)) -> Result<(Child, Streams)> {
    let what = || "open a pseudo-terminal".to_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let main = openpt(flags).context(what)?;
    grantpt(&main).context(what)?;
    unlockpt(&main).context(what)?;
    tcsetwinsize(&main, winsize(size)).context(what)?;
    let name = ptsname(&main, Vec::new()).context(what)?;
    let open = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let terminal = rustix::fs::open(&name, open, rustix::fs::Mode::empty()).context(what)?;
    let copy = || terminal.try_clone().context(what);
    command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
    // SAFETY: between fork and exec the closure makes two system calls; it does not allocate, lock
    // or touch memory shared with the parent.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    let child = spawn(command)?;
    // Drop the command's copies of the terminal, or reading from it would never end.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let main = File::from(main);
    let copy = || main.try_clone().context(what);
    let streams = Streams {
        input: Some(copy()?),
        output: vec![(copy()?, Frame::Stdout)],
        terminal: Some(main),
    };
    Ok((child, streams))
}

fn winsize((rows, columns): (u16, u16)) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Sends the output of the process until it closes the stream.
fn pump_output(mut from: File, send: &dyn Fn(Vec<u8>)) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => send(buffer[..length].to_vec()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return, // EIO: no process has the terminal open.
        }
    }
}

/// A thread that writes to the process's input, so that a process that does not read blocks no other session.
fn pump_input(mut to: File) -> Sender<Vec<u8>> {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        for bytes in receiver {
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
    });
    sender
}

/// Waits for the process, kills the rest of its group and waits until all output was sent.
fn wait(mut child: Child, group: Pid, drained: &Receiver<()>) -> Exit {
    let status = child.wait();
    let _ = kill_process_group(group, Signal::KILL);
    let _ = drained.recv_timeout(DRAIN); // Disconnected when every stream ended.
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Code(-1),
        },
        Err(_) => Exit::Code(-1),
    }
}
