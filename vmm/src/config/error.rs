//! Errors in a configuration.

use std::path::PathBuf;

use ebb_hypercall_abi::arena::MAX_ID;

use super::limits::{MAX_ARENAS, MAX_CMDLINE, MAX_MEMORY};
use super::size::format_size;

/// An error in what the operator asked for. The message is one line that names the value and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "each message says what its variant means")]
pub enum ConfigError {
    #[error("'{text}' is not a KEY=VALUE pair; the keys are {known}")]
    NotAPair { text: String, known: String },
    #[error("unknown key '{key}';{hint} the keys are {known}")]
    UnknownKey {
        key: String,
        hint: String,
        known: String,
    },
    #[error("{key} is given twice; keep one")]
    DuplicateKey { key: String },
    #[error("{key} has no value; write {key}=VALUE")]
    EmptyValue { key: String },
    #[error("{key} is missing: {help}")]
    MissingKey { key: String, help: String },
    #[error(
        "{text} has an opening quote without a closing one; close it, or write \\\" for a quote"
    )]
    OpenQuote { text: String },
    #[error("'{value}' is not a size; write digits and one of K, M, G, T, for instance 512M")]
    NotASize { value: String },
    #[error("{key}={value}: {remedy}")]
    BadValue {
        key: String,
        value: String,
        remedy: String,
    },
    #[error("'{0}' is unknown; write tty, null or file=PATH")]
    NotASerial(String),
    #[error("the path is empty; name a folder, or off")]
    NoCacheFolder,
    #[error("{0}")]
    Other(String),

    #[error("--id '{0}': use 1 to 64 letters, digits or hyphens")]
    Id(String),
    #[error("--cmdline has {0} bytes; the kernel takes at most {MAX_CMDLINE}")]
    CmdlineTooLong(usize),
    #[error("--cmdline holds the control character {0:?}; remove it")]
    CmdlineControl(char),
    #[error("--memory size=0: a guest needs memory, for instance size=1G")]
    NoMemory,
    #[error(
        "--memory hugepages=on,thp=on: hugetlb pages are never transparent; remove one of them"
    )]
    ThpWithHugepages,
    #[error("--arena size={}: choose at most {}, all arenas together", format_size(*.0), format_size(MAX_MEMORY))]
    ArenaTooLarge(u64),
    #[error("--arena size={}: not a multiple of the granule of {}; the nearest below is {}", format_size(*.size), format_size(*.granule), format_size(.size / .granule * .granule))]
    ArenaSize { size: u64, granule: u64 },
    #[error("--arena size={}: no granule of {} is left behind the table; choose at least {}", format_size(*.size), format_size(*.granule), format_size(.granule * 2))]
    ArenaTooSmall { size: u64, granule: u64 },
    #[error("--arena id={0}: use 1 to {MAX_ID} letters, digits or hyphens")]
    ArenaId(String),
    #[error("--arena id={0} is given twice; give each its own")]
    ArenaIdTwice(String),
    #[error(
        "--cmdline has acpi=off, and the guest would find neither devices nor further processors: ACPI tables declare them; leave acpi=off out"
    )]
    CmdlineWithoutAcpi,
    #[error("--cmdline has pci=off, with which Linux finds no --arena; remove one of them")]
    ArenaWithoutPci,
    #[error(
        "--cmdline has pci=off, and the guest would find no device of --transport pci; remove one of them"
    )]
    TransportWithoutPci,
    #[error("--arena is given {given} times; at most {MAX_ARENAS} fit into the guest's memory map")]
    TooManyArenas { given: usize },
    #[error(
        "--lazy strict=on,{key}: strict mode discards at once and needs no tuning; remove {key}"
    )]
    StrictTuned { key: String },
    #[error("--lazy strict=on --memory {key}=on: strict mode watches pages of 4 KiB; remove {key}")]
    StrictHugePages { key: &'static str },
    #[error("--net: name the host's side; write tap=NAME or fd=N")]
    NoTap,
    #[error("--net tap,fd: an interface has one tap; remove one of them")]
    TapTwice,
    #[error(
        "--net tap={0}: no interface can have this name; use 1 to 15 letters, digits or hyphens"
    )]
    TapName(String),
    #[error("--net {0} is given twice; give each interface its own")]
    NetTwice(String),
    #[error(
        "'{0}' is not a limit; write SIZE, SIZE/MS or SIZE/MS+BURST, for instance 10M/1000+50M"
    )]
    NotARate(String),
    #[error("'{0}' is not a MAC address; write six bytes, for instance 02:00:00:00:00:01")]
    NotAMac(String),
    #[error("mac={0}: a multicast address belongs to no interface; make the second digit even")]
    MulticastMac(String),
    #[error(
        "mac={0}: this address is no interface's; choose another, for instance 02:00:00:00:00:01"
    )]
    ZeroMac(String),
    #[error("id={0}: use 1 to 64 letters, digits, hyphens or underscores")]
    DeviceId(String),
    #[error("two of the machine's {devices} have the name {id}; give each its own")]
    DeviceIdTwice { devices: &'static str, id: String },
    #[error("--balloon free_page_reporting=off,reporting: remove one of them")]
    ReportingOff,
    #[error(
        "--balloon reserve: only a balloon that runs itself keeps one; add auto=on or remove reserve"
    )]
    ReserveAlone,
    #[error(
        "--balloon auto=on,statistics=0: it goes by the guest's statistics; remove statistics=0"
    )]
    AutoWithoutStatistics,
    #[error("--balloon auto=on --lazy {key}: nothing looks at the host then; remove one of them")]
    AutoWithoutReclaim { key: &'static str },
    #[error("--balloon reserve={}: the guest has only {} of memory; choose less", format_size(*.reserve), format_size(*.memory))]
    ReserveTooLarge { reserve: u64, memory: u64 },
    #[error("--balloon size={}: the guest has only {} of memory; choose less", format_size(*.balloon), format_size(*.memory))]
    BalloonTooLarge { balloon: u64, memory: u64 },

    #[error("{option} {path}: {problem}; {remedy}", path = path.display())]
    File {
        option: &'static str,
        path: PathBuf,
        problem: String,
        remedy: &'static str,
    },
    #[error("--disk {path} and {other} are one file and one of them is writable; give both readonly=on, or drop one", path = path.display(), other = other.display())]
    DiskShared { path: PathBuf, other: PathBuf },
}
