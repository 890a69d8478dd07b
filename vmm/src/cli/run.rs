//! `ebb run`: builds a machine and runs it to its end.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;

use ebb_vmm::config::{
    ArenaSpec, BalloonConfig, CpusSpec, DiskConfig, KernelEntry, LazyConfig, MachineSpec,
    MemorySpec, SerialConfig, SocketSpec, Toggle,
};
use ebb_vmm::exit;
use ebb_vmm::guardian::Log;
use tracing::Level;

/// Start a guest and stay with it until it ends
///
/// Exit status: 0 guest powered off or stopped, 32 reset, 33 crash, 34 guest panic, 35 bad arguments or a
/// host that cannot run guests.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Guest kernel: a bzImage as distributions ship it, or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// How a bzImage is entered: auto (through the ELF inside it when possible) or image (as it is)
    #[arg(long, value_name = "auto|image", default_value = "auto")]
    kernel_entry: KernelEntry,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// Kernel command line, instead of the default
    #[arg(long, value_name = "TEXT", default_value = MachineSpec::DEFAULT_CMDLINE, allow_hyphen_values = true)]
    cmdline: String,
    /// boot=N: number of vCPUs
    #[arg(long, value_name = "OPTIONS", default_value = "boot=1")]
    cpus: CpusSpec,
    /// size=N[K|M|G|T],thp=on|off,hugepages=on|off,prefault=on|off,shared=on|off
    #[arg(long, value_name = "OPTIONS", default_value = "size=512M")]
    memory: MemorySpec,
    /// size=N[M|G|T],granule=N,id=NAME: memory beside the RAM, /dev/daxN.M in a Linux guest, that is freed and reused
    /// without a call; may be bigger than the host; repeat it for more arenas
    #[arg(long = "arena", value_name = "OPTIONS")]
    arenas: Vec<ArenaSpec>,
    /// path=PATH,readonly=on|off: raw disk image or block device; repeat it for more disks
    #[arg(long = "disk", value_name = "OPTIONS")]
    disks: Vec<DiskConfig>,
    /// tty, null, or file=PATH: the first serial port. In a terminal, Ctrl-A X quits
    #[arg(long, value_name = "WHERE", default_value = "tty")]
    serial: SerialConfig,
    /// size=N,deflate_on_oom=on|off,statistics=SECONDS,free_page_reporting=on|off,reporting=eager|lazy: the lazy balloon
    #[arg(long, value_name = "OPTIONS")]
    balloon: Option<BalloonConfig>,
    /// mode=pressure|eager|age|off,age=SECONDS,pause=MICROSECONDS,slice=RANGES,share=PERCENT: when lazily
    /// freed memory is taken, how long vCPUs may be kept out of the guest for it, and how much of their time it may
    /// cost them. strict=on, alone:
    /// discard it at once, and report who touches it without a reuse
    #[arg(long, value_name = "OPTIONS", default_value = "mode=pressure")]
    lazy: LazyConfig,
    /// Serve the REST API on this unix socket: path=PATH, or the path alone
    #[arg(long, value_name = "PATH", alias = "api-sock")]
    api_socket: Option<SocketSpec>,
    /// on or off: helpers that free the machine's memory and clean up behind the monitor's end, also when it is
    /// killed
    #[arg(long, value_name = "on|off", default_value = "on")]
    guardian: Toggle,
    /// Name of the machine: letters, digits and hyphens
    #[arg(long, default_value = MachineSpec::DEFAULT_ID)]
    id: String,
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Log more: -v for information, -vv for debugging
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Runs the subcommand and returns the exit status.
pub fn main(mut args: Args) -> u8 {
    let (log_file, verbose) = (args.log_file.take(), args.verbose);
    let config = match args.into_spec().validate() {
        Ok(config) => config,
        Err(error) => {
            super::complain(&error);
            return exit::BAD_ARGUMENTS;
        }
    };
    // Only now: a command line with a mistake leaves no file behind.
    let log = match start_log(log_file, verbose) {
        Ok(log) => log,
        Err(error) => {
            super::complain(&error);
            return exit::BAD_ARGUMENTS;
        }
    };
    match ebb_vmm::vm::run(config, &log) {
        Ok(reason) => exit::status(reason),
        Err(error) => {
            super::complain_of(&error);
            exit::BAD_ARGUMENTS
        }
    }
}

impl Args {
    fn into_spec(self) -> MachineSpec {
        MachineSpec {
            id: self.id,
            kernel: self.kernel,
            kernel_entry: self.kernel_entry,
            initramfs: self.initramfs,
            cmdline: self.cmdline,
            cpus: self.cpus,
            memory: self.memory,
            arenas: self.arenas,
            disks: self.disks,
            serial: self.serial,
            balloon: self.balloon,
            lazy: self.lazy,
            api_socket: self.api_socket.map(|socket| socket.0),
            guardian: self.guardian.0,
        }
    }
}

/// Sends the log where the operator wants it.
fn start_log(path: Option<PathBuf>, verbose: u8) -> Result<Log, String> {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let log = tracing_subscriber::fmt().with_max_level(level);
    let Some(path) = path else {
        log.with_writer(std::io::stderr).init();
        return Ok(None);
    };
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(|error| {
            format!(
                "--log-file {}: {error}; name a file that you may write",
                path.display()
            )
        })?;
    let file = Arc::new(file);
    log.with_writer(Arc::clone(&file)).init();
    Ok(Some(file))
}
