//! The main thread's loop: it waits for signals, console input and the end of the machine.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::ExitReason;
use crate::sys::TerminationSignals;

/// The reason why the machine ends. Any thread may give one; the first counts.
pub struct ExitSlot {
    reason: OnceLock<ExitReason>,
    event: EventFd,
}

impl ExitSlot {
    /// Makes an empty slot.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Self {
            reason: OnceLock::new(),
            event,
        }))
    }

    /// Ends the machine for this reason, unless it is ending already.
    pub fn request(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // The event's counter is written once, so it cannot overflow.
            let _ = self.event.write(1);
        }
    }

    /// Returns the reason; `None` while the machine runs.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.get().copied()
    }
}

/// Wakes the loop when there is a reason.
struct Wake(Arc<ExitSlot>);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        register(ops, &self.0.event, "exit event");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.event.read();
    }
}

/// Ends the machine on a termination signal.
struct Signals {
    signals: TerminationSignals,
    exit: Arc<ExitSlot>,
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        register(ops, &self.signals, "signals");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        match self.signals.take() {
            Ok(Some(signal)) => {
                tracing::info!("signal {signal}: stopping");
                self.exit.request(ExitReason::Stop);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!("signals cannot be read: {error}"),
        }
    }
}

fn register(ops: &mut EventOps, source: &impl AsRawFd, what: &str) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        tracing::error!("{what} cannot be polled: {error}");
    }
}

/// Runs the loop until the machine ends, and returns the reason.
///
/// # Errors
/// The error of epoll.
pub fn run(
    exit: &Arc<ExitSlot>,
    signals: TerminationSignals,
    console: Option<Box<dyn MutEventSubscriber>>,
) -> Result<ExitReason, event_manager::Error> {
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    manager.add_subscriber(Box::new(Wake(Arc::clone(exit))));
    manager.add_subscriber(Box::new(Signals {
        signals,
        exit: Arc::clone(exit),
    }));
    if let Some(console) = console {
        manager.add_subscriber(console);
    }
    loop {
        if let Some(reason) = exit.reason() {
            return Ok(reason);
        }
        manager.run()?;
    }
}
