//! The main thread's loop: why the machine ends, signals, console input.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::ExitReason;
use crate::sys::TerminationSignals;

/// Why the machine ends. The first reason counts; everyone may give one.
pub struct ExitSlot {
    reason: OnceLock<ExitReason>,
    event: EventFd,
}

impl ExitSlot {
    /// An empty slot.
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

    /// Ends the machine, unless it is ending already.
    pub fn request(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // The counter is written once: it cannot overflow.
            let _ = self.event.write(1);
        }
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.get().copied()
    }
}

/// Wakes the loop when the slot is filled.
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

/// Runs the loop until the machine ends.
///
/// # Errors
/// The loop itself failed.
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
