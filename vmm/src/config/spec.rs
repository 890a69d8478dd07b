//! What the operator wrote, typed but not yet checked against the host or against itself.

use std::path::PathBuf;
use std::str::FromStr;

use ebb_hypercall_abi::arena;

use super::options::Options;
use super::{
    BalloonConfig, ConfigError, DiskConfig, KernelEntry, LazyConfig, LazyMode, Reporting,
    SerialConfig,
};

/// A machine as asked for; [`MachineSpec::validate`] makes it a [`super::MachineConfig`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// Name of the machine.
    pub id: String,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// How the kernel is entered.
    pub kernel_entry: KernelEntry,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: CpusSpec,
    /// The guest's RAM.
    pub memory: MemorySpec,
    /// Arenas beside the RAM.
    pub arenas: Vec<ArenaSpec>,
    /// Block devices.
    pub disks: Vec<DiskConfig>,
    /// The first serial port.
    pub serial: SerialConfig,
    /// The balloon device.
    pub balloon: Option<BalloonConfig>,
    /// When and how lazily freed memory is taken.
    pub lazy: LazyConfig,
    /// Socket of the API.
    pub api_socket: Option<PathBuf>,
    /// Helpers that outlive the monitor.
    pub guardian: bool,
}

impl MachineSpec {
    /// Name of a machine that was not given one.
    pub const DEFAULT_ID: &str = "ebb";

    /// The kernel command line when none is given: messages on the serial port, and a panicking kernel
    /// resets at once instead of hanging. Power off and reset need no option: the kernel finds them in the
    /// ACPI tables.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 pci=off";

    /// A machine with this kernel, and the defaults for all else.
    #[must_use]
    pub fn new(kernel: PathBuf) -> Self {
        Self {
            id: Self::DEFAULT_ID.to_owned(),
            kernel,
            kernel_entry: KernelEntry::default(),
            initramfs: None,
            cmdline: Self::DEFAULT_CMDLINE.to_owned(),
            cpus: CpusSpec::default(),
            memory: MemorySpec::default(),
            arenas: Vec::new(),
            disks: Vec::new(),
            serial: SerialConfig::Tty,
            balloon: None,
            lazy: LazyConfig::default(),
            api_socket: None,
            guardian: true,
        }
    }
}

/// `--cpus boot=N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpusSpec {
    /// vCPUs that the guest finds at boot.
    pub boot: u32,
}

impl Default for CpusSpec {
    fn default() -> Self {
        Self { boot: 1 }
    }
}

impl FromStr for CpusSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["boot"])?;
        options.required("boot", "boot=1")?;
        Ok(Self {
            boot: options
                .number("boot", super::validate::MAX_VCPUS)?
                .unwrap_or(1),
        })
    }
}

/// `--memory size=,thp=,hugepages=,prefault=,shared=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Bytes.
    pub size: u64,
    /// Transparent huge pages; `None`: on, unless `hugepages` is.
    pub thp: Option<bool>,
    /// Pages of 2 MiB from hugetlbfs.
    pub hugepages: bool,
    /// Populate before the guest starts.
    pub prefault: bool,
    /// Files without a name instead of private memory.
    pub shared: bool,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            thp: None,
            hugepages: false,
            prefault: false,
            shared: false,
        }
    }
}

impl FromStr for MemorySpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["size", "thp", "hugepages", "prefault", "shared"])?;
        let default = Self::default();
        Ok(Self {
            size: options.size("size")?.unwrap_or(default.size),
            thp: options.toggle("thp")?,
            hugepages: options.toggle("hugepages")?.unwrap_or(default.hugepages),
            prefault: options.toggle("prefault")?.unwrap_or(default.prefault),
            shared: options.toggle("shared")?.unwrap_or(default.shared),
        })
    }
}

/// `--arena size=,granule=,id=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaSpec {
    /// Bytes.
    pub size: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Name; `None`: `arena` and its number.
    pub id: Option<String>,
}

impl FromStr for ArenaSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["size", "granule", "id"])?;
        options.required("size", "size=64G")?;
        Ok(Self {
            size: options.size("size")?.unwrap_or(0),
            granule: options.size("granule")?.unwrap_or(arena::DEFAULT_GRANULE),
            id: options.text("id").map(str::to_owned),
        })
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    /// Parses `--disk path=,readonly=`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["path", "readonly"])?;
        Ok(Self {
            path: options.required("path", "path=disk.raw")?.into(),
            readonly: options.toggle("readonly")?.unwrap_or(false),
        })
    }
}

impl FromStr for BalloonConfig {
    type Err = ConfigError;

    /// Parses `--balloon size=,deflate_on_oom=,statistics=,free_page_reporting=,reporting=`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const KEYS: &[&str] = &[
            "size",
            "deflate_on_oom",
            "statistics",
            "free_page_reporting",
            "reporting",
        ];
        let options = Options::parse(text, KEYS)?;
        let seconds = options.number("statistics", u16::MAX.into())?.unwrap_or(0);
        Ok(Self {
            size: options.size("size")?.unwrap_or(0),
            deflate_on_oom: options.toggle("deflate_on_oom")?.unwrap_or(false),
            statistics_interval_s: u16::try_from(seconds).unwrap_or(u16::MAX),
            free_page_reporting: parse_reporting(&options)?,
        })
    }
}

impl FromStr for LazyConfig {
    type Err = ConfigError;

    /// Parses `--lazy mode=,age=,pause=,slice=,share=`, or `--lazy strict=on` alone. An age alone means the mode `age`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        const TUNING: [&str; 5] = ["mode", "age", "pause", "slice", "share"];
        let options = Options::parse(text, &["mode", "age", "pause", "slice", "share", "strict"])?;
        let default = Self::default();
        if options.toggle("strict")?.unwrap_or(false) {
            let other = TUNING.into_iter().find(|key| options.text(key).is_some());
            if let Some(key) = other {
                return Err(ConfigError::StrictTuned { key });
            }
            return Ok(Self {
                mode: LazyMode::Off,
                strict: true,
                ..default
            });
        }
        let number = |key, most, default: u32| {
            let number = options.number(key, most)?.unwrap_or(default);
            Ok(number.max(1))
        };
        let mode = match options.text("mode") {
            None if options.text("age").is_some() => LazyMode::Age,
            None | Some("pressure") => LazyMode::Pressure,
            Some("eager") => LazyMode::Eager,
            Some("age") => LazyMode::Age,
            Some("off") => LazyMode::Off,
            Some(value) => {
                return Err(ConfigError::NotAChoice {
                    value: value.to_owned(),
                    choices: "pressure, eager, age or off",
                });
            }
        };
        Ok(Self {
            mode,
            age_s: number("age", 1 << 20, default.age_s)?,
            pause_us: number("pause", 1_000_000, default.pause_us)?,
            slice: number("slice", 1 << 16, default.slice)?,
            share: number("share", 50, default.share)?,
            strict: false,
        })
    }
}

/// `free_page_reporting=on|off,reporting=eager|lazy`: the second alone switches reporting on.
fn parse_reporting(options: &Options) -> Result<Option<Reporting>, ConfigError> {
    let how = match options.text("reporting") {
        None => None,
        Some("eager") => Some(Reporting::Eager),
        Some("lazy") => Some(Reporting::Lazy),
        Some(value) => {
            return Err(ConfigError::NotAChoice {
                value: value.to_owned(),
                choices: "reporting=eager or reporting=lazy",
            });
        }
    };
    match (options.toggle("free_page_reporting")?, how) {
        (Some(false), Some(_)) => Err(ConfigError::ReportingOff),
        (Some(false), None) => Ok(None),
        (Some(true), how) => Ok(Some(how.unwrap_or_default())),
        (None, how) => Ok(how),
    }
}

impl FromStr for KernelEntry {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "auto" => Ok(Self::Auto),
            "image" => Ok(Self::Image),
            _ => Err(ConfigError::NotAChoice {
                value: text.to_owned(),
                choices: "auto or image",
            }),
        }
    }
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    /// Parses `--serial tty|null|file=`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "tty" => return Ok(Self::Tty),
            "null" | "off" => return Ok(Self::Null),
            _ => {}
        }
        if !text.starts_with("file=") {
            return Err(ConfigError::NotAChoice {
                value: text.to_owned(),
                choices: "tty, null or file=PATH",
            });
        }
        let options = Options::parse(text, &["file"])?;
        Ok(Self::File(
            options.required("file", "file=serial.log")?.into(),
        ))
    }
}

/// `--api-socket path=PATH`, or the path alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketSpec(pub PathBuf);

impl FromStr for SocketSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if !text.starts_with("path=") {
            return Ok(Self(text.into()));
        }
        let options = Options::parse(text, &["path"])?;
        Ok(Self(options.required("path", "path=ebb.sock")?.into()))
    }
}

/// `workers=N,batch=SIZE`, either or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TeardownSpec {
    /// Threads that free memory at the end.
    pub workers: Option<u32>,
    /// Bytes that one takes at a time.
    pub batch: Option<u64>,
}

impl FromStr for TeardownSpec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let options = Options::parse(text, &["workers", "batch"])?;
        Ok(Self {
            workers: options.number("workers", u32::MAX)?,
            batch: options.size("batch")?,
        })
    }
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Toggle(pub bool);

impl FromStr for Toggle {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "on" => Ok(Self(true)),
            "off" => Ok(Self(false)),
            _ => Err(ConfigError::NotAChoice {
                value: text.to_owned(),
                choices: "on or off",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_as_the_readme_writes_them() {
        let memory: MemorySpec = "size=4G,thp=off,prefault=on,shared=on".parse().unwrap();
        let expected = MemorySpec {
            size: 4 << 30,
            thp: Some(false),
            hugepages: false,
            prefault: true,
            shared: true,
        };
        assert_eq!(memory, expected);
        assert_eq!("boot=4".parse(), Ok(CpusSpec { boot: 4 }));
        let disk: DiskConfig = "path=/d,readonly=on".parse().unwrap();
        assert_eq!((disk.path, disk.readonly), (PathBuf::from("/d"), true));
        let balloon: BalloonConfig = "size=1G,deflate_on_oom=on,statistics=5".parse().unwrap();
        assert_eq!(balloon.size, 1 << 30);
        assert!(balloon.deflate_on_oom);
        assert_eq!(balloon.statistics_interval_s, 5);
        let lazy: LazyConfig = "age=9,pause=250,slice=64".parse().unwrap();
        let expected = LazyConfig {
            mode: LazyMode::Age,
            age_s: 9,
            pause_us: 250,
            slice: 64,
            share: 1,
            strict: false,
        };
        assert_eq!(lazy, expected);
        let strict = LazyConfig {
            mode: LazyMode::Off,
            strict: true,
            ..LazyConfig::default()
        };
        assert_eq!("strict=on".parse(), Ok(strict));
        assert_eq!(
            "strict=off,mode=pressure".parse(),
            Ok(LazyConfig::default())
        );
        assert_eq!("mode=pressure".parse(), Ok(LazyConfig::default()));
        assert_eq!(balloon.free_page_reporting, None);
        for (text, reporting) in [
            ("free_page_reporting=on", Some(Reporting::default())),
            ("free_page_reporting=off", None),
            (
                "free_page_reporting=on,reporting=eager",
                Some(Reporting::Eager),
            ),
            ("reporting=lazy", Some(Reporting::Lazy)),
        ] {
            let balloon: BalloonConfig = text.parse().unwrap();
            assert_eq!(balloon.free_page_reporting, reporting, "{text}");
        }
        assert_eq!("file=/l".parse(), Ok(SerialConfig::File("/l".into())));
        assert_eq!("null".parse(), Ok(SerialConfig::Null));
        let teardown = TeardownSpec {
            workers: Some(4),
            batch: Some(1 << 30),
        };
        assert_eq!("workers=4,batch=1G".parse(), Ok(teardown));
        assert_eq!("off".parse(), Ok(Toggle(false)));
        assert_eq!("image".parse(), Ok(KernelEntry::Image));
        for text in ["/s", "path=/s"] {
            assert_eq!(text.parse(), Ok(SocketSpec("/s".into())), "{text}");
        }
    }

    #[test]
    fn wrong_arguments_say_what_is_right() {
        fn message<T: FromStr<Err = ConfigError>>(text: &str) -> String {
            text.parse::<T>()
                .err()
                .map_or_else(String::new, |error| error.to_string())
        }
        let cases = [
            (message::<MemorySpec>("siez=1G"), "did you mean 'size'?"),
            (message::<MemorySpec>("size=1Q"), "'1Q' is not a size"),
            (
                message::<MemorySpec>("thp=maybe"),
                "thp=maybe: write on or off",
            ),
            (
                message::<CpusSpec>("boot=-1"),
                "boot=-1: write a whole number",
            ),
            (message::<CpusSpec>("boot=256"), "at most 255"),
            (message::<CpusSpec>("4"), "the keys are boot"),
            (message::<DiskConfig>("readonly=on"), "path is missing"),
            (
                message::<BalloonConfig>("statistics=65536"),
                "at most 65535",
            ),
            (message::<LazyConfig>("mode=later"), "eager, age or off"),
            (message::<LazyConfig>("share=99"), "at most 50"),
            (
                message::<BalloonConfig>("reporting=on"),
                "'on' is unknown; write reporting=eager",
            ),
            (
                message::<LazyConfig>("strict=on,mode=eager"),
                "--lazy strict=on,mode: strict mode discards at once and needs no tuning; remove mode",
            ),
            (
                message::<LazyConfig>("slice=3,strict=on"),
                "--lazy strict=on,slice: strict mode discards at once and needs no tuning; remove slice",
            ),
            (
                message::<BalloonConfig>("free_page_reporting=off,reporting=lazy"),
                "free_page_reporting=off,reporting: remove one of them",
            ),
            (message::<SerialConfig>("pty"), "tty, null or file=PATH"),
            (message::<SerialConfig>("file="), "file has no value"),
            (message::<KernelEntry>("elf"), "auto or image"),
            (
                message::<TeardownSpec>("worker=4"),
                "did you mean 'workers'?",
            ),
            (message::<TeardownSpec>("batch=x"), "'x' is not a size"),
            (message::<Toggle>("yes"), "write on or off"),
            (message::<SocketSpec>("path="), "path has no value"),
        ];
        for (message, part) in cases {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}
