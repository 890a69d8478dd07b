//! What an operator can ask of a running machine: the trait [`Controller`] and its answers. The API calls it, the
//! machine implements it, and neither knows more of the other.

use serde::Serialize;

use crate::config::MachineConfig;

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

/// A running machine, as the operator sees it. A new request is one method here and one row in the API's table of
/// routes.
///
/// The API calls these methods on threads of its own, several at a time. A method may block for as long as its
/// work takes.
pub trait Controller: Send + Sync {
    /// The machine's name, state and age.
    fn info(&self) -> InstanceInfo;

    /// The configuration that the machine was built from.
    fn config(&self) -> &MachineConfig;

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

    /// The machine's arenas. Counts each arena's table, which takes up to a millisecond per TiB.
    fn arenas(&self) -> Vec<ArenaState>;

    /// Returns up to `bytes` of lazily freed memory to the host. Blocks until that is done.
    fn reclaim(&self, bytes: u64) -> ReclaimOutcome;

    /// How the guest's memory will be freed when the machine ends.
    fn teardown(&self) -> TeardownState;

    /// Sets how the guest's memory will be freed: the number of threads, and the bytes that a thread takes at a
    /// time. `None` leaves a setting as it is.
    ///
    /// # Errors
    /// [`CommandError::OutOfBounds`].
    fn set_teardown(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError>;

    /// Ends the machine, as a SIGTERM to the monitor would. Returns at once.
    fn stop(&self);
}

/// What the machine is and how it fares.
#[derive(Clone, Debug, Serialize)]
pub struct InstanceInfo {
    /// Name of the machine.
    pub id: String,
    /// `Running`; the API is served for a running machine only.
    pub state: &'static str,
    /// Version of the monitor.
    pub vmm_version: &'static str,
    /// `Ebb`.
    pub app_name: &'static str,
    /// Process id of the monitor.
    pub pid: u32,
    /// Milliseconds since the monitor started.
    pub uptime_ms: u64,
}

/// The balloon's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonState {
    /// Bytes that the host asked for.
    pub target_bytes: u64,
    /// Bytes that the guest says it has handed back.
    pub actual_bytes: u64,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: off.
    pub statistics_interval_s: u16,
    /// The guest's driver is bound and tells the host before it reuses a page: frees are lazy.
    pub lazy: bool,
    /// The guest's driver is bound and reports free pages.
    pub free_page_reporting: bool,
}

/// Memory statistics that the guest reported (virtio 1.3, 5.5.6.3), bytes unless the name says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStatistics {
    /// Target in pages of 4 KiB.
    pub target_pages: u32,
    /// Actual in pages of 4 KiB.
    pub actual_pages: u32,
    /// Target in MiB.
    pub target_mib: u32,
    /// Actual in MiB.
    pub actual_mib: u32,
    /// Swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Major page faults, a count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Minor page faults, a count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Unused memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// All memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Memory that could be had without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Disk caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Successful hugetlb allocations, a count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Failed hugetlb allocations, a count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
}

/// Lazy memory: bytes by state, and what has happened so far. At every moment `freed` is the sum of
/// `lazy`, `unmapped`, `reclaiming`, `discarded`, `reused`, `given_up` and `forgotten`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LazyMemoryState {
    /// The VM's generation.
    pub generation: u64,
    /// The latest generation that every vCPU in the guest has seen.
    pub quiescent_generation: u64,
    /// Bytes freed by the guest, still with the guest's pages.
    pub lazy_bytes: u64,
    /// Bytes freed by the guest that the host may take at any time.
    pub unmapped_bytes: u64,
    /// Bytes that are being invalidated or discarded.
    pub reclaiming_bytes: u64,
    /// Bytes freed by the guest whose host pages are returned.
    pub discarded_bytes: u64,
    /// Ranges that the tracker holds.
    pub ranges: u64,
    /// Bytes ever freed lazily.
    pub freed_bytes_total: u64,
    /// Bytes that went from lazy to unmapped.
    pub unmapped_bytes_total: u64,
    /// Bytes ever returned to the host by reclaim.
    pub reclaimed_bytes_total: u64,
    /// Bytes that went back to what they were because the host would not take them.
    pub kept_bytes_total: u64,
    /// Bytes ever taken back by the guest.
    pub reused_bytes_total: u64,
    /// Of these, bytes that had been unmapped.
    pub reused_unmapped_bytes_total: u64,
    /// Of these, bytes that had been discarded.
    pub reused_discarded_bytes_total: u64,
    /// Bytes ever discarded at once, before the acknowledgement, for a driver without `MUST_TELL_HOST`.
    pub eager_bytes_total: u64,
    /// Frees that were not tracked because the tracker was full: that memory just stays with the guest.
    pub untracked_bytes_total: u64,
    /// Of these, bytes that were tracked and then given up.
    pub given_up_bytes_total: u64,
    /// Discarded bytes that the tracker has forgotten because it was full.
    pub forgotten_bytes_total: u64,
    /// Unmapped bytes that became lazy again because the tracker was full.
    pub coalesced_bytes_total: u64,
    /// Times that a reuse had to wait for the chunk being worked on.
    pub reuse_waits_total: u64,
    /// System calls made to discard lazy or unmapped memory.
    pub discard_calls_total: u64,
    /// Discards that failed.
    pub discard_failures_total: u64,
    /// System calls made to invalidate lazy memory.
    pub invalidate_calls_total: u64,
    /// Invalidations that failed.
    pub invalidate_failures_total: u64,
    /// System calls of eager discards.
    pub eager_calls_total: u64,
    /// Slices run with the vCPUs out.
    pub held_slices_total: u64,
    /// Of these, slices that vCPU threads have run on their way in.
    pub passing_slices_total: u64,
    /// Slices run with the vCPUs in the guest, because they were not out within the pause.
    pub open_slices_total: u64,
    /// Ranges treated in slices.
    pub slice_ranges_total: u64,
    /// Reclaims started by host memory pressure.
    pub pressure_events_total: u64,
    /// The entry gate.
    pub gate: GateState,
    /// The guest's calls.
    pub hypercalls: HypercallState,
    /// Free page reporting.
    pub reporting: ReportingState,
    /// Strict mode; nothing where it is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<StrictState>,
}

/// Strict mode: what touched memory that was lazily free, each page once until it is freed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StrictState {
    /// Missing pages that were made, whoever touched them.
    pub faults_total: u64,
    /// Lazily free pages that vCPUs touched.
    pub vcpu_violations_total: u64,
    /// Lazily free pages that threads of the monitor touched on the guest's behalf.
    pub device_violations_total: u64,
    /// Chunks that the host would not take: accesses to them are not caught.
    pub discard_failures_total: u64,
}

/// The entry gate: what reclaim has cost the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GateState {
    /// vCPUs interrupted to bring them out.
    pub kicks_total: u64,
    /// Times that it was closed.
    pub closings_total: u64,
    /// Closings given up because a vCPU was not out in time.
    pub missed_total: u64,
    /// Entries that had to wait.
    pub waits_total: u64,
    /// Pauses by length: the count at index `i` is of those shorter than 2^i microseconds and not shorter
    /// than half of that; the last also counts everything longer.
    pub pauses: [u64; 20],
    /// All pauses together, in microseconds.
    pub pause_us_total: u64,
    /// The longest pause, in microseconds.
    pub longest_pause_us: u64,
}

/// The guest's calls to the monitor since it started, by operation, failed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HypercallState {
    /// `LAZY_FREE`.
    pub lazy_free_total: u64,
    /// `REUSE`.
    pub reuse_total: u64,
    /// `LAZY_FREE_BATCH`.
    pub lazy_free_batch_total: u64,
    /// `REUSE_BATCH`.
    pub reuse_batch_total: u64,
    /// `QUERY`.
    pub query_total: u64,
    /// `RESET`.
    pub reset_total: u64,
    /// `FEATURES`.
    pub features_total: u64,
    /// `ARENA_INFO`.
    pub arena_info_total: u64,
    /// Calls that failed, unknown ones included.
    pub failed_total: u64,
    /// Bytes populated because a reuse asked for it.
    pub prefaulted_bytes_total: u64,
    /// Ranges that could not be populated.
    pub prefault_failures_total: u64,
}

/// Free page reporting: what came and what became of it. Reported memory is never tracked as lazily free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReportingState {
    /// `off`, `eager` or `lazy`: what is in force, `eager` also where the memory's backing knows nothing else.
    pub mode: &'static str,
    /// Messages.
    pub messages_total: u64,
    /// Ranges in them that are RAM, before they are merged.
    pub ranges_total: u64,
    /// Bytes in those ranges.
    pub bytes_total: u64,
    /// Bytes of them that were left alone because the guest fills free pages with something other than zero.
    pub poisoned_bytes_total: u64,
    /// `madvise` calls made for them; `ranges_total` over this is how many ranges were merged into one.
    pub calls_total: u64,
    /// Calls that failed.
    pub failures_total: u64,
    /// Bytes returned to the host before the acknowledgement.
    pub discarded_bytes_total: u64,
    /// Bytes that the host may take when it is short of memory, unless the guest wrote to them first.
    pub marked_bytes_total: u64,
}

/// An arena. The table was counted for this; what the guest does with it meanwhile may or may not be in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ArenaState {
    /// Its name.
    pub id: String,
    /// Its guest-physical address.
    pub gpa: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of a granule.
    pub granule_bytes: u64,
    /// Bytes that the guest has freed, still with the guest's pages.
    pub lazy_bytes: u64,
    /// Bytes that the monitor has returned to the host and the guest has not taken back.
    pub discarded_bytes: u64,
    /// Bytes ever returned to the host.
    pub reclaimed_bytes_total: u64,
    /// Bytes that had been returned and that the guest was seen to have taken back.
    pub reused_bytes_total: u64,
    /// Granules made in use by calls.
    pub reuse_calls_total: u64,
    /// Of these, granules that were being discarded, so that the call waited.
    pub reuse_waits_total: u64,
    /// How often the table was counted.
    pub scans_total: u64,
    /// Time that this count took, in microseconds.
    pub scan_us: u64,
}

/// What one reclaim did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReclaimOutcome {
    /// Bytes returned to the host.
    pub reclaimed_bytes: u64,
    /// Time it took in microseconds.
    pub duration_us: u64,
}

/// How memory will be freed at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TeardownState {
    /// Threads that free it.
    pub workers: usize,
    /// Bytes that one takes at a time.
    pub batch_bytes: u64,
    /// It is freed behind the monitor's end, and as fast when the monitor is killed.
    pub guardian: bool,
}
