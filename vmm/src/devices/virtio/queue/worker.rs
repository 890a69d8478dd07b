//! The thread on which a device works between activation and reset.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::sys::seccomp::Role;

/// Tells a worker to stop.
pub struct StopSignal {
    stopped: AtomicBool,
    event: EventFd,
}

impl StopSignal {
    /// Returns true if the worker has to stop. Cheap enough for inner loops.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // The counter can only be full when it is readable anyway.
        let _ = self.event.write(1);
    }
}

/// What a device does on its thread.
pub trait Work: Send + 'static {
    /// Registers everything that wakes the worker. Called before the thread begins with it.
    ///
    /// # Errors
    /// The error of [`Poller::watch`].
    fn watch(&self, poller: &Poller) -> io::Result<()>;

    /// Works until [`Poller::wait`] returns false.
    fn run(self, poller: &Poller);
}

/// A thread of a device, which does one piece of work after the other. It is there before the guest runs: devices are
/// activated by the threads of vCPUs, and these need not be able to start a thread. Dropping this joins it.
pub struct DeviceThread {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl DeviceThread {
    /// Starts a thread called `name` (at most 15 bytes of it are visible) that makes the system calls of `role` only.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn spawn(name: &str, role: Role) -> io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let run = move || {
            role.enter();
            todo.into_iter().for_each(|job| job());
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Has the thread do `work`, once it is done with what it had to do before.
    ///
    /// # Errors
    /// The error of the system call that failed; `BrokenPipe` if the thread has panicked.
    pub fn start(&self, work: impl Work) -> io::Result<Worker> {
        let stop = Arc::new(StopSignal {
            stopped: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let poller = Poller::new(Arc::clone(&stop))?;
        work.watch(&poller)?;
        let (end, ended) = mpsc::channel();
        let job = Box::new(move || {
            work.run(&poller);
            drop(poller);
            drop(end);
        });
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        match sent {
            Some(Ok(())) => Ok(Worker { stop, ended }),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let name = thread.thread().name().unwrap_or("worker").to_owned();
            if thread.join().is_err() {
                tracing::error!("{name} panicked");
            }
        }
    }
}

/// Work that a [`DeviceThread`] does. Dropping this stops it, and waits until nothing of it is left.
pub struct Worker {
    stop: Arc<StopSignal>,
    /// Hears of nothing but the end.
    ended: Receiver<Infallible>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.stop();
        let _ = self.ended.recv();
    }
}

/// Waits for descriptors to become readable, or for the stop signal.
pub struct Poller {
    epoll: Epoll,
    stop: Arc<StopSignal>,
}

/// The token of the stop signal.
const STOP: u64 = u64::MAX;

impl Poller {
    fn new(stop: Arc<StopSignal>) -> io::Result<Self> {
        let poller = Self {
            epoll: Epoll::new()?,
            stop,
        };
        poller.register(poller.stop.event.as_raw_fd(), EventSet::IN, STOP)?;
        Ok(poller)
    }

    /// Watches `source`; [`wait`](Self::wait) reports it as `token`. It must stay open for as long as the poller is used.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn watch(&self, source: &impl AsRawFd, token: u32) -> io::Result<()> {
        self.register(source.as_raw_fd(), EventSet::IN, token.into())
    }

    /// As [`watch`](Self::watch), for a source that may stay readable: it is reported once each time that more arrives.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn watch_arrivals(&self, source: &impl AsRawFd, token: u32) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.register(source.as_raw_fd(), events, token.into())
    }

    fn register(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
    }

    /// The stop signal.
    #[must_use]
    pub fn stop(&self) -> &StopSignal {
        &self.stop
    }

    /// Waits for at most `timeout` (`None`: for ever) and calls `ready` with the token of each readable source.
    /// Returns false if the worker has to stop.
    ///
    /// # Panics
    /// epoll_wait(2) fails as it never does. So the machine ends, instead of going on without the device.
    pub fn wait(&self, timeout: Option<Duration>, mut ready: impl FnMut(u32)) -> bool {
        let mut events = [EpollEvent::default(); 8];
        // Rounded up, so that a short timeout does not become a busy loop.
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll_wait failed: {error}"),
        };
        if self.stop.is_stopped() {
            return false;
        }
        for token in events.iter().take(count).map(EpollEvent::data) {
            if let Ok(token) = u32::try_from(token) {
                ready(token);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(EventFd, mpsc::Sender<u32>);

    impl Work for Echo {
        fn watch(&self, poller: &Poller) -> io::Result<()> {
            poller.watch(&self.0, 7)
        }

        fn run(self, poller: &Poller) {
            while poller.wait(None, |token| {
                self.0.read().unwrap();
                self.1.send(token).unwrap();
            }) {}
        }
    }

    #[test]
    fn a_worker_hears_its_events_and_is_waited_for() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let thread = DeviceThread::spawn("test", Role::Block).unwrap();
        let patience = Duration::from_secs(10);
        for _ in 0..2 {
            let (sender, receiver) = mpsc::channel();
            let echo = Echo(event.try_clone().unwrap(), sender);
            let worker = thread.start(echo).unwrap();
            event.write(1).unwrap();
            assert_eq!(receiver.recv_timeout(patience), Ok(7));
            drop(worker);
            let gone = Err(mpsc::TryRecvError::Disconnected);
            assert_eq!(receiver.try_recv(), gone);
        }
    }

    struct Panics;

    impl Work for Panics {
        fn watch(&self, _: &Poller) -> io::Result<()> {
            Ok(())
        }

        fn run(self, _: &Poller) {
            panic!("on purpose");
        }
    }

    #[test]
    fn nobody_waits_for_a_thread_that_has_panicked() {
        let thread = DeviceThread::spawn("test", Role::Block).unwrap();
        drop(thread.start(Panics).unwrap());
        let again = loop {
            // The work is over a little before the thread.
            if let Err(error) = thread.start(Panics) {
                break error;
            }
        };
        assert_eq!(again.kind(), io::ErrorKind::BrokenPipe);
    }
}
