//! Carries out what the operator asks of a running machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ebb_core::range::PAGE_SIZE;
use ebb_core::release::Release;

use super::counters::DeviceCounters;
use super::drives::Drives;
use super::instance::Instance;
use super::nets::Nets;
use super::pause::Pausing;
use super::snapshot::Snapshots;
use crate::arena::Arena;
use crate::control::{
    ArenaState, AutoBalloonState, BalloonState, BalloonStatistics, CommandError, Controller,
    DevicesState, DriveState, DriveUpdate, FreePages, LazyMemoryState, NetUpdate, ReclaimOutcome,
    ReportingMode, ReportingState, SnapshotKind, TeardownState,
};
use crate::devices::virtio::balloon::BalloonHandle;
use crate::guest_memory::GuestMemory;
use crate::hypercall::Hypercalls;
use crate::reclaim::{BalloonReport, ReclaimStats, Until};
use crate::teardown::{MAX_WORKERS, Teardown, TuneError};

const MIB: u64 = 1 << 20;

/// The parts of a running machine that the operator can ask or change.
pub struct Control {
    /// What it was built from.
    pub instance: Arc<Instance>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonHandle>,
    /// The machine's disks.
    pub drives: Drives,
    /// Its network interfaces.
    pub nets: Nets,
    /// What the balloon is doing, if it runs itself.
    pub auto: Option<Arc<BalloonReport>>,
    /// What counts what the devices do.
    pub counters: DeviceCounters,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The guest's calls.
    pub hypercalls: Arc<Hypercalls>,
    /// Frees the guest's memory at the end.
    pub teardown: Arc<Teardown>,
    /// Pauses and resumes the machine.
    pub pausing: Arc<Pausing>,
    /// Makes snapshots.
    pub snapshots: Arc<Snapshots>,
}

fn failed(error: impl std::error::Error) -> CommandError {
    CommandError::Failed(error.to_string())
}

fn out_of_bounds(error: TuneError) -> CommandError {
    let (what, value, bound) = match error {
        TuneError::Workers(workers) => {
            let bound = format!("there can be 1 to {MAX_WORKERS}");
            ("workers", workers as u64, bound)
        }
        TuneError::Batch => ("the batch", 0, "it must be 2 MiB or more".to_owned()),
    };
    CommandError::OutOfBounds { what, value, bound }
}

impl Controller for Control {
    fn balloon(&self) -> Result<BalloonState, CommandError> {
        let status = self.balloon_handle()?.status();
        Ok(BalloonState {
            amount_mib: status.target_bytes / MIB,
            actual_mib: status.actual_bytes / MIB,
            deflate_on_oom: status.deflate_on_oom,
            stats_polling_interval_s: status.statistics_interval_s,
            lazy: status.lazy,
            free_page_reporting: status.reporting,
            auto: self.auto.as_ref().map(|auto| AutoBalloonState {
                floor_mib: status.floor_bytes / MIB,
                reserve_mib: auto.bounds().reserve / MIB,
                doing: auto.doing(),
                stats: auto.stats(),
            }),
        })
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), CommandError> {
        let balloon = self.balloon_handle()?;
        let max = self.instance.config.memory.size;
        if bytes > max {
            let bound = format!("the guest has {max} bytes of memory");
            return Err(CommandError::OutOfBounds {
                what: "the balloon",
                value: bytes,
                bound,
            });
        }
        balloon.set_target(bytes).map_err(failed)
    }

    fn balloon_statistics(&self) -> Result<BalloonStatistics, CommandError> {
        let balloon = self.balloon_handle()?;
        let (status, guest) = (balloon.status(), balloon.statistics().map_err(failed)?);
        // Both counts are 32 bits wide in the device.
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(BalloonStatistics {
            target_pages: narrow(status.target_bytes / PAGE_SIZE),
            actual_pages: narrow(status.actual_bytes / PAGE_SIZE),
            target_mib: narrow(status.target_bytes / MIB),
            actual_mib: narrow(status.actual_bytes / MIB),
            guest,
        })
    }

    fn set_statistics_interval(&self, seconds: u16) -> Result<(), CommandError> {
        let balloon = self.balloon_handle()?;
        balloon.set_statistics_interval(seconds).map_err(failed)
    }

    fn devices(&self) -> DevicesState {
        self.counters.state()
    }

    fn lazy_memory(&self) -> LazyMemoryState {
        let memory = &self.memory;
        LazyMemoryState {
            lazy: memory.lazy().snapshot(),
            reclaim: ReclaimStats {
                lazy_resident_bytes: memory.lazy_resident_bytes(),
                ..memory.reclaimer().snapshot()
            },
            gate: memory.gate().stats(),
            hypercalls: self.hypercalls.stats(),
            free_pages: FreePages {
                state: memory.kernel().status(),
                stats: memory.reclaimer().free_pages(),
            },
            reporting: self.reporting_state(),
            strict: memory.strict().map(|strict| strict.snapshot()),
        }
    }

    fn arenas(&self) -> Vec<ArenaState> {
        let state = |arena: &Arc<Arena>| {
            let place = arena.place();
            ArenaState {
                id: place.id.clone(),
                gpa: place.gpa.start(),
                size_bytes: place.layout.size(),
                granule_bytes: place.layout.granule(),
                stats: arena.stats(),
            }
        };
        self.memory.arenas().iter().map(state).collect()
    }

    fn reclaim(&self, bytes: u64, timeout: Option<Duration>) -> ReclaimOutcome {
        let reclaimer = self.memory.reclaimer();
        let outcome = reclaimer.reclaim_until(bytes, Until::after(timeout));
        ReclaimOutcome {
            reclaimed_bytes: outcome.bytes,
            duration_us: u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX),
            cut_short: outcome.cut_short,
        }
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.pausing.pause().map_err(failed)
    }

    fn resume(&self) -> Result<(), CommandError> {
        self.pausing.resume().map_err(failed)
    }

    fn drives(&self) -> Vec<DriveState> {
        self.drives.states()
    }

    fn update_drive(&self, id: &str, update: &DriveUpdate) -> Result<(), CommandError> {
        self.drives.update(id, update)
    }

    fn update_net(&self, id: &str, update: &NetUpdate) -> Result<(), CommandError> {
        self.nets.update(id, update)
    }

    fn snapshot(
        &self,
        kind: SnapshotKind,
        memory: PathBuf,
        state: PathBuf,
    ) -> Result<(), CommandError> {
        let created = self.snapshots.create(kind, memory, state);
        created.map_err(CommandError::Failed)
    }

    fn teardown(&self) -> TeardownState {
        let tuning = self.teardown.tuning();
        TeardownState {
            workers: tuning.workers,
            batch_bytes: tuning.batch,
            guardian: self.teardown.has_reaper(),
        }
    }

    fn set_teardown(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError> {
        self.teardown.tune(workers, batch).map_err(out_of_bounds)
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

    fn reporting_state(&self) -> ReportingState {
        let configured = self.instance.config.balloon.as_ref();
        let mode = match configured.and_then(|balloon| balloon.free_page_reporting) {
            None => ReportingMode::Off,
            Some(_) => match self.memory.reported().how() {
                Release::Discard => ReportingMode::Eager,
                Release::MarkFree => ReportingMode::Lazy,
            },
        };
        let balloon = self.balloon.as_ref();
        ReportingState {
            mode,
            found: balloon.map(BalloonHandle::reports).unwrap_or_default(),
            taken: self.memory.reported().snapshot(),
        }
    }
}
