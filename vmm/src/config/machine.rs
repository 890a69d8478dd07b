//! The validated description of a machine. Whoever holds one need not check it again.

use std::path::PathBuf;

use serde::Serialize;

/// Everything that `ebb run` needs to build a machine.
#[derive(Clone, Debug, Serialize)]
pub struct MachineConfig {
    /// Name of the machine, for logs and the API.
    pub id: String,
    /// The guest's kernel.
    pub kernel: KernelConfig,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// The guest's RAM.
    pub memory: MemoryConfig,
    /// Arenas beside the RAM, in the order of the command line.
    pub arenas: Vec<ArenaConfig>,
    /// Block devices, in the order of the command line: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// Where the first serial port goes.
    pub serial: SerialConfig,
    /// The balloon device, if there is one.
    pub balloon: Option<BalloonConfig>,
    /// When and how lazily freed memory is taken.
    pub lazy: LazyConfig,
    /// Socket on which the API is served.
    pub api_socket: Option<PathBuf>,
    /// Helpers free memory and clean up behind the monitor's end, also when it is killed.
    pub guardian: bool,
}

/// The guest's kernel.
#[derive(Clone, Debug, Serialize)]
pub struct KernelConfig {
    /// A bzImage, or an ELF vmlinux.
    pub path: PathBuf,
    /// How it is entered.
    pub entry: KernelEntry,
}

/// How a kernel image is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelEntry {
    /// A bzImage through the ELF inside it when its compression is known, else as it is.
    #[default]
    Auto,
    /// A bzImage as it is: its own decompressor runs in the guest.
    Image,
}

/// The guest's RAM.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryConfig {
    /// Size in bytes; a multiple of 2 MiB.
    pub size: u64,
    /// Ask the host for transparent huge pages.
    pub thp: bool,
    /// Back it by hugetlb pages of 2 MiB.
    pub hugepages: bool,
    /// Populate it before the guest starts.
    pub prefault: bool,
    /// Back it by files without a name (memfd_create(2)), not by private memory.
    pub shared: bool,
}

/// Memory beside the RAM whose granules the guest frees and reuses without a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ArenaConfig {
    /// Size in bytes; a multiple of the granule.
    pub size: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Name.
    pub id: String,
}

/// A block device backed by a raw file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
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

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonConfig {
    /// Bytes that the balloon asks for at start; a multiple of 4 KiB, at most the guest's memory.
    pub size: u64,
    /// Let the guest take balloon pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: the statistics queue is not offered.
    pub statistics_interval_s: u16,
    /// What becomes of free pages that the guest reports; `None`: reporting is not offered.
    pub free_page_reporting: Option<Reporting>,
}

/// What becomes of free pages that the guest reports. After the acknowledgement the guest may write to them
/// without a word, so nothing may drop them unconditionally any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporting {
    /// They are returned to the host at once, and only then is the report acknowledged.
    Eager,
    /// The host may take them when it is short of memory, unless the guest writes to them first.
    #[default]
    Lazy,
}

/// When and how lazily freed memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LazyConfig {
    /// When.
    pub mode: LazyMode,
    /// The age of [`LazyMode::Age`] in seconds.
    pub age_s: u32,
    /// For how long a vCPU may be kept out of the guest at a time, in microseconds.
    pub pause_us: u32,
    /// Most ranges that are taken in one pause.
    pub slice: u32,
    /// Percentage of their time that vCPUs may lose, 1 to 50; a pause counts twice, for what it leaves cold.
    pub share: u32,
    /// Discard it at once and report accesses to it; [`LazyMode::Off`] then.
    pub strict: bool,
}

/// When lazily freed memory is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LazyMode {
    /// Under memory pressure of the host.
    #[default]
    Pressure,
    /// As soon as possible.
    Eager,
    /// When it has been lazy for some time.
    Age,
    /// On request only.
    Off,
}

impl Default for LazyConfig {
    fn default() -> Self {
        Self {
            mode: LazyMode::default(),
            age_s: 60,
            pause_us: 100,
            slice: 512,
            share: 1,
            strict: false,
        }
    }
}
