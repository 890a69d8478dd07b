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
mod pause;
mod restore;
mod snapshot;
mod vsock;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::api::ApiError;
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
use crate::sys::{self, Signals, seccomp};
use crate::teardown::Reaper;
use events::{ExitSlot, end_on_panic};
use instance::{Instance, Service};
use machine::Vm;
use metrics_file::MetricsFile;

pub use restore::Restoration;

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
    // The parser of the command line is not needed any more.
    sys::process::shrink();
    seccomp::start(config.seccomp, log.file()).map_err(LaunchError::Seccomp)?;
    let signals = Signals::block().map_err(LaunchError::system("signalfd"))?;
    kvm::prepare_kicks().map_err(LaunchError::system("sigaction"))?;
    let socket = config.api_socket.as_deref();
    let machine = Watched {
        id: &config.id,
        socket,
        vsock: config.vsock.as_ref().map(|vsock| vsock.path.as_path()),
        has_console: config.serial == SerialConfig::Tty,
        log,
    };
    let guardian = Guardian::start(config.guardian, &machine);
    let guardian = guardian.map_err(LaunchError::system("mmap"))?;
    // The guardian could be made only while there was one thread.
    let prepared = seccomp::prepare_allocator().map_err(LaunchError::system("thread"));
    let started = prepared.and_then(|()| log.start().map_err(LaunchError::system("log thread")));
    let reason = started.and_then(|()| build_and_run(config, snapshot, guardian, signals, log));
    guardian.finish();
    reason
}

fn build_and_run(
    config: MachineConfig,
    snapshot: Option<Restoration>,
    guardian: &'static Guardian,
    signals: Signals,
    log: &Log,
) -> Result<ExitReason, LaunchError> {
    let exit = ExitSlot::new().map_err(LaunchError::system("eventfd"))?;
    end_on_panic(&exit);
    let metrics = config.metrics_path.as_deref().map(start_metrics);
    let metrics = metrics.transpose()?;
    let instance = Instance::new(config, Arc::clone(&exit), log, metrics.clone());
    let instance = Arc::new(instance);
    // Before anything that takes long, so that the operator can look and stop it.
    let socket = instance.config.api_socket.as_deref();
    let service = Service::start(socket, &instance, guardian.status())?;
    let (mut vm, control) = match Vm::build(&instance, snapshot.as_ref(), guardian, &signals) {
        Ok(built) => built,
        Err(LaunchError::Stopped) => return Ok(exit.reason().unwrap_or(ExitReason::Stop)),
        Err(error) => {
            guardian.reaper().into_iter().for_each(Reaper::clear_job);
            return Err(error);
        }
    };
    let control = Arc::new(control);
    service.set_machine(Arc::clone(&control) as _);
    instance.set_running();
    if let Some(metrics) = &metrics {
        metrics.set_counters(control.counters.clone());
    }
    if snapshot.is_some_and(|snapshot| snapshot.resume) {
        // It fails only when the machine ends already.
        let _ = control.pausing.resume();
    }
    drop(control);
    // The hook has reported a panic, and has the machine end for it.
    let reason = catch_unwind(AssertUnwindSafe(|| vm.run(signals, log, metrics.clone())));
    let reason = reason.unwrap_or(Ok(ExitReason::Crash));
    vm.shut_down(service);
    if let Some(metrics) = metrics {
        metrics.flush();
        metrics.finish();
    }
    reason
}

fn start_metrics(path: &Path) -> Result<Arc<MetricsFile>, LaunchError> {
    let path_of = |source| LaunchError::MetricsFile {
        path: path.to_owned(),
        source,
    };
    MetricsFile::start(path).map(Arc::new).map_err(path_of)
}
