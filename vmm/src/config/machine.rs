//! The checked description of a machine: who has one need not check it again.

use std::path::PathBuf;

use ebb_core::release::Release;
use serde::{Serialize, Serializer};

use super::spec::{DiskConfig, KernelEntry, LazyConfig, SerialConfig, reporting_name};

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

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonConfig {
    /// Bytes that the balloon asks for at start; a multiple of 4 KiB, at most the guest's memory.
    pub size: u64,
    /// Let the guest take balloon pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: the statistics queue is not offered.
    pub statistics_interval_s: u16,
    /// How free pages that the guest reports are released; `None`: reporting is not offered.
    #[serde(serialize_with = "by_name")]
    pub free_page_reporting: Option<Release>,
}

fn by_name<S: Serializer>(how: &Option<Release>, serializer: S) -> Result<S::Ok, S::Error> {
    how.map(reporting_name).serialize(serializer)
}
