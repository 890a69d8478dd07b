//! Connects the terminal of this process to a session in the nested machine.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::error::{Context, Error, Result};
use crate::frame::Exit;
use crate::machine::Machine;
use crate::session::{Command, Event};

/// How often input, the window's size and signals are checked between events.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// Raw mode of the terminal. Dropping it restores the old mode.
struct RawMode(Option<Termios>);

impl RawMode {
    fn enter() -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self(None));
        }
        let what = || "put the terminal into raw mode".to_owned();
        let old = tcgetattr(io::stdin()).context(what)?;
        let mut raw = old.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context(what)?;
        Ok(Self(Some(old)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(old) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, old);
        }
    }
}

/// Runs `command` on a terminal in the machine that is connected to this process's, until it ends.
///
/// # Errors
/// If the terminal or the machine fails, or a signal asks this process to end. The terminal's mode is always restored.
pub fn run(machine: &Machine, command: &Command) -> Result<Exit> {
    let ending = watch_signals()?;
    let mut size = window_size();
    let command = Command {
        tty: Some(size),
        ..command.clone()
    };
    let raw = RawMode::enter()?;
    let mut session = machine.exec(&command)?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut input = Some(read_input(Arc::clone(&stop)));
    let result = loop {
        match session.next_event(CHECK_INTERVAL) {
            Ok(Some(Event::Output(_, bytes))) => {
                let mut out = io::stdout().lock();
                let _ = out.write_all(&bytes).and_then(|()| out.flush());
            }
            Ok(Some(Event::Exited(exit))) => break Ok(exit),
            Ok(None) => {}
            Err(error) => break Err(error),
        }
        if ending.load(Ordering::Relaxed) {
            break Err(Error::new("ended by a signal"));
        }
        let now = window_size();
        if now != size {
            size = now;
            session.resize(size.0, size.1)?;
        }
        match input.as_ref().map(Receiver::try_recv) {
            Some(Ok(bytes)) => session.write_stdin(&bytes)?,
            Some(Err(TryRecvError::Disconnected)) => {
                session.close_stdin()?;
                input = None;
            }
            Some(Err(TryRecvError::Empty)) | None => {}
        }
    };
    stop.store(true, Ordering::Relaxed);
    drop(raw);
    result
}

/// A flag that is set by signals that would otherwise end this process.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP, SIGINT, SIGQUIT] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .context(|| format!("handle signal {signal}"))?;
    }
    Ok(flag)
}

fn window_size() -> (u16, u16) {
    match tcgetwinsize(io::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// A thread that reads standard input until its end or until `stop` is set.
fn read_input(stop: Arc<AtomicBool>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let stdin = io::stdin();
        let mut buffer = [0; 4096];
        while !stop.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(_) => return,
            }
            match rustix::io::read(stdin.as_fd(), &mut buffer) {
                Ok(0) => return,
                Ok(length) if sender.send(buffer[..length].to_vec()).is_err() => return,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
