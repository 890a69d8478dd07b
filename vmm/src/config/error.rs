//! What can be wrong with a configuration.

use std::path::PathBuf;

use ebb_hypercall_abi::arena::{DEFAULT_GRANULE, MAX_GRANULE, MAX_ID};

use super::format_size;

/// A mistake in what the operator asked for; the message is one line that names the value and the remedy.
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
    DuplicateKey { key: &'static str },
    #[error("{key} has no value; write {key}=VALUE")]
    EmptyValue { key: &'static str },
    #[error("{key} is missing; write for instance {example}")]
    MissingKey {
        key: &'static str,
        example: &'static str,
    },
    #[error(
        "{text} has an opening quote without a closing one; close it, or write \\\" for a quote"
    )]
    OpenQuote { text: String },
    #[error("{key}={value}: write on or off")]
    NotAToggle { key: &'static str, value: String },
    #[error("'{value}' is not a size; write digits and one of K, M, G, T, for instance 512M")]
    NotASize { value: String },
    #[error("{key}={value}: write a whole number of at most {max}")]
    NotANumber {
        key: &'static str,
        value: String,
        max: u32,
    },
    #[error("'{value}' is unknown; write {choices}")]
    NotAChoice {
        value: String,
        choices: &'static str,
    },

    #[error("--id '{0}': use 1 to 64 letters, digits or hyphens")]
    Id(String),
    #[error("--cmdline has {0} bytes; the kernel takes at most {max}", max = super::validate::MAX_CMDLINE)]
    CmdlineTooLong(usize),
    #[error("--cmdline holds the control character {0:?}; remove it")]
    CmdlineControl(char),
    #[error("--cpus boot={given}: choose 1 to {max}", max = super::validate::MAX_VCPUS)]
    Vcpus { given: u32 },
    #[error("--memory size=0: a guest needs memory, for instance size=1G")]
    NoMemory,
    #[error("--memory size={}: not a multiple of 2 MiB; the nearest below is {}", format_size(*.0), format_size(.0 & !0x1f_ffff))]
    MemoryGranule(u64),
    #[error("--memory size={}: beyond the address width; choose at most {}", format_size(*.0), format_size(super::validate::MAX_MEMORY))]
    MemoryTooLarge(u64),
    #[error(
        "--memory hugepages=on,thp=on: hugetlb pages are never transparent; remove one of them"
    )]
    ThpWithHugepages,
    #[error("--arena size={}: choose at most {}, all arenas together", format_size(*.0), format_size(super::validate::MAX_MEMORY))]
    ArenaTooLarge(u64),
    #[error("--arena granule={}: choose a power of two from {} to {}", format_size(*.0), format_size(DEFAULT_GRANULE), format_size(MAX_GRANULE))]
    ArenaGranule(u64),
    #[error("--arena size={}: not a multiple of the granule of {}; the nearest below is {}", format_size(*.size), format_size(*.granule), format_size(.size / .granule * .granule))]
    ArenaSize { size: u64, granule: u64 },
    #[error("--arena size={}: no granule of {} is left behind the table; choose at least {}", format_size(*.size), format_size(*.granule), format_size(.granule * 2))]
    ArenaTooSmall { size: u64, granule: u64 },
    #[error("--arena id={0}: use 1 to {MAX_ID} letters, digits or hyphens")]
    ArenaId(String),
    #[error("--arena id={0} is given twice; give each its own")]
    ArenaIdTwice(String),
    #[error("--cmdline has pci=off, with which Linux finds no --arena; remove one of them")]
    ArenaWithoutPci,
    #[error("--arena is given {given} times; at most {max} fit into the guest's memory map", max = super::validate::MAX_ARENAS)]
    TooManyArenas { given: usize },
    #[error(
        "--lazy strict=on,{key}: strict mode discards at once and needs no tuning; remove {key}"
    )]
    StrictTuned { key: &'static str },
    #[error("--lazy strict=on --memory {key}=on: strict mode watches pages of 4 KiB; remove {key}")]
    StrictHugePages { key: &'static str },
    #[error("--balloon free_page_reporting=off,reporting: remove one of them")]
    ReportingOff,
    #[error("--balloon size={}: not a multiple of 4 KiB; the nearest below is {}", format_size(*.0), format_size(.0 & !0xfff))]
    BalloonGranule(u64),
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
