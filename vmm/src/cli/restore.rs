//! `ebb restore`: starts a machine from a snapshot.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Parser;
use ebb_vmm::api::before::{LoadMemory, LoadSpec};
use ebb_vmm::config::{MachineConfig, MachineSpec, SerialConfig, SocketSpec};
use ebb_vmm::exit;
use ebb_vmm::snapshot::{self, DiskFile, FileError, PageServer, State};
use ebb_vmm::vm::{MemorySource, Restoration};

use super::outputs::Outputs;
use super::run;

/// No state file is longer: a machine of 254 vCPUs has 20 MiB.
const MAX_STATE: u64 = 256 << 20;

/// Start a machine from a snapshot
///
/// It has the options of the machine that was saved, and is paused unless --resume is given. Exit status: as of `ebb run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The snapshot's state file
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// The snapshot's memory file. It must stay as it is while the machine runs. For a difference repeat the option: the full
    /// one first, then each difference, this one's own last
    #[arg(long, value_name = "FILE", required_unless_present = "page_server")]
    memory: Vec<PathBuf>,
    /// Instead of the memory file, the socket of a page server in Firecracker's protocol. It must serve as long as the machine runs
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["memory", "verify"])]
    page_server: Option<PathBuf>,
    /// Let the guest run at once
    #[arg(long)]
    resume: bool,
    /// First read all of the memory files and compare their checksums
    #[arg(long)]
    verify: bool,
    /// Serve the REST API on this unix socket
    #[arg(long, value_name = "PATH|path=PATH", alias = "api-sock")]
    api_socket: Option<SocketSpec>,
    /// Another file for disk number N, the first is 0: a copy that was made at the time of the snapshot
    #[arg(long = "disk", value_name = "N=PATH")]
    disks: Vec<Override<PathBuf>>,
    /// Another tap for network interface number N, the first is 0
    #[arg(long = "tap", value_name = "N=NAME")]
    taps: Vec<Override<String>>,
    /// Another path for the vsock's socket
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// The same, for interfaces by name.
    #[arg(skip)]
    named_taps: Vec<(String, String)>,
    /// Where the first serial port goes, if elsewhere
    #[arg(long, value_name = "tty|null|file=PATH")]
    serial: Option<SerialConfig>,
    /// Another name of the machine
    #[arg(long, value_name = "NAME")]
    id: Option<String>,
    #[command(flatten)]
    outputs: Outputs,
}

/// Something else for the device of this number.
#[derive(Clone, Debug)]
struct Override<T> {
    index: usize,
    value: T,
}

impl<T: FromStr> FromStr for Override<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.split_once('=');
        let parsed =
            split.and_then(|(index, value)| Some((index.parse().ok()?, value.parse().ok()?)));
        let (index, value) =
            parsed.ok_or("write a number, = and the other value, for instance 0=copy.raw")?;
        Ok(Self { index, value })
    }
}

/// Runs the subcommand and returns the exit status.
pub fn main(args: Args) -> u8 {
    let outputs = args.outputs.clone();
    match prepare(args) {
        Ok((config, snapshot)) => run::start(config, Some(snapshot), outputs),
        Err(message) => {
            super::complain(&message);
            exit::BAD_ARGUMENTS
        }
    }
}

/// What a client of Firecracker's API asks for.
///
/// # Errors
/// What is wrong with the snapshot, or on this host.
pub fn load(load: LoadSpec) -> Result<(MachineConfig, Restoration), String> {
    let (memory, page_server) = match load.memory {
        LoadMemory::File(path) => (vec![path], None),
        LoadMemory::Server(path) => (Vec::new(), Some(path)),
    };
    prepare(Args {
        state: load.state,
        memory,
        page_server,
        resume: load.resume,
        verify: false,
        api_socket: None,
        disks: Vec::new(),
        taps: Vec::new(),
        vsock: load.vsock,
        named_taps: load.taps,
        serial: None,
        id: None,
        outputs: Outputs::default(),
    })
}

/// Reads a state file.
///
/// # Errors
/// It cannot be read, or is none of this version.
pub fn read_state(path: &Path) -> Result<State, String> {
    let refuse = |what: String| FileError::new(path, what).to_string();
    let mut content = Vec::new();
    let file = snapshot::open(path).map_err(|error| error.to_string())?;
    let read = file.take(MAX_STATE).read_to_end(&mut content);
    read.map_err(|error| refuse(error.to_string()))?;
    State::decode(&content).map_err(|error| refuse(error.to_string()))
}

/// Checks everything that can be checked before a machine is built.
fn prepare(args: Args) -> Result<(MachineConfig, Restoration), String> {
    let (state, memory) = match &args.page_server {
        None => {
            let (state, files) = read(&args.state, &args.memory, args.verify)?;
            (state, MemorySource::Files(files))
        }
        Some(path) => served(&args.state, path)?,
    };
    let config = config(&args, &state)?;
    check_disks(&args, &state, &config)?;
    let resume = args.resume;
    Ok((
        config,
        Restoration {
            state,
            memory,
            resume,
        },
    ))
}

/// A snapshot's state, and the page server that has its memory.
fn served(state: &Path, path: &Path) -> Result<(State, MemorySource), String> {
    let decoded = read_state(state)?;
    let files = decoded.memory.files();
    if files > 1 {
        let what = format!(
            "is of {files} memory files, but a page server serves one; make that by `ebb merge`"
        );
        return Err(FileError::new(state, what).to_string());
    }
    let server = PageServer::connect(path).map_err(|error| error.to_string())?;
    Ok((decoded, MemorySource::Server(Arc::new(server))))
}

/// A snapshot's state, and the memory files, which fit to it; with `verify` their checksums do, too.
///
/// # Errors
/// What is wrong with one of them, and its name.
pub fn read(
    state: &Path,
    memory: &[PathBuf],
    verify: bool,
) -> Result<(State, Vec<Arc<File>>), String> {
    let decoded = read_state(state)?;
    let map = &decoded.memory;
    let (due, given) = (map.files(), memory.len());
    if due != given {
        let what = format!(
            "is of {due} memory files, but {given} given; name each by --memory, the full one first, and its own last"
        );
        return Err(FileError::new(state, what).to_string());
    }
    let open = |(index, path): (usize, &PathBuf)| {
        let file = snapshot::open(path)?;
        let checked = map.check(index, &file, verify);
        checked.map_err(|error| FileError::new(path, error))?;
        Ok(Arc::new(file))
    };
    let files = memory.iter().enumerate().map(open);
    let files: Result<Vec<_>, FileError> = files.collect();
    let files = files.map_err(|error| error.to_string())?;
    Ok((decoded, files))
}

/// The saved machine's options, and those that are given now.
fn config(args: &Args, state: &State) -> Result<MachineConfig, String> {
    let spec = Saved::try_parse_from(&state.words);
    let mut spec = spec
        .map_err(|error| format!("{}: {}", args.state.display(), super::one_line(&error)))?
        .machine;
    for it in &args.disks {
        let missing = || format!("--disk {}=: the saved machine has no such disk", it.index);
        let disk = spec.disks.get_mut(it.index).ok_or_else(missing)?;
        disk.path.clone_from(&it.value);
    }
    for it in &args.taps {
        let missing = || {
            format!(
                "--tap {}=: the saved machine has no such interface",
                it.index
            )
        };
        let net = spec.nets.get_mut(it.index).ok_or_else(missing)?;
        (net.tap, net.fd) = (Some(it.value.clone()), None);
    }
    if let Some(path) = &args.vsock {
        let missing = "--vsock: the saved machine has none";
        spec.vsock.as_mut().ok_or(missing)?.path.clone_from(path);
    }
    for (name, tap) in &args.named_taps {
        let mut nets = spec.nets.iter_mut().enumerate();
        let missing = || format!("the saved machine has no interface {name}");
        let (_, net) = nets
            .find(|(index, net)| net.name(*index) == *name)
            .ok_or_else(missing)?;
        (net.tap, net.fd) = (Some(tap.clone()), None);
    }
    spec.api_socket.clone_from(&args.api_socket);
    // The machine that was saved may still have it.
    spec.metrics_listen = None;
    if let Some(serial) = &args.serial {
        spec.serial.clone_from(serial);
    }
    if let Some(id) = &args.id {
        spec.id.clone_from(id);
    }
    // The kernel is in the guest's memory already; its file may be gone.
    spec.kernel.clone_from(&args.state);
    spec.initramfs = None;
    let config = spec.validate().map_err(|error| error.to_string())?;
    let words = state.words.clone();
    Ok(MachineConfig { words, ..config })
}

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Saved {
    #[command(flatten)]
    machine: MachineSpec,
}

/// A disk that was written to since then would not fit to what the guest has of it in its memory.
fn check_disks(args: &Args, state: &State, config: &MachineConfig) -> Result<(), String> {
    for (index, (disk, was)) in config.disks.iter().zip(&state.disks).enumerate() {
        let path = disk.path.display();
        let is = DiskFile::at(&disk.path).map_err(|error| format!("disk {path}: {error}"))?;
        if is.size != was.size {
            let (is, was) = (is.size, was.size);
            return Err(format!(
                "disk {path} has {is} bytes, but had {was} at the time of the snapshot; give a copy from then with --disk {index}=PATH"
            ));
        }
        let is_given = args.disks.iter().any(|it| it.index == index);
        if is.written_ns != was.written_ns && !is_given {
            return Err(format!(
                "disk {path} was changed since the snapshot; give a copy from then with --disk {index}=PATH"
            ));
        }
    }
    Ok(())
}
