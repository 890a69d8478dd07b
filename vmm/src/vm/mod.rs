//! The machine: the only place where its parts are wired together.

mod attach;
mod balloon;
mod control;
mod counters;
mod drives;
mod events;
mod instance;
mod machine;
mod memory;
mod metrics_file;
mod nets;
mod pages;
mod pause;
mod restore;
mod snapshot;
mod vsock;
mod waiting;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use crate::api::{ApiError, Front};
use crate::arch::acpi::AcpiError;
use crate::boot::BootError;
use crate::bus::{ExitReason, Overlap};
use crate::config::{MachineConfig, SerialConfig};
use crate::devices::virtio::balloon::BalloonError;
use crate::devices::virtio::blk::DiskError;
use crate::devices::virtio::mmio::TransportError;
use crate::devices::virtio::vsock::VsockError;
use crate::guardian::{Guardian, Watched};
use crate::guest_memory::SetupError;
use crate::kvm::{self, KvmError};
use crate::output::Log;
use crate::reclaim;
use crate::strict;
use crate::sys::tap::TapError;
use crate::sys::{self, Request, Signals, seccomp};
use crate::teardown::Reaper;
use control::Control;
use events::{ExitSlot, end_on_panic};
use instance::{Instance, Service};
use machine::Vm;

pub use restore::{MemorySource, Restoration};
pub use waiting::{Outside, run_when_asked};

/// The machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// KVM cannot do it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory cannot be set up.
    #[error(transparent)]
    Memory(#[from] SetupError),
    /// There is nothing to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap cannot be used.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// The vsock's socket cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The balloon cannot be built.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A virtio device has no queues to work with.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// There are more devices than interrupts.
    #[error("the machine has room for {most} virtio devices; give fewer --disk and --net options")]
    TooManyDevices {
        /// How many there can be.
        most: u32,
    },
    /// The API cannot be served.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Reclaim cannot be started.
    #[error(transparent)]
    Reclaim(#[from] reclaim::StartError),
    /// Strict mode cannot be had.
    #[error(transparent)]
    Strict(#[from] strict::StartError),
    /// Two devices collide: a mistake of ours.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// The serial port's file cannot be written.
    #[error("serial file {path}: {source}; give a writable path with --serial file=")]
    SerialFile {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file for the counters cannot be written.
    #[error("--metrics-path {}: {source}; name a file or FIFO that you may write", path.display())]
    MetricsFile {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// System calls cannot be filtered.
    #[error("this host's kernel has no such filter of system calls; start with --seccomp off")]
    Seccomp(#[source] io::Error),
    /// A system call failed.
    #[error("{what} failed")]
    System {
        /// What it was for.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// A snapshot cannot be restored here.
    #[error("{0}")]
    Snapshot(String),
    /// It was ended while it was being built. No mistake.
    #[error("stopped while it was being built")]
    Stopped,
    /// The main loop failed.
    #[error("the event loop failed")]
    Loop(#[from] event_manager::Error),
}

impl LaunchError {
    fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// What a process is before it knows its machine.
#[derive(Clone, Debug)]
pub struct Process {
    /// Name of the machine.
    pub id: String,
    /// Socket on which the API is served.
    pub api_socket: Option<PathBuf>,
    /// The guest's console may be this terminal.
    pub has_console: bool,
    /// Start the helper processes.
    pub guardian: bool,
    /// As [`MachineConfig::as_firecracker`].
    pub as_firecracker: bool,
    /// Its filters of system calls.
    pub seccomp: seccomp::Mode,
}

impl Process {
    fn of(config: &MachineConfig) -> Self {
        Self {
            id: config.id.clone(),
            api_socket: config.api_socket.clone(),
            has_console: config.serial == SerialConfig::Tty,
            guardian: config.guardian,
            as_firecracker: config.as_firecracker,
            seccomp: config.seccomp,
        }
    }

    /// Prepares this process, which must have one thread, and runs `machine`.
    fn run(
        &self,
        log: &Log,
        machine: impl FnOnce(&'static Guardian, Signals) -> Result<ExitReason, LaunchError>,
    ) -> Result<ExitReason, LaunchError> {
        // The parser of the command line is not needed any more.
        sys::process::shrink();
        seccomp::start(self.seccomp, log.file()).map_err(LaunchError::Seccomp)?;
        let hang_up = if self.as_firecracker {
            Request::End
        } else {
            Request::HangUp
        };
        let signals = Signals::block(hang_up).map_err(LaunchError::system("signalfd"))?;
        kvm::prepare_kicks().map_err(LaunchError::system("sigaction"))?;
        let watched = Watched {
            id: &self.id,
            socket: self.api_socket.as_deref(),
            has_console: self.has_console,
            log,
        };
        let guardian = Guardian::start(self.guardian, &watched);
        let guardian = guardian.map_err(LaunchError::system("mmap"))?;
        if self.as_firecracker {
            guardian.status().leave_sockets();
        }
        // The guardian could be made only while there was one thread.
        let prepared = seccomp::prepare_allocator().map_err(LaunchError::system("thread"));
        let started =
            prepared.and_then(|()| log.start().map_err(LaunchError::system("log thread")));
        let reason = started.and_then(|()| {
            let run = AssertUnwindSafe(|| machine(guardian, signals));
            // While it is built: what there was of it is gone, and nothing is left to the reaper.
            catch_unwind(run).unwrap_or_else(|_| {
                guardian.reaper().into_iter().for_each(Reaper::clear_job);
                Ok(ExitReason::Crash)
            })
        });
        guardian.finish();
        reason
    }
}

/// Builds the machine, from `snapshot` if there is one, runs it until it ends, and frees everything that it used, or leaves its memory to the reaper, which
/// frees it when this process has ended. `log` is where the log goes. The process must have one thread.
///
/// # Errors
/// [`LaunchError`]; nothing is left behind.
pub fn run(
    config: MachineConfig,
    snapshot: Option<Restoration>,
    log: &Log,
) -> Result<ExitReason, LaunchError> {
    Process::of(&config).run(log, |guardian, signals| {
        let exit = ExitSlot::new().map_err(LaunchError::system("eventfd"))?;
        end_on_panic(&exit);
        let instance = Instance::new(config, exit, log)?;
        // Before anything that takes long, so that the operator can look and stop it.
        let front = Front::Machine(Arc::clone(&instance) as _);
        let socket = instance.config.api_socket.as_deref();
        let metrics = instance.config.metrics_listen;
        let service = Service::start(socket, metrics, front, guardian.status())?;
        match Machine::build(&instance, snapshot, guardian, &signals)? {
            Some(machine) => {
                machine.announce(&service);
                machine.run(service, signals, log)
            }
            None => Ok(instance.exit.reason().unwrap_or(ExitReason::Stop)),
        }
    })
}

/// A machine that is built, and waits for its first instruction to be executed or runs already.
struct Machine {
    vm: Vm,
    control: Arc<Control>,
    instance: Arc<Instance>,
    resume: bool,
}

impl Machine {
    /// Builds it; `None` if somebody asks for its end meanwhile.
    fn build(
        instance: &Arc<Instance>,
        snapshot: Option<Restoration>,
        guardian: &'static Guardian,
        signals: &Signals,
    ) -> Result<Option<Self>, LaunchError> {
        let (vm, control) = match Vm::build(instance, snapshot.as_ref(), guardian, signals) {
            Ok(built) => built,
            Err(LaunchError::Stopped) => {
                event!("ending", reason = ?instance.exit.reason().unwrap_or(ExitReason::Stop));
                return Ok(None);
            }
            Err(error) => {
                event!("failed", %error);
                guardian.reaper().into_iter().for_each(Reaper::clear_job);
                return Err(error);
            }
        };
        Ok(Some(Self {
            vm,
            control: Arc::new(control),
            instance: Arc::clone(instance),
            resume: snapshot.is_some_and(|snapshot| snapshot.resume),
        }))
    }

    /// From now on it can be asked for everything.
    fn announce(&self, service: &Service) {
        service.set_machine(Arc::clone(&self.control) as _);
        self.instance.set_running();
        if let Some(metrics) = &self.instance.metrics {
            metrics.set_counters(self.control.counters.clone());
        }
        if self.resume {
            // It fails only when the machine ends already.
            let _ = self.control.pausing.resume();
        }
    }

    /// Runs it to its end.
    fn run(
        mut self,
        service: Service,
        signals: Signals,
        log: &Log,
    ) -> Result<ExitReason, LaunchError> {
        drop(self.control);
        // The hook has reported a panic, and has the machine end for it.
        let metrics = self.instance.metrics.clone();
        let reason = catch_unwind(AssertUnwindSafe(|| self.vm.run(signals, log, metrics)));
        let reason = reason.unwrap_or(Ok(ExitReason::Crash));
        self.vm.shut_down(service);
        if let Some(metrics) = &self.instance.metrics {
            metrics.flush();
            metrics.finish();
        }
        reason
    }
}
