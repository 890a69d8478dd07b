//! The main thread's loop: it waits for signals, console input and the end of the machine.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use rustix::event::{EventfdFlags, eventfd};

use super::metrics_file::{INTERVAL, MetricsFile};
use crate::bus::ExitReason;
use crate::output::Log;
use crate::sys::{Request, Signals, Terminal, panic_point};

/// The reason why the machine ends. Any thread may give one; the first counts.
pub struct ExitSlot {
    reason: OnceLock<ExitReason>,
    event: OwnedFd,
}

impl ExitSlot {
    /// Makes an empty slot.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn new() -> io::Result<Arc<Self>> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self {
            reason: OnceLock::new(),
            event,
        }))
    }

    /// Ends the machine for this reason, unless it is ending already.
    pub fn request(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // The event's counter is written once, so it cannot overflow.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Returns the reason; `None` while the machine runs.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.get().copied()
    }
}

impl AsFd for ExitSlot {
    /// Readable when there is a reason.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Why something is not polled that must be.
type Unpolled = Rc<Cell<Option<event_manager::Error>>>;

/// Wakes the loop when there is a reason.
struct Wake {
    exit: Arc<ExitSlot>,
    unpolled: Unpolled,
}

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        register(ops, &self.exit.event, &self.unpolled);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // The loop ends now. The event stays: others wait for it, too.
    }
}

/// Does what signals ask for.
struct SignalHandler {
    signals: Signals,
    log: Log,
    has_terminal: bool,
    exit: Arc<ExitSlot>,
    unpolled: Unpolled,
}

impl SignalHandler {
    fn hang_up(&self) {
        if self.has_terminal && Terminal::is_gone() {
            self.exit.request(ExitReason::Stop);
            return;
        }
        match self.log.reopen() {
            Ok(()) => tracing::info!("SIGHUP: the log file was reopened"),
            Err(error) => tracing::warn!("SIGHUP: the log file cannot be reopened: {error}"),
        }
    }
}

impl MutEventSubscriber for SignalHandler {
    fn init(&mut self, ops: &mut EventOps) {
        register(ops, &self.signals, &self.unpolled);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        match self.signals.take() {
            Ok(Some(Request::End)) => {
                self.exit.request(ExitReason::Stop);
                tracing::info!("a signal asks for the end");
            }
            Ok(Some(Request::HangUp)) => self.hang_up(),
            Ok(None) => {}
            Err(error) => tracing::warn!("signals cannot be read: {error}"),
        }
    }
}

/// From now on the end of a thread by a panic ends the machine, visibly. Only threads whose work others do then are left
/// out: those that share a job (see [`crate::workers`]) and those that carry out one request.
pub fn end_on_panic(exit: &Arc<ExitSlot>) {
    const REPLACED: [&str; 3] = ["ebb-take", "ebb-free", "ebb-api-command"];
    let exit = Arc::clone(exit);
    panic::set_hook(Box::new(move |panic| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("without a name");
        if !REPLACED.iter().any(|replaced| name.starts_with(replaced)) {
            exit.request(ExitReason::Crash);
        }
        event!("thread_panic", thread = name);
        tracing::error!("the thread {name} has panicked: {panic}");
    }));
}

fn register(ops: &mut EventOps, source: &impl AsRawFd, unpolled: &Unpolled) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        unpolled.set(Some(error));
    }
}

/// What the main thread listens to.
pub struct Operator {
    /// Signals.
    pub signals: Signals,
    /// What is reopened when a signal asks for it.
    pub log: Log,
    /// The console is a terminal, with which the machine goes.
    pub has_terminal: bool,
    /// Console input.
    pub console: Option<Box<dyn MutEventSubscriber>>,
    /// What is flushed each minute.
    pub metrics: Option<Arc<MetricsFile>>,
}

/// Flushes the metrics when it is time.
struct Minute {
    file: Arc<MetricsFile>,
    next: Instant,
}

impl Minute {
    /// Flushes them if it is time, and returns the milliseconds until then.
    fn pass(&mut self) -> i32 {
        let now = Instant::now();
        if self.next <= now {
            self.file.flush();
            self.next = now + INTERVAL;
        }
        // One more, or the last of them would pass in short waits.
        let left = self.next.duration_since(now).as_millis() + 1;
        i32::try_from(left).unwrap_or(i32::MAX)
    }
}

/// Runs the loop until the machine ends, and returns the reason.
///
/// # Errors
/// The error of epoll.
pub fn run(exit: &Arc<ExitSlot>, operator: Operator) -> Result<ExitReason, event_manager::Error> {
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    let unpolled = Unpolled::default();
    manager.add_subscriber(Box::new(Wake {
        exit: Arc::clone(exit),
        unpolled: Rc::clone(&unpolled),
    }));
    manager.add_subscriber(Box::new(SignalHandler {
        signals: operator.signals,
        log: operator.log,
        has_terminal: operator.has_terminal,
        exit: Arc::clone(exit),
        unpolled: Rc::clone(&unpolled),
    }));
    // A machine that heard neither signals nor its own end could only be killed.
    if let Some(error) = unpolled.take() {
        return Err(error);
    }
    if let Some(console) = operator.console {
        manager.add_subscriber(console);
    }
    let mut minute = operator.metrics.map(|file| Minute {
        file,
        next: Instant::now(),
    });
    loop {
        if let Some(reason) = exit.reason() {
            return Ok(reason);
        }
        let timeout = minute.as_mut().map_or(-1, Minute::pass);
        manager.run_with_timeout(timeout)?;
        panic_point();
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{WaitOptions, waitpid};

    use super::*;
    use crate::sys::process::fork_for_test;

    #[test]
    fn a_thread_that_nobody_replaces_takes_the_machine_with_it() {
        // In a process of its own: the hook is for all its threads.
        let child = fork_for_test(|| {
            let reason_after = |name: &str| {
                let exit = ExitSlot::new().unwrap();
                end_on_panic(&exit);
                let thread = thread::Builder::new().name(name.to_owned());
                let _ = thread.spawn(|| panic!("on purpose")).unwrap().join();
                exit.reason()
            };
            let [disk, worker] = ["ebb-blk0", "ebb-take1"].map(reason_after);
            u8::from((disk, worker) != (Some(ExitReason::Crash), None))
        });
        let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }
}
