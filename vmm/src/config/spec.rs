//! What the operator can ask for: each option of `ebb run` that describes the machine, and each key of an option,
//! declared once. Parsing, `--help`, configuration files and `docs/options.md` follow from these structures.

use std::path::PathBuf;
use std::str::FromStr;

use clap::ArgAction::Set;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, ValueEnum};
use ebb_core::release::Release;
use ebb_hypercall_abi::arena::{DEFAULT_GRANULE, MAX_GRANULE};
use serde::Serialize;

use super::ConfigError;
use super::keys::{Keys, keys, on_off, parse_keys};
use super::limits::{MAX_MEMORY, MAX_VCPUS};
use super::mac::MacAddress;
use super::number::{number, parse_size, power_of_two, size};
use super::rate::Rate;
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
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line, instead of the default
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
    /// A disk. Repeat the option for more disks: the first is /dev/vda
    #[arg(long = "disk", value_name = PAIRS, value_parser = keys::<DiskConfig>())]
    pub disks: Vec<DiskConfig>,
    /// A network interface on a tap of the host. Repeat the option for more
    #[arg(long = "net", value_name = PAIRS, value_parser = keys::<NetConfig>())]
    pub nets: Vec<NetConfig>,
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
    /// When the host takes what the guest has freed lazily, and at which cost for the guest
    #[arg(long, value_name = PAIRS, value_parser = keys::<LazyConfig>())]
    pub lazy: Option<LazyConfig>,
    /// Serve the REST API on this unix socket
    #[arg(long, value_name = "PATH|path=PATH", alias = "api-sock")]
    pub api_socket: Option<SocketSpec>,
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
const PAIRS: &str = "KEY=VALUE,...";

impl MachineSpec {
    /// The kernel command line when none is given: messages on the serial port, and a panicking kernel
    /// resets at once instead of hanging. Power off and reset need no option: the kernel finds them in the
    /// ACPI tables.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 pci=off";
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

/// How a kernel image is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelEntry {
    /// a bzImage through the ELF inside it when its compression is known (faster, no KASLR), else as it is
    Auto,
    /// a bzImage as it is: its own decompressor runs in the guest
    Image,
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

/// `--disk`: a block device backed by a raw file.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct DiskConfig {
    /// Raw disk image or block device, for instance path=disk.raw
    #[arg(long, value_name = "PATH")]
    pub path: PathBuf,
    /// The guest may not write
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub readonly: bool,
    /// Limit of the bytes that are read and written: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub bw: Option<Rate>,
    /// Limit of the requests, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub ops: Option<Rate>,
}

impl Keys for DiskConfig {}

/// `--net`: a network interface on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct NetConfig {
    /// Name of the tap, which must exist and be free
    #[arg(long, value_name = "NAME", value_parser = tap_name)]
    pub tap: Option<String>,
    /// Instead: number of a descriptor that the monitor inherits, an open tap with IFF_NO_PI and IFF_VNET_HDR
    #[arg(long, value_parser = number::<i32>(3..=1 << 20))]
    pub fd: Option<i32>,
    /// The guest's address, for instance 02:00:00:00:00:01; one that follows from the names of machine and tap by default
    #[arg(long)]
    pub mac: Option<MacAddress>,
    /// Size of the largest packet in bytes that the guest is told; what it takes by itself, 1500, by default
    #[arg(long, value_parser = number::<u16>(68..=65521))]
    pub mtu: Option<u16>,
    /// Limit of the bytes that the guest receives: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub rx_bw: Option<Rate>,
    /// Limit of the frames that it receives, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub rx_ops: Option<Rate>,
    /// Limit of the bytes that it sends
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub tx_bw: Option<Rate>,
    /// Limit of the frames that it sends
    #[arg(long, value_name = "N/MS+BURST")]
    pub tx_ops: Option<Rate>,
}

impl Keys for NetConfig {
    fn settle(self, _given: &[String]) -> Result<Self, ConfigError> {
        match (&self.tap, self.fd) {
            (Some(_), None) | (None, Some(_)) => Ok(self),
            (Some(_), Some(_)) => Err(ConfigError::TapTwice),
            (None, None) => Err(ConfigError::NoTap),
        }
    }
}

/// The kernel's rules for names of interfaces (`dev_valid_name`, net/core/dev.c), and no `%`, which it would replace.
fn tap_name(name: &str) -> Result<String, ConfigError> {
    let odd = |byte: u8| !byte.is_ascii_graphic() || b"/:%".contains(&byte);
    if (1..=15).contains(&name.len()) && !name.bytes().any(odd) && !matches!(name, "." | "..") {
        return Ok(name.to_owned());
    }
    Err(ConfigError::TapName(name.escape_debug().to_string()))
}

/// `--balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct BalloonSpec {
    /// What the guest is asked for at the start, at most its memory
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096), default_value = "0")]
    pub size: u64,
    /// Let the guest take pages back when it runs out of memory; on with auto=on, else off by default
    #[arg(long, value_parser = on_off())]
    pub deflate_on_oom: Option<bool>,
    /// Seconds between two requests for the guest's statistics; 0: never; 1 with auto=on, else 0 by default
    #[arg(long, value_parser = number::<u16>(0..=u16::MAX as u64))]
    pub statistics: Option<u16>,
    /// Let the balloon run itself: it grows, beyond size=, when the host or the monitor's cgroup stays short, and shrinks when the guest or nobody needs it
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub auto: bool,
    /// With auto=on: what stays available to the guest; an eighth of its memory by default, at least 64M
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096))]
    pub reserve: Option<u64>,
    /// Let the guest report free pages by itself; on if reporting= is given
    #[arg(long, value_parser = on_off())]
    pub free_page_reporting: Option<bool>,
    /// When the host gets reported pages; lazy by default
    #[arg(long, value_parser = reporting())]
    pub reporting: Option<Release>,
}

impl Keys for BalloonSpec {
    fn settle(mut self, _given: &[String]) -> Result<Self, ConfigError> {
        match (self.free_page_reporting, self.reporting) {
            (Some(false), Some(_)) => return Err(ConfigError::ReportingOff),
            (Some(true), None) => self.reporting = Some(Release::MarkFree),
            _ => {}
        }
        if !self.auto && self.reserve.is_some() {
            return Err(ConfigError::ReserveAlone);
        }
        if self.auto && self.statistics == Some(0) {
            return Err(ConfigError::AutoWithoutStatistics);
        }
        Ok(self)
    }
}

/// How pages that the guest reports free go back to the host. After the acknowledgement the guest may write to them at
/// any time, so from then on they must not be discarded.
fn reporting() -> impl TypedValueParser<Value = Release> {
    PossibleValuesParser::new([
        PossibleValue::new("eager").help("at once, before the report is acknowledged"),
        PossibleValue::new("lazy")
            .help("when it is short of memory, unless the guest writes to them first"),
    ])
    .map(|name| match name.as_str() {
        "eager" => Release::Discard,
        _ => Release::MarkFree,
    })
}

fn auto_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new([
        PossibleValue::new("auto").help("as soon as the guest's kernel has told how they are read"),
        PossibleValue::new("off").help("never"),
    ])
    .map(|name| name == "auto")
}

/// `--lazy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Args, Serialize)]
pub struct LazyConfig {
    /// When it is taken; age= without mode= means mode=age
    #[arg(long, value_enum, default_value = "pressure")]
    pub mode: LazyMode,
    /// With mode=age: seconds after which it is taken
    #[arg(long = "age", value_parser = number::<u32>(1..=1 << 20), default_value = "60")]
    pub age_s: u32,
    /// Microseconds for which the vCPUs are kept out of the guest at a time; to come out they have as long before that
    #[arg(long = "pause", value_parser = number::<u32>(1..=1_000_000), default_value = "100")]
    pub pause_us: u32,
    /// Number of ranges that are taken in one such pause
    #[arg(long, value_parser = number::<u32>(1..=1 << 16), default_value = "512")]
    pub slice: u32,
    /// Percentage of their time that vCPUs may lose; a pause counts twice, because caches are cold after it
    #[arg(long, value_parser = number::<u32>(1..=50), default_value = "1")]
    pub share: u32,
    /// Also take memory that is free by the guest kernel's own free lists, where they can be read
    #[arg(long = "free_pages", alias = "free-pages", action = Set, value_parser = auto_off(), default_value = "auto")]
    pub free_pages: bool,
    /// For those who write guest allocators: discard at once, and report accesses to freed memory; allows no other key
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub strict: bool,
}

/// When lazily freed memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LazyMode {
    /// when the host is short of memory
    Pressure,
    /// as soon as possible
    Eager,
    /// when it has been free for some time
    Age,
    /// on request only
    Off,
}

impl Keys for LazyConfig {
    /// An age alone means the mode `age`; strict mode needs no tuning.
    fn settle(mut self, given: &[String]) -> Result<Self, ConfigError> {
        let is_given = |key: &str| given.iter().any(|other| other == key);
        if self.strict {
            if let Some(key) = given.iter().find(|key| *key != "strict") {
                return Err(ConfigError::StrictTuned { key: key.clone() });
            }
            (self.mode, self.free_pages) = (LazyMode::Off, false);
        } else if is_given("age") && !is_given("mode") {
            self.mode = LazyMode::Age;
        }
        Ok(self)
    }
}

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
        let disk: DiskConfig = parse_keys("path=/d,readonly=on").unwrap();
        assert_eq!((disk.path, disk.readonly), (PathBuf::from("/d"), true));
        assert_eq!((disk.bw, disk.ops), (None, None));
        let disk: DiskConfig = parse_keys("path=/d,bw=1M/100+2M,ops=7").unwrap();
        assert_eq!(
            (disk.bw, disk.ops),
            ("1M/100+2M".parse().ok(), "7".parse().ok())
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
    fn the_balloon_reports_when_asked_to() {
        let balloon: BalloonSpec =
            parse_keys("size=1G,deflate_on_oom=on,statistics=5,reporting=eager").unwrap();
        let expected = BalloonSpec {
            size: 1 << 30,
            deflate_on_oom: Some(true),
            statistics: Some(5),
            auto: false,
            reserve: None,
            free_page_reporting: None,
            reporting: Some(Release::Discard),
        };
        assert_eq!(balloon, expected);
        for (text, reporting) in [
            ("size=0", None),
            ("free_page_reporting=on", Some(Release::MarkFree)),
            ("free_page_reporting=off", None),
            (
                "free_page_reporting=on,reporting=eager",
                Some(Release::Discard),
            ),
            ("reporting=lazy", Some(Release::MarkFree)),
        ] {
            let balloon: BalloonSpec = parse_keys(text).unwrap();
            assert_eq!(balloon.reporting, reporting, "{text}");
        }
    }

    #[test]
    fn an_age_means_a_mode_and_strict_mode_stands_alone() {
        let default = LazyConfig {
            mode: LazyMode::Pressure,
            age_s: 60,
            pause_us: 100,
            slice: 512,
            share: 1,
            free_pages: true,
            strict: false,
        };
        for (text, expected) in [
            ("mode=pressure", default),
            ("strict=off,mode=pressure", default),
            (
                "age=9,pause=250,slice=64",
                LazyConfig {
                    mode: LazyMode::Age,
                    age_s: 9,
                    pause_us: 250,
                    slice: 64,
                    ..default
                },
            ),
            (
                "age=1,pause=1,slice=1,share=1,mode=eager",
                LazyConfig {
                    mode: LazyMode::Eager,
                    age_s: 1,
                    pause_us: 1,
                    slice: 1,
                    ..default
                },
            ),
            ("free_pages=auto", default),
            (
                "free-pages=off",
                LazyConfig {
                    free_pages: false,
                    ..default
                },
            ),
            (
                "strict=on",
                LazyConfig {
                    mode: LazyMode::Off,
                    free_pages: false,
                    strict: true,
                    ..default
                },
            ),
        ] {
            assert_eq!(parse_keys(text), Ok(expected), "{text}");
        }
    }

    fn assert_refused<T: Keys + std::fmt::Debug>(cases: &[(&str, &str)]) {
        for (text, part) in cases {
            let message = parse_keys::<T>(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message:?} lacks {part:?}");
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
        assert_refused::<DiskConfig>(&[("readonly=on", "path is missing")]);
        assert_refused::<NetConfig>(&[
            (
                "mtu=1500",
                "--net: name the host's side; write tap=NAME or fd=N",
            ),
            ("tap=a,fd=3", "--net tap,fd: an interface has one tap"),
            ("tap=a/b", "--net tap=a/b: no interface can have this name"),
            ("tap=..", "tap=..: no interface"),
            ("tap=tap%d", "tap=tap%d: no interface"),
            ("tap=abcdefghijklmnop", "use 1 to 15 letters"),
            ("fd=2", "fd=2: choose 3 to"),
            ("tap=a,mtu=67", "mtu=67: choose 68 to 65521"),
            ("tap=a,mtu=65522", "at most 65521"),
            (
                "tap=a,mac=03:00:00:00:00:01",
                "mac=03:00:00:00:00:01: a multicast address",
            ),
            ("tap=a,mac=00:00:00:00:00:00", "choose another"),
            ("tap=a,mac=x", "'x' is not a MAC address"),
            ("tap=a,rx_bw=fast", "'fast' is not a limit; write SIZE,"),
        ]);
        assert_refused::<BalloonSpec>(&[
            (
                "size=6K",
                "size=6K: not a multiple of 4K; the nearest below is 4K",
            ),
            ("statistics=65536", "at most 65535"),
            ("reporting=on", "reporting=on: write eager or lazy"),
            (
                "free_page_reporting=off,reporting=lazy",
                "free_page_reporting=off,reporting: remove one of them",
            ),
            (
                "reserve=1G",
                "--balloon reserve: only a balloon that runs itself keeps one; add auto=on or remove reserve",
            ),
            (
                "auto=on,statistics=0",
                "--balloon auto=on,statistics=0: it goes by the guest's statistics; remove statistics=0",
            ),
            ("auto=maybe", "auto=maybe: write on or off"),
        ]);
        assert_refused::<LazyConfig>(&[
            (
                "mode=later",
                "mode=later: write pressure, eager, age or off",
            ),
            ("age=0", "age=0: choose 1 to 1048576"),
            ("pause=0", "pause=0: choose 1 to 1000000"),
            ("slice=0", "slice=0: choose 1 to 65536"),
            ("share=0,mode=eager", "share=0: choose 1 to 50"),
            ("share=99", "at most 50"),
            ("free_pages=on", "free_pages=on: write auto or off"),
            (
                "strict=on,mode=eager",
                "--lazy strict=on,mode: strict mode discards at once and needs no tuning; remove mode",
            ),
            (
                "slice=3,strict=on",
                "--lazy strict=on,slice: strict mode discards at once and needs no tuning; remove slice",
            ),
        ]);
        let serial = |text: &str| text.parse::<SerialConfig>().unwrap_err().to_string();
        assert!(serial("pty").contains("tty, null or file=PATH"));
        assert!(serial("file=").contains("file has no value"));
        let socket = "path=".parse::<SocketSpec>().unwrap_err();
        assert!(socket.to_string().contains("path has no value"));
    }
}
