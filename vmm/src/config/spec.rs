//! What the operator can ask for: each option of `ebb run` that describes the machine, declared once. The keys of `--disk`,
//! `--net`, `--vsock`, `--balloon`, `--rng-limits` and `--lazy` are declared in files of their names, the others here. Parsing, `--help`, configuration
//! files and `docs/options.md` follow from these structures.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ArgAction::Set;
use clap::{Args, Parser, ValueEnum};
use ebb_hypercall_abi::arena::{DEFAULT_GRANULE, MAX_GRANULE};
use serde::Serialize;

use super::ConfigError;
use super::balloon::BalloonSpec;
use super::disk::DiskConfig;
use super::keys::{Keys, keys, on_off, parse_keys};
use super::lazy::LazyConfig;
use super::limits::{MAX_MEMORY, MAX_VCPUS};
use super::loopback::Loopback;
use super::net::NetConfig;
use super::number::{number, parse_size, power_of_two, size};
use super::rng::RngLimits;
use super::vsock::VsockConfig;
use crate::sys::seccomp;

/// A machine as asked for; [`MachineSpec::validate`] makes it a [`super::MachineConfig`].
#[derive(Clone, Debug, Parser)]
#[command(no_binary_name = true)]
pub struct MachineSpec {
    /// Guest kernel: a bzImage as distributions ship it, or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// How a bzImage is entered
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub kernel_entry: KernelEntry,
    /// Where unpacked kernels are kept, so that the next start takes them from there; ebb/kernels in $XDG_CACHE_HOME or
    /// ~/.cache by default
    #[arg(long, value_name = "DIR|off")]
    pub kernel_cache: Option<KernelCache>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line, instead of the default, by which the kernel is quiet: its messages take longer than the rest
    /// of its start. To see them, give the default without quiet
    #[arg(long, value_name = "TEXT", default_value = Self::DEFAULT_CMDLINE, allow_hyphen_values = true)]
    pub cmdline: String,
    /// The guest's processors
    #[arg(long, value_name = PAIRS, value_parser = keys::<CpusSpec>())]
    pub cpus: Option<CpusSpec>,
    /// The guest's RAM
    #[arg(long, value_name = PAIRS, value_parser = keys::<MemorySpec>())]
    pub memory: Option<MemorySpec>,
    /// Memory next to the RAM, /dev/daxN.M in a Linux guest, that the guest frees and reuses without a call. It may be
    /// bigger than the host's memory. Repeat the option for more arenas
    #[arg(long = "arena", value_name = PAIRS, value_parser = keys::<ArenaSpec>())]
    pub arenas: Vec<ArenaSpec>,
    /// How the guest reaches its virtio devices: pci, or mmio where the command line has pci=off
    #[arg(long, value_name = "HOW")]
    pub transport: Option<Transport>,
    /// A disk. Repeat the option for more disks: the first is /dev/vda
    #[arg(long = "disk", value_name = PAIRS, value_parser = keys::<DiskConfig>())]
    pub disks: Vec<DiskConfig>,
    /// A folder whose files a client of the API may name as disks while the machine runs, and in which it may write snapshots;
    /// / allows all files. Repeat the option for more
    #[arg(long = "allow-paths", value_name = "DIR")]
    pub allow_paths: Vec<PathBuf>,
    /// A network interface on a tap of the host. Repeat the option for more
    #[arg(long = "net", value_name = PAIRS, value_parser = keys::<NetConfig>())]
    pub nets: Vec<NetConfig>,
    /// Streams between programs of the guest and unix sockets of the host
    #[arg(long, value_name = PAIRS, value_parser = keys::<VsockConfig>())]
    pub vsock: Option<VsockConfig>,
    /// The first serial port: this terminal (Ctrl-A X quits), nothing, or a file for the output, which becomes
    /// PATH.1 and begins anew at 64 MiB
    #[arg(long, value_name = "tty|null|file=PATH", default_value = "tty")]
    pub serial: SerialConfig,
    /// The balloon, by which a stock guest hands memory back lazily
    #[arg(long, value_name = PAIRS, value_parser = keys::<BalloonSpec>())]
    pub balloon: Option<BalloonSpec>,
    /// A source of random bytes, /dev/hwrng in a Linux guest
    #[arg(long, action = Set, value_parser = on_off(), value_name = "on|off", hide_possible_values = true, default_value = "off")]
    pub rng: bool,
    /// How many random bytes the guest gets; as many as it wants by default
    #[arg(long, value_name = PAIRS, value_parser = keys::<RngLimits>())]
    pub rng_limits: Option<RngLimits>,
    /// When the host takes what the guest has freed lazily, and at which cost for the guest
    #[arg(long, value_name = PAIRS, value_parser = keys::<LazyConfig>())]
    pub lazy: Option<LazyConfig>,
    /// Serve the REST API on this unix socket
    #[arg(long, value_name = "PATH|path=PATH", alias = "api-sock")]
    pub api_socket: Option<SocketSpec>,
    /// Append the counters to this file or FIFO in Firecracker's JSON: at the start, each minute, at the end, and on request
    #[arg(long, value_name = "PATH")]
    pub metrics_path: Option<PathBuf>,
    /// Serve GET /metrics on this address of the loopback interface, for every program of this host
    #[arg(long, value_name = "127.0.0.1:PORT", requires = "api_socket")]
    pub metrics_listen: Option<Loopback>,
    /// Helper processes that free the machine's memory and clean up after the monitor's end, also when it is killed
    #[arg(long, action = Set, value_parser = on_off(), value_name = "on|off", hide_possible_values = true, default_value = "on")]
    pub guardian: bool,
    /// Threads may make those system calls only that they need
    #[arg(long, value_name = "HOW", default_value = "on")]
    pub seccomp: Seccomp,
    /// Name of the machine: letters, digits and hyphens
    #[arg(long, value_name = "NAME", default_value = "ebb")]
    pub id: String,
}

/// How the help shows an option that consists of keys.
pub(super) const PAIRS: &str = "KEY=VALUE,...";

impl MachineSpec {
    /// The kernel command line when none is given: warnings and errors on the serial port, where each byte costs two exits,
    /// and a panicking kernel resets at once instead of hanging. Power off and reset need no option: the kernel finds them
    /// in the ACPI tables.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0 quiet panic=-1";
}

/// `--seccomp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// another system call ends the monitor with status 37 and one line that names it
    On,
    /// another one is made, and the kernel logs it (audit, type 1326)
    Log,
    /// no filter, for debugging
    Off,
}

impl From<Seccomp> for seccomp::Mode {
    fn from(mode: Seccomp) -> Self {
        match mode {
            Seccomp::On => Self::On,
            Seccomp::Log => Self::Log,
            Seccomp::Off => Self::Off,
        }
    }
}

/// `--transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// on a PCI bus, with MSI-X (virtio-pci)
    Pci,
    /// by windows that the ACPI tables declare (virtio-mmio): for kernels without PCI
    Mmio,
}

/// How a kernel image is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelEntry {
    /// a bzImage through the ELF inside it when its compression is known (faster, no KASLR), else as it is
    Auto,
    /// a bzImage as it is: its own decompressor runs in the guest
    Image,
}

/// `--kernel-cache`: a folder, or `None` for off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCache(pub Option<PathBuf>);

impl FromStr for KernelCache {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "" => Err(ConfigError::NoCacheFolder),
            "off" => Ok(Self(None)),
            path => Ok(Self(Some(path.into()))),
        }
    }
}

/// `--cpus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args)]
pub struct CpusSpec {
    /// Number of vCPUs
    #[arg(long, value_parser = number::<u32>(1..=MAX_VCPUS as u64), default_value = "1")]
    pub boot: u32,
    /// Let the guest run virtual machines of its own, where the host can (VMX, SVM)
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub nested: bool,
}

impl Keys for CpusSpec {}

/// `--memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args)]
pub struct MemorySpec {
    /// Size
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 2 << 20), default_value = "512M")]
    pub size: u64,
    /// Transparent huge pages; on by default, off with hugepages=on
    #[arg(long, value_parser = on_off())]
    pub thp: Option<bool>,
    /// Pages of 2 MiB from hugetlbfs
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub hugepages: bool,
    /// Populate the memory before the guest starts
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub prefault: bool,
    /// Memory in memfds of 256 MiB, which other processes can map, instead of private memory
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub shared: bool,
}

impl Keys for MemorySpec {}

/// `--arena`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct ArenaSpec {
    /// Size, a multiple of the granule, for instance size=64G
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 1))]
    pub size: u64,
    /// The unit in which the guest frees and reuses memory
    #[arg(long, value_parser = power_of_two(DEFAULT_GRANULE..=MAX_GRANULE), default_value = "2M")]
    pub granule: u64,
    /// Name: letters, digits and hyphens; arena0, arena1 and so on by default
    #[arg(long, value_name = "NAME")]
    pub id: Option<String>,
}

impl Keys for ArenaSpec {}

/// Where the first serial port goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialConfig {
    /// Standard input and output; raw mode when it is a terminal.
    Tty,
    /// Output to a file, no input.
    File(PathBuf),
    /// Output dropped, no input.
    Null,
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "tty" => Ok(Self::Tty),
            "null" | "off" => Ok(Self::Null),
            _ if text.starts_with("file=") => Ok(Self::File(parse_keys::<OutputSpec>(text)?.file)),
            _ => Err(ConfigError::NotASerial(text.to_owned())),
        }
    }
}

#[derive(Clone, Args)]
struct OutputSpec {
    /// Output
    #[arg(long)]
    file: PathBuf,
}

impl Keys for OutputSpec {}

/// `--api-socket PATH`, or `path=PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct SocketSpec {
    /// Socket
    #[arg(long)]
    pub path: PathBuf,
}

impl Keys for SocketSpec {}

impl FromStr for SocketSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text.starts_with("path=") {
            return parse_keys(text);
        }
        Ok(Self { path: text.into() })
    }
}

/// `workers=N,batch=SIZE`, either or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct TeardownSpec {
    /// Threads that free memory at the end
    #[arg(long, value_parser = number::<u32>(0..=u32::MAX as u64))]
    pub workers: Option<u32>,
    /// Bytes that one thread takes at a time
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub batch: Option<u64>,
}

impl Keys for TeardownSpec {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::assert_refused;

    #[test]
    fn keys_become_values() {
        let memory = parse_keys("size=4G,thp=off,prefault=on,shared=on");
        let expected = MemorySpec {
            size: 4 << 30,
            thp: Some(false),
            hugepages: false,
            prefault: true,
            shared: true,
        };
        assert_eq!(memory, Ok(expected));
        assert_eq!(
            parse_keys("boot=4,nested=on"),
            Ok(CpusSpec {
                boot: 4,
                nested: true
            })
        );
        let arena: ArenaSpec = parse_keys("size=1G").unwrap();
        assert_eq!((arena.granule, arena.id), (DEFAULT_GRANULE, None));
        assert_eq!("file=/l".parse(), Ok(SerialConfig::File("/l".into())));
        assert_eq!("null".parse(), Ok(SerialConfig::Null));
        let teardown = TeardownSpec {
            workers: Some(4),
            batch: Some(1 << 30),
        };
        assert_eq!(parse_keys("workers=4,batch=1G"), Ok(teardown));
        for text in ["/s", "path=/s"] {
            let path = "/s".into();
            assert_eq!(text.parse(), Ok(SocketSpec { path }), "{text}");
        }
    }

    #[test]
    fn wrong_numbers_say_what_is_right() {
        assert_refused::<MemorySpec>(&[
            ("siez=1G", "did you mean 'size'?"),
            ("size=1Q", "'1Q' is not a size"),
            (
                "size=3M",
                "size=3M: not a multiple of 2M; the nearest below is 2M",
            ),
            ("size=128T", "size=128T: choose at most 64T"),
            ("thp=maybe", "thp=maybe: write on or off"),
        ]);
        assert_refused::<CpusSpec>(&[
            ("boot=-1", "boot=-1: write a whole number"),
            ("boot=0", "boot=0: choose 1 to 255"),
            ("boot=256", "at most 255"),
            ("4", "the keys are boot, nested"),
        ]);
        assert_refused::<ArenaSpec>(&[
            (
                "granule=2M",
                "size is missing: Size, a multiple of the granule, for instance size=64G",
            ),
            ("size=x", "'x' is not a size"),
            ("size=65T", "size=65T: choose at most 64T"),
            (
                "size=1G,granule=4K",
                "granule=4K: choose a power of two from 2M to 1G",
            ),
            ("size=9M,granule=3M", "granule=3M: choose a power of two"),
            ("size=8G,granule=2G", "granule=2G: choose a power of two"),
        ]);
        assert_refused::<TeardownSpec>(&[
            ("worker=4", "did you mean 'workers'?"),
            ("batch=x", "'x' is not a size"),
        ]);
    }

    #[test]
    fn wrong_choices_say_what_is_right() {
        let serial = |text: &str| text.parse::<SerialConfig>().unwrap_err().to_string();
        assert!(serial("pty").contains("tty, null or file=PATH"));
        assert!(serial("file=").contains("file has no value"));
        let socket = "path=".parse::<SocketSpec>().unwrap_err();
        assert!(socket.to_string().contains("path has no value"));
    }
}
