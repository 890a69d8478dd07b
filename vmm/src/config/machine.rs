//! The checked description of a machine. Nothing in it has to be checked again.

use std::path::PathBuf;

use ebb_core::release::Release;
use serde::Serialize;

use super::disk::DiskConfig;
use super::lazy::LazyConfig;
use super::loopback::Loopback;
use super::net::NetConfig;
use super::rng::RngLimits;
use super::spec::{KernelEntry, SerialConfig, Transport};
use super::vsock::VsockConfig;
use crate::sys::seccomp;

/// Everything that `ebb run` needs to build a machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Name of the machine, for logs and the API.
    pub id: String,
    /// The guest's kernel.
    pub kernel: KernelConfig,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// How the guest reaches its virtio devices.
    pub transport: Transport,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// They show the guest the host's virtualization.
    pub nested: bool,
    /// The guest's RAM.
    pub memory: MemoryConfig,
    /// Arenas, in the order of the command line.
    pub arenas: Vec<ArenaConfig>,
    /// Block devices, in the order of the command line: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// Folders whose files a client of the API may name as disks.
    pub allow_paths: Vec<PathBuf>,
    /// Network interfaces, in the order of the command line.
    pub nets: Vec<NetConfig>,
    /// Streams to and from the host.
    pub vsock: Option<VsockConfig>,
    /// Where the first serial port goes.
    pub serial: SerialConfig,
    /// The balloon device, if there is one.
    pub balloon: Option<BalloonConfig>,
    /// There is a source of random bytes.
    pub rng: bool,
    /// How many random bytes the guest gets.
    pub rng_limits: RngLimits,
    /// When and how lazily freed memory is taken.
    pub lazy: LazyConfig,
    /// Socket on which the API is served.
    pub api_socket: Option<PathBuf>,
    /// Where the counters go in Firecracker's JSON.
    pub metrics_path: Option<PathBuf>,
    /// Where metrics are served over TCP.
    pub metrics_listen: Option<Loopback>,
    /// Start the helper processes that free memory and clean up after the monitor's end, also when it is killed.
    pub guardian: bool,
    /// The words of the command line that it was made from, for a snapshot.
    pub words: Vec<String>,
    /// The process behaves as Firecracker: SIGHUP ends the machine instead of having the log reopened, and sockets stay in the
    /// file system when it has ended.
    pub as_firecracker: bool,
    /// What happens when a thread makes a system call that it has no use for.
    pub seccomp: seccomp::Mode,
}

/// The guest's kernel.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// A bzImage, or an ELF vmlinux.
    pub path: PathBuf,
    /// How it is entered.
    pub entry: KernelEntry,
    /// Where unpacked kernels are kept.
    pub cache: Option<PathBuf>,
}

/// The guest's RAM.
#[derive(Clone, Debug)]
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

/// Memory apart from the RAM whose granules the guest frees and reuses without a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ArenaConfig {
    /// Size in bytes; a multiple of the granule.
    pub size: u64,
    /// Size of a granule in bytes.
    pub granule: u64,
    /// Name.
    pub id: String,
}

/// The balloon device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Bytes that the balloon asks for at the start; a multiple of 4 KiB, at most the guest's memory.
    pub size: u64,
    /// Let the guest take balloon pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: the statistics queue is not offered.
    pub statistics_interval_s: u16,
    /// The balloon runs itself and leaves this many bytes available to the guest; `None`: it is set by hand.
    pub auto_reserve: Option<u64>,
    /// How pages that the guest reports free go back to the host; `None`: reporting is not offered.
    pub free_page_reporting: Option<Release>,
}
