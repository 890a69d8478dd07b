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

use crate::sys::panic_point;
use crate::sys::seccomp::Role;

/// Tells a worker to stop, or to rest.
pub struct StopSignal {
    stopped: AtomicBool,
    paused: AtomicBool,
    event: EventFd,
}

impl StopSignal {
    /// Returns true if the worker has to stop. Cheap enough for inner loops.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Returns true if the worker has to rest: the machine is paused. A worker must have nothing in flight when it calls
    /// [`Poller::wait`] then; see [`Poller::wait_and_settle`].
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
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

    /// Works until [`Poller::wait`] returns false. While the machine is paused, that call does not return: outside of it
    /// a worker may use the guest's memory, inside it must not, nor the kernel on its behalf.
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
            paused: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let ((rests, resting), (resume, resumed)) = (mpsc::channel(), mpsc::channel());
        let poller = Poller::new(Arc::clone(&stop), rests, resumed)?;
        work.watch(&poller)?;
        let (end, ended) = mpsc::channel();
        let job = Box::new(move || {
            panic_point();
            work.run(&poller);
            drop(poller);
            drop(end);
        });
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        match sent {
            Some(Ok(())) => Ok(Worker {
                stop,
                resting,
                resume: Some(resume),
                ended,
            }),
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
    /// Hears that it rests.
    resting: Receiver<()>,
    /// Ends its rest. `None` once it has to stop.
    resume: Option<Sender<()>>,
    /// Hears of nothing but the end.
    ended: Receiver<Infallible>,
}

impl Worker {
    /// Has it rest, and returns when it does: it uses the guest's memory no more.
    pub fn pause(&self) {
        if !self.stop.paused.swap(true, Ordering::AcqRel) {
            self.stop.wake();
            // An error: it has ended.
            let _ = self.resting.recv();
        }
    }

    /// Lets it work again.
    pub fn resume(&self) {
        if self.stop.paused.swap(false, Ordering::AcqRel) {
            // An error: it has ended.
            let _ = self.resume.as_ref().map(|resume| resume.send(()));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.stop();
        self.resume = None;
        let _ = self.ended.recv();
    }
}

/// Waits for descriptors to become readable, or for the stop signal.
pub struct Poller {
    epoll: Epoll,
    stop: Arc<StopSignal>,
    rests: Sender<()>,
    resumed: Receiver<()>,
}

/// The token of the stop signal.
const STOP: u64 = u64::MAX;

impl Poller {
    fn new(stop: Arc<StopSignal>, rests: Sender<()>, resumed: Receiver<()>) -> io::Result<Self> {
        let poller = Self {
            epoll: Epoll::new()?,
            stop,
            rests,
            resumed,
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

    /// As [`watch_arrivals`](Self::watch_arrivals), for a stream: also reports that there is room again for what is written to it, and
    /// its end. Closing it ends that.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn watch_stream(&self, source: &impl AsRawFd, token: u32) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
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
    /// Returns false if the worker has to stop. While it has to rest, this does not return.
    ///
    /// # Panics
    /// epoll_wait(2) fails as it never does. So the machine ends, instead of going on without the device.
    pub fn wait(&self, timeout: Option<Duration>, mut ready: impl FnMut(u32)) -> bool {
        self.wait_with(timeout, |token, _| ready(token), || {})
    }

    /// The same; `ready` also hears whether a stream is closed in both directions.
    ///
    /// # Panics
    /// As for [`wait`](Self::wait).
    pub fn wait_for_streams(
        &self,
        timeout: Option<Duration>,
        ready: impl FnMut(u32, bool),
    ) -> bool {
        self.wait_with(timeout, ready, || {})
    }

    /// As [`wait`](Self::wait), for a worker that has something in flight: before it rests it has to `settle` that.
    ///
    /// # Panics
    /// As for [`wait`](Self::wait).
    pub fn wait_and_settle(&self, timeout: Option<Duration>, settle: impl FnOnce()) -> bool {
        self.wait_with(timeout, |_, _| {}, settle)
    }

    fn wait_with(
        &self,
        timeout: Option<Duration>,
        mut ready: impl FnMut(u32, bool),
        settle: impl FnOnce(),
    ) -> bool {
        let mut events = [EpollEvent::default(); 32];
        // Rounded up, so that a short timeout does not become a busy loop.
        let timeout = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll_wait failed: {error}"),
        };
        if self.stop.is_paused() {
            settle();
            self.rest();
        }
        if self.stop.is_stopped() {
            return false;
        }
        for event in events.iter().take(count) {
            if let Ok(token) = u32::try_from(event.data()) {
                let closed = EventSet::HANG_UP | EventSet::ERROR;
                ready(token, event.event_set().intersects(closed));
            }
        }
        true
    }

    /// Rests until the worker is resumed or has to stop.
    fn rest(&self) {
        // Or it would go on waking the worker later.
        let _ = self.stop.event.read();
        // Both fail only when the worker has to stop.
        let _ = self.rests.send(());
        let _ = self.resumed.recv();
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

    #[test]
    fn a_paused_worker_rests_until_it_is_resumed_or_stopped() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let thread = DeviceThread::spawn("test", Role::Block).unwrap();
        let (sender, receiver) = mpsc::channel();
        let worker = thread.start(Echo(event.try_clone().unwrap(), sender));
        let worker = worker.unwrap();
        for _ in 0..2 {
            // A second call changes nothing.
            worker.pause();
            worker.pause();
            event.write(1).unwrap();
            assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Empty));
            worker.resume();
            worker.resume();
            assert_eq!(receiver.recv(), Ok(7));
        }
        worker.pause();
        event.write(1).unwrap();
        drop(worker);
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
    }

    #[test]
    fn nobody_waits_for_the_rest_of_a_thread_that_has_panicked() {
        let thread = DeviceThread::spawn("test", Role::Block).unwrap();
        let worker = thread.start(Panics).unwrap();
        worker.pause();
        worker.resume();
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
