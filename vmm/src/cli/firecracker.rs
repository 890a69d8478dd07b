//! `ebb firecracker`: the flags, the API and the exit codes of Firecracker.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_vmm::api::FIRECRACKER_VERSION;
use ebb_vmm::api::before::{self, Draft, LoadSpec, LoggerSpec, Step};
use ebb_vmm::bus::ExitReason;
use ebb_vmm::config::{MachineConfig, check_id};
use ebb_vmm::exit;
use ebb_vmm::output::{EventFile, EventTarget, Log, for_log};
use ebb_vmm::snapshot::VERSION;
use ebb_vmm::sys::seccomp::{self, Mode};
use ebb_vmm::vm::{self, LaunchError, Outside, Process, Restoration};
use serde_json::Value;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::{outputs, restore};

/// The machine could not be built or served.
const GENERIC_ERROR: u8 = 1;
/// The configuration file is wrong.
const BAD_CONFIGURATION: u8 = 152;
/// The arguments are wrong.
pub const ARGUMENTS: u8 = 153;

/// Be a drop-in for Firecracker: serve its API, and start the machine that a client asks for
///
/// A program of the name `firecracker` is this command. Exit status, Firecracker's: 0 the guest powered off or was reset, or a signal ended the machine; 1 it crashed, or the
/// API cannot be served; 152 wrong configuration file, 153 wrong arguments; and 37 as of `ebb run`.
#[derive(Debug, clap::Args)]
#[command(disable_version_flag = true)]
pub struct Args {
    /// Serve the API on this unix socket
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Name of the machine: letters, digits and hyphens
    #[arg(long, value_name = "NAME", default_value = "anonymous-instance")]
    id: String,
    /// Start the machine that this file describes, in Firecracker's JSON
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Serve no API; only with --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Write the log to this file or FIFO instead of standard error
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// What the log holds: Off, Error, Warn, Info, Debug or Trace
    #[arg(long, value_name = "LEVEL", default_value = "Warn", value_parser = before::log_level)]
    level: tracing::Level,
    /// Accepted: lines always have their level
    #[arg(long)]
    show_level: bool,
    /// Accepted: lines always say where they come from
    #[arg(long)]
    show_log_origin: bool,
    /// Accepted, without effect
    #[arg(long, value_name = "NAME")]
    module: Option<String>,
    /// Append the counters to this file or FIFO
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// Ebb's: append what happens to the machine to this file, FIFO or open descriptor, as JSON in lines
    #[arg(long, value_name = "FILE|fd=N")]
    event_monitor: Option<EventTarget>,
    /// Threads may make all system calls
    #[arg(long)]
    no_seccomp: bool,
    /// Accepted, without effect: the filters are Ebb's own, for its own threads
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    seccomp_filter: Option<PathBuf>,
    /// Devices are on a PCI bus, with MSI-X
    #[arg(long)]
    enable_pci: bool,
    /// Accepted, without effect: there is no timer device
    #[arg(long)]
    boot_timer: bool,
    /// Refused: there is no metadata service
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Accepted, without effect
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<u64>,
    /// Accepted, without effect: a body may have 64 KiB
    #[arg(long, value_name = "BYTES")]
    http_api_max_payload_size: Option<u64>,
    /// Accepted, without effect
    #[arg(long, value_name = "US")]
    start_time_us: Option<u64>,
    /// Accepted, without effect
    #[arg(long, value_name = "US")]
    start_time_cpu_us: Option<u64>,
    /// Accepted, without effect
    #[arg(long, value_name = "US")]
    parent_cpu_time_us: Option<u64>,
    /// Print the version of the snapshots that are made and loaded; they are Ebb's own
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of this snapshot's state file
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
    /// Print the version of Firecracker whose API this is, and Ebb's
    #[arg(short = 'V', long)]
    version: bool,
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: &Args) -> u8 {
    if args.version {
        let ebb = env!("CARGO_PKG_VERSION");
        super::say(&format!("Firecracker v{FIRECRACKER_VERSION}\n\nEbb {ebb}"));
        return 0;
    }
    if args.snapshot_version {
        super::say(&snapshot_version());
        return 0;
    }
    if let Some(path) = &args.describe_snapshot {
        return describe_snapshot(path);
    }
    let checked = check_id(&args.id).map_err(|error| error.to_string());
    if let Err(message) = checked.and_then(|()| refuse(args)) {
        super::complain(&message);
        return ARGUMENTS;
    }
    let log = match ProcessLog::start(args) {
        Ok(log) => log,
        Err(message) => {
            super::complain(&message);
            return ARGUMENTS;
        }
    };
    let ended = match &args.config_file {
        None => run_when_asked(args, &log),
        Some(path) => match configured(args, path, &log) {
            Ok(config) => vm::run(config, None, &log.log),
            Err(message) => {
                super::complain(&format!("--config-file {}: {message}", path.display()));
                return BAD_CONFIGURATION;
            }
        },
    };
    log.log.finish();
    match ended {
        Ok(reason) => exit::firecracker_status(reason),
        Err(error) => {
            super::complain_of(&error);
            match args.config_file {
                Some(_) if !matches!(error, LaunchError::Api(_)) => BAD_CONFIGURATION,
                _ => GENERIC_ERROR,
            }
        }
    }
}

/// In three numbers, as clients read it.
fn snapshot_version() -> String {
    format!("v{VERSION}.0.0")
}

/// A file that can be read has the one version that there is.
fn describe_snapshot(path: &Path) -> u8 {
    match restore::read_state(path) {
        Ok(_) => {
            super::say(&snapshot_version());
            0
        }
        Err(message) => {
            super::complain(&message);
            GENERIC_ERROR
        }
    }
}

fn refuse(args: &Args) -> Result<(), String> {
    match &args.metadata {
        None => Ok(()),
        Some(path) => Err(format!(
            "--metadata {}: there is no metadata service; give the guest its data by the kernel's command line, a drive or the vsock",
            path.display()
        )),
    }
}

/// What is known of the machine beside what clients ask for.
fn draft(args: &Args) -> Draft {
    // Who may say what the machine is made of may name any file.
    let mut words = vec!["--allow-paths=/".to_owned()];
    if args.no_seccomp {
        words.push("--seccomp=off".to_owned());
    }
    let transport = if args.enable_pci { "pci" } else { "mmio" };
    words.push(format!("--transport={transport}"));
    let metrics = args.metrics_path.as_ref();
    words.extend(metrics.map(|path| format!("--metrics-path={}", path.display())));
    Draft::new(before::Process {
        id: args.id.clone(),
        api_socket: (!args.no_api).then(|| args.api_sock.clone()),
        words,
    })
}

fn run_when_asked(args: &Args, log: &ProcessLog) -> Result<ExitReason, LaunchError> {
    let process = Process {
        id: args.id.clone(),
        api_socket: Some(args.api_sock.clone()),
        has_console: true,
        guardian: true,
        as_firecracker: true,
        seccomp: if args.no_seccomp { Mode::Off } else { Mode::On },
    };
    vm::run_when_asked(&process, draft(args), log, &log.log)
}

/// The machine of a configuration file.
fn configured(args: &Args, path: &Path, log: &ProcessLog) -> Result<MachineConfig, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("{error}; name a file that you may read"))?;
    let file: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let mut draft = draft(args);
    for (request, body) in before::requests_of(file)? {
        let step = before::put(&mut draft, &request, &body);
        let what = request.trim_start_matches('/');
        match step.map_err(|fault| format!("{what}: {fault}"))? {
            Step::Logger(logger) => log.set_logger(&logger)?,
            Step::Reply(_) => {}
            Step::Start(_) | Step::Load(_) => {
                return Err(format!("{what}: not possible in a file; remove it"));
            }
        }
    }
    draft.finished().map_err(|fault| fault.to_string())
}

/// The log, which a client may move.
struct ProcessLog {
    log: Log,
    level: reload::Handle<LevelFilter, tracing_subscriber::Registry>,
}

impl ProcessLog {
    /// Sends the log where the operator wants it.
    fn start(args: &Args) -> Result<Self, String> {
        let log = Log::to_stderr();
        let (filter, level) = reload::Layer::new(LevelFilter::from_level(args.level));
        let lines = tracing_subscriber::fmt::layer().with_writer(Arc::new(log.clone()));
        let events = outputs::open_events(args.event_monitor.as_ref(), &args.id, &log)?;
        tracing_subscriber::registry()
            .with(lines.with_filter(for_log(filter)))
            .with(events.map(EventFile::layer))
            .init();
        let log = Self { log, level };
        log.set_logger(&LoggerSpec {
            path: args.log_path.clone(),
            level: None,
        })?;
        Ok(log)
    }
}

impl Outside for ProcessLog {
    fn set_logger(&self, logger: &LoggerSpec) -> Result<(), String> {
        if let Some(path) = &logger.path {
            let moved = self.log.move_to(path);
            moved.map_err(|error| {
                format!(
                    "log {}: {error}; name a file that you may write",
                    path.display()
                )
            })?;
            self.log.file().into_iter().for_each(seccomp::report_to);
        }
        if let Some(level) = logger.level {
            // It is there as long as the process.
            let _ = self.level.reload(LevelFilter::from_level(level));
        }
        Ok(())
    }

    fn load(&self, load: LoadSpec) -> Result<(MachineConfig, Restoration), String> {
        restore::load(load)
    }
}
