//! A process that serves the API before it has a machine (Firecracker mode). The first thread owns what clients have asked for,
//! and answers them until one asks for the start.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::events::{ExitSlot, end_on_panic};
use super::instance::{Instance, Service};
use super::{LaunchError, Machine, Process, Restoration};
use crate::api::before::{self, Draft, LoadSpec, LoggerSpec, Step};
use crate::api::{Ask, Asks, Fault, Front, Reply, waiting};
use crate::bus::ExitReason;
use crate::config::MachineConfig;
use crate::guardian::Guardian;
use crate::output::Log;
use crate::sys::Signals;

/// What the machine's process can do for its clients that the machine does not.
pub trait Outside {
    /// Changes where the log goes, and what is in it.
    ///
    /// # Errors
    /// What is wrong, for the client.
    fn set_logger(&self, logger: &LoggerSpec) -> Result<(), String>;

    /// Reads a snapshot, and describes its machine.
    ///
    /// # Errors
    /// What is wrong, for the client.
    fn load(&self, load: LoadSpec) -> Result<(MachineConfig, Restoration), String>;
}

/// Serves the API until a client asks for the start of what `draft` has become, or of a snapshot, and runs that machine as
/// [`super::run`] does. The process must have one thread.
///
/// # Errors
/// [`LaunchError`]. A machine that cannot be built is the client's to hear of, and no error here.
pub fn run_when_asked(
    process: &Process,
    draft: Draft,
    outside: &dyn Outside,
    log: &Log,
) -> Result<ExitReason, LaunchError> {
    process.run(log, |guardian, signals| {
        let exit = ExitSlot::new().map_err(LaunchError::system("eventfd"))?;
        end_on_panic(&exit);
        let (asker, asks) = waiting().map_err(LaunchError::system("eventfd"))?;
        let socket = process.api_socket.as_deref();
        let service = Service::start(socket, None, Front::Waiting(asker), guardian.status())?;
        let mut waiting = Waiting {
            draft,
            outside,
            guardian,
            exit,
            log,
        };
        match waiting.wait(asks, &signals, &service)? {
            Some(machine) => machine.run(service, signals, log),
            None => Ok(waiting.exit.reason().unwrap_or(ExitReason::Stop)),
        }
    })
}

struct Waiting<'a> {
    draft: Draft,
    outside: &'a dyn Outside,
    guardian: &'static Guardian,
    exit: Arc<ExitSlot>,
    log: &'a Log,
}

impl Waiting<'_> {
    /// Answers requests until there is a machine; `None` if the process shall end before that.
    fn wait(
        &mut self,
        asks: Asks,
        signals: &Signals,
        service: &Service,
    ) -> Result<Option<Machine>, LaunchError> {
        loop {
            let fds = [signals.as_fd(), asks.as_fd(), self.exit.as_fd()];
            let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(LaunchError::system("poll")(error.into())),
            }
            if self.exit.reason().is_some() || !matches!(signals.take(), Ok(None)) {
                return Ok(None);
            }
            while let Some(ask) = asks.take() {
                if let Some(machine) = self.answer(ask, signals, service) {
                    return Ok(machine);
                }
            }
        }
    }

    /// Answers a request. Returns the machine if that is built now; nothing in it if it was ended while it was built.
    fn answer(
        &mut self,
        ask: Ask,
        signals: &Signals,
        service: &Service,
    ) -> Option<Option<Machine>> {
        let started = match before::step(&mut self.draft, &ask) {
            Ok(Step::Start(config)) => self.build(*config, None, signals, service),
            Ok(Step::Load(load)) => self.load(load, signals, service),
            Ok(Step::Logger(logger)) => {
                let set = self.outside.set_logger(&logger);
                ask.answer(set.map(|()| Reply::Done).map_err(Fault::bad_request));
                return None;
            }
            Ok(Step::Reply(reply)) => {
                ask.answer(Ok(reply));
                return None;
            }
            Err(fault) => {
                ask.answer(Err(fault));
                return None;
            }
        };
        match started {
            Ok(Some(machine)) => {
                machine.announce(service);
                ask.answer(Ok(Reply::Done));
                Some(Some(machine))
            }
            Ok(None) => Some(None),
            Err(message) => {
                ask.answer(Err(Fault::bad_request(message)));
                None
            }
        }
    }

    fn load(
        &self,
        load: LoadSpec,
        signals: &Signals,
        service: &Service,
    ) -> Result<Option<Machine>, String> {
        let (config, snapshot) = self.outside.load(load)?;
        let process = self.draft.process();
        let config = MachineConfig {
            id: process.id.clone(),
            api_socket: process.api_socket.clone(),
            as_firecracker: true,
            ..config
        };
        self.build(config, Some(snapshot), signals, service)
    }

    fn build(
        &self,
        config: MachineConfig,
        snapshot: Option<Restoration>,
        signals: &Signals,
        service: &Service,
    ) -> Result<Option<Machine>, String> {
        let instance = Instance::new(config, Arc::clone(&self.exit), self.log);
        let built = instance.and_then(|instance| {
            // From now on it answers for itself.
            service.set_instance(Some(&instance));
            Machine::build(&instance, snapshot, self.guardian, signals)
        });
        built.map_err(|error| {
            service.set_instance(None);
            with_causes(&error)
        })
    }
}

/// An error and its causes in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(&format!(": {error}"));
        cause = error.source();
    }
    line
}
