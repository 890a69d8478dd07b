//! What an operator can ask of a machine: the traits [`Instance`], from its first moment on, and [`Controller`], while it
//! runs, and their answers. The API calls them, the machine implements them, and neither knows more of the other.

use std::path::PathBuf;
use std::time::Duration;

use ebb_core::generation::GateStats;
use ebb_core::lazy::LazyStats;
use ebb_core::metrics::Metric;
use serde::{Deserialize, Serialize};

use crate::arena::ArenaStats;
use crate::config::{DiskEngine, MachineConfig, Rate};
use crate::devices::virtio::balloon::{ReportStats, Statistics};
use crate::devices::virtio::blk::DiskStats;
use crate::devices::virtio::net::NetStats;
use crate::devices::virtio::rng::RngStats;
use crate::devices::virtio::vsock::VsockStats;
use crate::guest_kernel::FreePagesState;
use crate::hypercall::HypercallStats;
use crate::output::OutputStats;
use crate::reclaim::{AutoBalloonStats, FreePagesStats, ReclaimStats, ReportedStats};
use crate::strict::StrictStats;

pub use crate::reclaim::BalloonDoing;

/// The metrics in the API's answers: the path of the request, the object in its answer, and what that object holds.
pub const METRICS: &[(&str, &str, &[Metric])] = &[
    ("/", "output", OutputStats::METRICS),
    ("/lazy-memory", "", LazyStats::METRICS),
    ("/lazy-memory", "", ReclaimStats::METRICS),
    ("/lazy-memory", "gate", GateStats::METRICS),
    ("/lazy-memory", "hypercalls", HypercallStats::METRICS),
    ("/lazy-memory", "free_pages", FreePagesStats::METRICS),
    ("/lazy-memory", "reporting", ReportStats::METRICS),
    ("/lazy-memory", "reporting", ReportedStats::METRICS),
    ("/lazy-memory", "strict", StrictStats::METRICS),
    ("/arenas", "", ArenaStats::METRICS),
    ("/balloon", "auto", AutoBalloonStats::METRICS),
    ("/devices", "disks", DiskStats::METRICS),
    ("/devices", "nets", NetStats::METRICS),
    ("/devices", "vsock", VsockStats::METRICS),
    ("/devices", "rng", RngStats::METRICS),
];

/// A request was understood, but the machine cannot carry it out. The message is for the operator.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandError {
    /// The machine has no such device.
    #[error("the machine has no {device}; start it with {option}")]
    NoDevice {
        /// What is missing.
        device: &'static str,
        /// The command-line option that adds it.
        option: &'static str,
    },
    /// A value is out of bounds.
    #[error("{what} is {value}, but {bound}")]
    OutOfBounds {
        /// Which value.
        what: &'static str,
        /// What was given.
        value: u64,
        /// What is allowed.
        bound: String,
    },
    /// The machine could not do it.
    #[error("{0}")]
    Failed(String),
}

/// A machine that is being built, runs or ends. Its methods do not block.
pub trait Instance: Send + Sync {
    /// The machine's name, state and age.
    fn info(&self) -> InstanceInfo;

    /// The configuration that the machine is built from.
    fn config(&self) -> &MachineConfig;

    /// Ends the machine, as a SIGTERM to the monitor would. Returns at once.
    fn stop(&self);

    /// Writes the counters to the file of `--metrics-path`. Does not wait for the file.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`] without such a file.
    fn flush_metrics(&self) -> Result<(), CommandError>;

    /// Presses Ctrl-Alt-Del on the guest's keyboard: asks it to shut down. Returns at once.
    ///
    /// # Errors
    /// [`CommandError::Failed`] if the guest does not read its keyboard.
    fn press_ctrl_alt_del(&self) -> Result<(), CommandError>;
}

/// A running machine, as the operator sees it. A new request is one method here and one row in the API's table of
/// routes.
///
/// The API calls these methods on threads of its own, several at a time. A method may block for as long as its
/// work takes.
pub trait Controller: Send + Sync {
    /// The balloon's target, its actual size and its mode.
    ///
    /// # Errors
    /// [`CommandError::NoDevice`] without a balloon.
    fn balloon(&self) -> Result<BalloonState, CommandError>;

    /// Asks the guest to hand back `bytes`, a multiple of 4 KiB. Returns at once; the guest follows in its own time.
    ///
    /// # Errors
    /// [`CommandError`] without a balloon, or when `bytes` is more than the guest's memory or not a multiple.
    fn set_balloon(&self, bytes: u64) -> Result<(), CommandError>;

    /// The latest statistics that the guest's balloon driver has sent.
    ///
    /// # Errors
    /// [`CommandError`] without a balloon, or when it was built without statistics.
    fn balloon_statistics(&self) -> Result<BalloonStatistics, CommandError>;

    /// Requests statistics from the guest every `seconds` from now on, at least 1.
    ///
    /// # Errors
    /// [`CommandError`] without a balloon, or when it was built without statistics.
    fn set_statistics_interval(&self, seconds: u16) -> Result<(), CommandError>;

    /// Lazily freed memory: bytes by state, and the counters of everything that deals with it.
    fn lazy_memory(&self) -> LazyMemoryState;

    /// What the disks, the network interfaces and other devices have done.
    fn devices(&self) -> DevicesState;

    /// The machine's arenas. Counts each arena's table, which takes up to a millisecond per TiB.
    fn arenas(&self) -> Vec<ArenaState>;

    /// Returns up to `bytes` of lazily freed memory to the host. Blocks until that is done, for `timeout` at most, or until
    /// the machine stops.
    fn reclaim(&self, bytes: u64, timeout: Option<Duration>) -> ReclaimOutcome;

    /// Pauses the machine: returns when no vCPU is in the guest and no device uses its memory. Does nothing if it is paused.
    ///
    /// # Errors
    /// [`CommandError::Failed`] if the machine is ending.
    fn pause(&self) -> Result<(), CommandError>;

    /// Lets the machine run again. Does nothing if it runs.
    ///
    /// # Errors
    /// [`CommandError::Failed`] if the machine is ending.
    fn resume(&self) -> Result<(), CommandError>;

    /// The machine's disks.
    fn drives(&self) -> Vec<DriveState>;

    /// Changes the disk `id`: what it is on, the size that the guest sees, its limits.
    ///
    /// # Errors
    /// [`CommandError::Failed`]: there is no such disk, or the file cannot be one.
    fn update_drive(&self, id: &str, update: &DriveUpdate) -> Result<(), CommandError>;

    /// Changes the limits of the network interface `id`.
    ///
    /// # Errors
    /// [`CommandError::Failed`]: there is no such interface.
    fn update_net(&self, id: &str, update: &NetUpdate) -> Result<(), CommandError>;

    /// Saves the paused machine to two new files. Blocks until they have their names.
    ///
    /// # Errors
    /// [`CommandError::Failed`] if the machine is not paused, or a file cannot be written; nothing is left then.
    fn snapshot(
        &self,
        kind: SnapshotKind,
        memory: PathBuf,
        state: PathBuf,
    ) -> Result<(), CommandError>;

    /// How the guest's memory will be freed when the machine ends.
    fn teardown(&self) -> TeardownState;

    /// Sets how the guest's memory will be freed: the number of threads, and the bytes that a thread takes at a
    /// time. `None` leaves a setting as it is.
    ///
    /// # Errors
    /// [`CommandError::OutOfBounds`].
    fn set_teardown(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError>;
}

/// How much of a machine a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// Of its memory what is new since it was restored.
    Difference,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// Nobody has asked for its start (Firecracker mode).
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its memory is being populated, its kernel loaded.
    #[default]
    Building,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices rest.
    Paused,
}

/// How far the guest's memory is populated (`prefault=on`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefault {
    /// Bytes that are.
    pub populated_bytes: u64,
    /// Bytes that will be.
    pub total_bytes: u64,
}

/// The machine's name, state and age.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// Name of the machine.
    pub id: String,
    /// What it is doing.
    pub state: InstanceState,
    /// How far its memory is populated, while it is being built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefault: Option<Prefault>,
    /// Version of the monitor.
    pub vmm_version: String,
    /// `Ebb`.
    pub app_name: String,
    /// Process id of the monitor.
    pub pid: u32,
    /// Milliseconds since the monitor started.
    pub uptime_ms: u64,
    /// Output that was lost.
    #[serde(default)]
    pub output: OutputStats,
}

impl InstanceInfo {
    /// What is known without a machine.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self {
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            app_name: "Ebb".to_owned(),
            pid: std::process::id(),
            ..Self::default()
        }
    }
}

/// The balloon, in the names and units of Firecracker's API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// MiB that the host asks for.
    pub amount_mib: u64,
    /// MiB that the guest says it has handed back.
    pub actual_mib: u64,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: off.
    pub stats_polling_interval_s: u16,
    /// The guest's driver is bound and tells the host before it reuses a page, so frees are lazy.
    pub lazy: bool,
    /// The guest's driver is bound and reports free pages.
    pub free_page_reporting: bool,
    /// The balloon runs itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto: Option<AutoBalloonState>,
}

/// A balloon that runs itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoBalloonState {
    /// MiB that an operator has asked for: it never asks for less.
    pub floor_mib: u64,
    /// MiB that stay available to the guest.
    pub reserve_mib: u64,
    /// What it does, or why it does nothing.
    pub doing: BalloonDoing,
    /// What it has done.
    #[serde(flatten)]
    pub stats: AutoBalloonStats,
}

/// The balloon's size, and memory statistics of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// Target in pages of 4 KiB.
    pub target_pages: u32,
    /// Actual size in pages of 4 KiB.
    pub actual_pages: u32,
    /// Target in MiB.
    pub target_mib: u32,
    /// Actual size in MiB.
    pub actual_mib: u32,
    /// What the guest's driver has sent.
    #[serde(flatten)]
    pub guest: Statistics,
}

/// Lazily freed memory: bytes by state, and the counters of everything that deals with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyMemoryState {
    /// What is lazily free, and in which state.
    #[serde(flatten)]
    pub lazy: LazyStats,
    /// What reclaim has done.
    #[serde(flatten)]
    pub reclaim: ReclaimStats,
    /// What reclaim has cost the vCPUs.
    pub gate: GateStats,
    /// The guest's calls.
    pub hypercalls: HypercallStats,
    /// The free lists of the guest's kernel.
    pub free_pages: FreePages,
    /// Free page reporting.
    pub reporting: ReportingState,
    /// Strict mode, where it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<StrictStats>,
}

/// The free lists of the guest's kernel. What is free by them is never tracked as lazily free.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreePages {
    /// Whether they are read.
    #[serde(flatten)]
    pub state: FreePagesState,
    /// What was done with what is free by them.
    #[serde(flatten)]
    pub stats: FreePagesStats,
}

/// Free page reporting. Reported memory is never tracked as lazily free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportingState {
    /// The mode in force.
    pub mode: ReportingMode,
    /// What the guest has reported.
    #[serde(flatten)]
    pub found: ReportStats,
    /// What was done with it.
    #[serde(flatten)]
    pub taken: ReportedStats,
}

/// What is done with free pages that the guest reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportingMode {
    /// Reports are not offered to the guest.
    #[default]
    Off,
    /// They are discarded before the report is acknowledged. Also in force where memory cannot be marked free.
    Eager,
    /// The host may take them when it is short of memory.
    Lazy,
}

/// What a numbered device has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState<T> {
    /// The name in logs, such as `blk0`.
    pub id: String,
    /// Its counters.
    #[serde(flatten)]
    pub stats: T,
}

/// What the devices have done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    /// The disks, in the order of the command line.
    pub disks: Vec<DeviceState<DiskStats>>,
    /// The network interfaces, in the order of the command line.
    pub nets: Vec<DeviceState<NetStats>>,
    /// The vsock, if there is one.
    pub vsock: Option<VsockStats>,
    /// The source of random bytes, if there is one.
    pub rng: Option<RngStats>,
}

/// An arena.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaState {
    /// Its name.
    pub id: String,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of a granule.
    pub granule_bytes: u64,
    /// What it holds, and what has happened to it.
    #[serde(flatten)]
    pub stats: ArenaStats,
}

/// A disk, in the names of Firecracker's API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveState {
    /// `disk0` for the first one on the command line.
    pub drive_id: String,
    /// The file that it is on now.
    pub path_on_host: PathBuf,
    /// The guest may not write.
    pub is_read_only: bool,
    /// Its size in bytes, as the guest is told.
    pub size_bytes: u64,
    /// How its requests are carried out: `io_uring` or `threads`.
    pub engine: DiskEngine,
}

/// What is to change of a disk. With nothing in it, the guest is told the size that the file has now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriveUpdate {
    /// The file that it shall be on. The one that it is on: look at its size.
    pub path: Option<PathBuf>,
    /// New limits.
    pub limits: Option<RateLimits>,
}

/// New limits of a device; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Of the bytes that are read and written.
    pub bandwidth: Option<Rate>,
    /// Of the requests.
    pub operations: Option<Rate>,
}

/// What is to change of a network interface: new limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetUpdate {
    /// Of what the guest receives.
    pub receive: Option<RateLimits>,
    /// Of what it sends.
    pub transmit: Option<RateLimits>,
}

/// What one reclaim did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimOutcome {
    /// Bytes returned to the host.
    pub reclaimed_bytes: u64,
    /// Time it took in microseconds.
    pub duration_us: u64,
    /// It ended before it was done: because of its time-out, or because the machine stops.
    #[serde(default)]
    pub cut_short: bool,
}

/// How the guest's memory will be freed when the machine ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeardownState {
    /// Threads that free it.
    pub workers: usize,
    /// Bytes that a thread takes at a time.
    pub batch_bytes: u64,
    /// A helper process frees it after the monitor has ended, also when the monitor is killed.
    pub guardian: bool,
}
