//! Carries out what the operator asks of a running machine.

use std::sync::Arc;
use std::time::Instant;

use ebb_core::generation::GateStats;
use ebb_core::range::PAGE_SIZE;
use ebb_core::release::Release;
use ebb_hypercall_abi::Operation;

use super::ending::Ending;
use super::events::ExitSlot;
use crate::arena::Arena;
use crate::bus::ExitReason;
use crate::config::MachineConfig;
use crate::control::{
    ArenaState, BalloonState, BalloonStatistics, CommandError, Controller, GateState,
    HypercallState, InstanceInfo, LazyMemoryState, ReclaimOutcome, ReportingState, StrictState,
    TeardownState,
};
use crate::devices::virtio::balloon::{BalloonHandle, ReportStats};
use crate::guest_memory::GuestMemory;
use crate::hypercall::Hypercalls;
use crate::strict::StrictStats;

/// A running machine, as far as it can be asked.
pub struct Control {
    /// What it was built from.
    pub config: MachineConfig,
    /// When the monitor began to build it.
    pub started: Instant,
    /// Ends it.
    pub exit: Arc<ExitSlot>,
    /// Its balloon.
    pub balloon: Option<BalloonHandle>,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// Its guest's calls.
    pub hypercalls: Arc<Hypercalls>,
    /// Frees the machine's memory at its end.
    pub ending: Arc<Ending>,
}

fn failed(error: impl std::error::Error) -> CommandError {
    CommandError::Failed(error.to_string())
}

const fn gate_state(stats: &GateStats) -> GateState {
    GateState {
        kicks_total: stats.kicks,
        closings_total: stats.closings,
        missed_total: stats.missed,
        waits_total: stats.waits,
        pauses: stats.pauses,
        pause_us_total: stats.pause_us,
        longest_pause_us: stats.longest_pause_us,
    }
}

const fn strict_state(stats: StrictStats) -> StrictState {
    StrictState {
        faults_total: stats.faults_total,
        vcpu_violations_total: stats.vcpu_violations_total,
        device_violations_total: stats.device_violations_total,
        discard_failures_total: stats.discard_failures_total,
    }
}

impl Controller for Control {
    fn info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.config.id.clone(),
            state: "Running",
            vmm_version: env!("CARGO_PKG_VERSION"),
            app_name: "Ebb",
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn config(&self) -> &MachineConfig {
        &self.config
    }

    fn balloon(&self) -> Result<BalloonState, CommandError> {
        let status = self.balloon_handle()?.status();
        Ok(BalloonState {
            target_bytes: status.target_bytes,
            actual_bytes: status.actual_bytes,
            deflate_on_oom: status.deflate_on_oom,
            statistics_interval_s: status.statistics_interval_s,
            lazy: status.lazy,
            free_page_reporting: status.reporting,
        })
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), CommandError> {
        let balloon = self.balloon_handle()?;
        let most = self.config.memory.size;
        if bytes > most {
            let bound = format!("the guest has {most} bytes of memory");
            return Err(CommandError::OutOfBounds {
                what: "the balloon",
                value: bytes,
                bound,
            });
        }
        balloon.set_target(bytes).map_err(failed)
    }

    fn balloon_statistics(&self) -> Result<BalloonStatistics, CommandError> {
        const MIB: u64 = 1 << 20;
        let balloon = self.balloon_handle()?;
        let (status, guest) = (balloon.status(), balloon.statistics().map_err(failed)?);
        // Both counts are 32 bits wide in the device.
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(BalloonStatistics {
            target_pages: narrow(status.target_bytes / PAGE_SIZE),
            actual_pages: narrow(status.actual_bytes / PAGE_SIZE),
            target_mib: narrow(status.target_bytes / MIB),
            actual_mib: narrow(status.actual_bytes / MIB),
            swap_in: guest.swap_in,
            swap_out: guest.swap_out,
            major_faults: guest.major_faults,
            minor_faults: guest.minor_faults,
            free_memory: guest.free_memory,
            total_memory: guest.total_memory,
            available_memory: guest.available_memory,
            disk_caches: guest.disk_caches,
            hugetlb_allocations: guest.hugetlb_allocations,
            hugetlb_failures: guest.hugetlb_failures,
        })
    }

    fn set_statistics_interval(&self, seconds: u16) -> Result<(), CommandError> {
        let balloon = self.balloon_handle()?;
        balloon.set_statistics_interval(seconds).map_err(failed)
    }

    fn lazy_memory(&self) -> LazyMemoryState {
        let memory = &self.memory;
        let (lazy, reclaim) = (memory.lazy().snapshot(), memory.reclaimer().snapshot());
        LazyMemoryState {
            generation: lazy.generation,
            quiescent_generation: memory.gate().quiescent_generation(),
            lazy_bytes: lazy.lazy_bytes,
            unmapped_bytes: lazy.unmapped_bytes,
            reclaiming_bytes: lazy.reclaiming_bytes,
            discarded_bytes: lazy.discarded_bytes,
            ranges: lazy.ranges,
            freed_bytes_total: lazy.freed_bytes_total,
            unmapped_bytes_total: lazy.unmapped_bytes_total,
            reclaimed_bytes_total: lazy.reclaimed_bytes_total,
            kept_bytes_total: lazy.kept_bytes_total,
            reused_bytes_total: lazy.reused_bytes_total,
            reused_unmapped_bytes_total: lazy.reused_unmapped_bytes_total,
            reused_discarded_bytes_total: lazy.reused_discarded_bytes_total,
            eager_bytes_total: reclaim.eager_bytes_total,
            untracked_bytes_total: lazy.untracked_bytes_total(),
            given_up_bytes_total: lazy.given_up_bytes_total,
            forgotten_bytes_total: lazy.forgotten_bytes_total,
            coalesced_bytes_total: lazy.coalesced_bytes_total,
            reuse_waits_total: lazy.reuse_waits_total,
            discard_calls_total: reclaim.discard_calls_total,
            discard_failures_total: reclaim.discard_failures_total,
            invalidate_calls_total: reclaim.invalidate_calls_total,
            invalidate_failures_total: reclaim.invalidate_failures_total,
            eager_calls_total: reclaim.eager_calls_total,
            held_slices_total: reclaim.held_slices_total,
            passing_slices_total: reclaim.passing_slices_total,
            open_slices_total: reclaim.open_slices_total,
            slice_ranges_total: reclaim.slice_ranges_total,
            pressure_events_total: reclaim.pressure_events_total,
            gate: gate_state(&reclaim.gate),
            hypercalls: self.hypercall_state(),
            reporting: self.reporting_state(),
            strict: memory
                .strict()
                .map(|strict| strict_state(strict.snapshot())),
        }
    }

    fn arenas(&self) -> Vec<ArenaState> {
        let state = |arena: &Arc<Arena>| {
            let (place, stats) = (arena.place(), arena.stats());
            ArenaState {
                id: place.id.clone(),
                gpa: place.gpa.start(),
                size_bytes: place.layout.size(),
                granule_bytes: place.layout.granule(),
                lazy_bytes: stats.lazy_bytes,
                discarded_bytes: stats.discarded_bytes,
                reclaimed_bytes_total: stats.reclaimed_bytes_total,
                reused_bytes_total: stats.reused_bytes_total,
                reuse_calls_total: stats.reuse_calls_total,
                reuse_waits_total: stats.reuse_waits_total,
                scans_total: stats.scans_total,
                scan_us: u64::try_from(stats.last_scan.as_micros()).unwrap_or(u64::MAX),
            }
        };
        self.memory.arenas().iter().map(state).collect()
    }

    fn reclaim(&self, bytes: u64) -> ReclaimOutcome {
        let outcome = self.memory.reclaimer().reclaim(bytes);
        ReclaimOutcome {
            reclaimed_bytes: outcome.bytes,
            duration_us: u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX),
        }
    }

    fn teardown(&self) -> TeardownState {
        self.ending.state()
    }

    fn set_teardown(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError> {
        self.ending.tune(workers, batch)
    }

    fn stop(&self) {
        self.exit.request(ExitReason::Stop);
    }
}

impl Control {
    fn balloon_handle(&self) -> Result<&BalloonHandle, CommandError> {
        const NO_BALLOON: CommandError = CommandError::NoDevice {
            device: "balloon",
            option: "--balloon size=0",
        };
        self.balloon.as_ref().ok_or(NO_BALLOON)
    }

    fn hypercall_state(&self) -> HypercallState {
        let stats = self.hypercalls.stats();
        HypercallState {
            lazy_free_total: stats.calls(Operation::LazyFree),
            reuse_total: stats.calls(Operation::Reuse),
            lazy_free_batch_total: stats.calls(Operation::LazyFreeBatch),
            reuse_batch_total: stats.calls(Operation::ReuseBatch),
            query_total: stats.calls(Operation::Query),
            reset_total: stats.calls(Operation::Reset),
            features_total: stats.calls(Operation::Features),
            arena_info_total: stats.calls(Operation::ArenaInfo),
            failed_total: stats.failed,
            prefaulted_bytes_total: stats.prefaulted_bytes,
            prefault_failures_total: stats.prefault_failures,
        }
    }

    fn reporting_state(&self) -> ReportingState {
        let balloon = self.balloon.as_ref();
        let found = balloon.map_or_else(ReportStats::default, BalloonHandle::reports);
        let taken = self.memory.reported().snapshot();
        let configured = self.config.balloon.as_ref();
        let mode = match configured.and_then(|balloon| balloon.free_page_reporting) {
            None => "off",
            Some(_) => match self.memory.reported().how() {
                Release::Discard => "eager",
                Release::MarkFree => "lazy",
            },
        };
        ReportingState {
            mode,
            messages_total: found.messages_total,
            ranges_total: found.ranges_total,
            bytes_total: found.bytes_total,
            poisoned_bytes_total: found.poisoned_bytes_total,
            calls_total: taken.calls_total,
            failures_total: taken.failures_total,
            discarded_bytes_total: taken.discarded_bytes_total,
            marked_bytes_total: taken.marked_bytes_total,
        }
    }
}
