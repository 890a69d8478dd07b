//! The operator's handle of the balloon, and the state that it shares with the device.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebb_core::range::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::wire::{
    Config, F_DEFLATE_ON_OOM, F_MUST_TELL_HOST, F_PAGE_POISON, F_REPORTING, F_STATS_VQ, Statistics,
};
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::GuestFaults;

/// A request to the balloon cannot be met.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// More than fits into the device's 32-bit page count.
    #[error("a balloon of {bytes} bytes is too large: at most {max}")]
    TargetTooLarge {
        /// Bytes asked for.
        bytes: u64,
        /// Maximum target in bytes.
        max: u64,
    },
    /// Not a whole number of pages.
    #[error("a balloon of {bytes} bytes is not a multiple of {PAGE_SIZE}")]
    TargetUnaligned {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The device was built without a statistics queue.
    #[error("the balloon has no statistics: start it with a statistics interval")]
    NoStatistics,
    /// Statistics cannot be switched off once they are on.
    #[error("a statistics interval of 0 seconds is not possible: at least 1")]
    IntervalZero,
    /// A thread, or the event that wakes it, could not be made.
    #[error("the balloon has no thread, or no event that wakes it: {0}")]
    Thread(String),
}

/// The balloon's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes that the host asks for.
    pub target_bytes: u64,
    /// Bytes that an operator has asked for: the target, unless the balloon runs itself and is larger.
    pub floor_bytes: u64,
    /// Bytes that the guest says it has handed back.
    pub actual_bytes: u64,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: off.
    pub statistics_interval_s: u16,
    /// The guest's driver is bound and tells the host before it reuses a page: frees are lazy.
    pub lazy: bool,
    /// The guest's driver is bound and reports free pages.
    pub reporting: bool,
}

ebb_core::metrics! {
    /// What the guest has reported free since the machine started.
    pub struct ReportStats from struct Reports {
        /// Messages with reports.
        messages_total: Counter,
        /// Reported ranges that are RAM, before they are merged.
        ranges_total: Counter,
        /// Memory in those ranges.
        bytes_total: Counter of Bytes,
        /// The part of that memory that was left alone, because the guest fills free pages with something other than
        /// zero.
        poisoned_bytes_total: Counter of Bytes,
    }
}

/// What the driver negotiated, while it is bound.
struct Driver {
    features: u64,
    interrupt: Arc<dyn VirtioInterrupt>,
}

/// Pages that are asked for. The larger one counts.
#[derive(Clone, Copy, Default)]
struct Targets {
    /// By an operator.
    floor: u32,
    /// By the balloon that runs itself; 0: not more than by the operator.
    auto: u32,
}

/// The latest statistics, and when they came.
#[derive(Clone, Copy, Default)]
struct Told {
    statistics: Statistics,
    at: Option<Instant>,
}

/// What a snapshot keeps of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BalloonSaved {
    /// Pages that an operator asks for.
    floor: u32,
    /// Pages that the guest has handed back.
    actual: u32,
    /// What the guest fills free pages with.
    poison: u32,
    /// Seconds between two requests for statistics.
    interval: u16,
}

/// The state that device, workers and handles share.
pub(super) struct Shared {
    /// Features on offer.
    pub features: u64,
    num_pages: AtomicU32,
    actual: AtomicU32,
    poison: AtomicU32,
    reports: Reports,
    interval: AtomicU16,
    targets: Mutex<Targets>,
    /// The interval has changed.
    pub wake: EventFd,
    driver: Mutex<Option<Driver>>,
    statistics: Mutex<Told>,
    pub faults: GuestFaults,
}

impl Shared {
    pub fn new(features: u64, interval: u16, wake: EventFd) -> Self {
        Self {
            features,
            num_pages: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            reports: Reports::default(),
            interval: AtomicU16::new(interval),
            targets: Mutex::default(),
            wake,
            driver: Mutex::new(None),
            statistics: Mutex::default(),
            faults: GuestFaults::new("balloon"),
        }
    }

    pub fn config(&self) -> Config {
        Config {
            num_pages: self.num_pages.load(Ordering::Relaxed),
            actual: self.actual.load(Ordering::Relaxed),
            poison_val: self.poison.load(Ordering::Relaxed),
        }
    }

    /// Stores the parts of the configuration that a driver can write.
    pub fn set_config(&self, config: Config) {
        self.actual.store(config.actual, Ordering::Relaxed);
        self.poison.store(config.poison_val, Ordering::Relaxed);
    }

    /// Returns true if reported pages must keep their contents. Discarded pages read as zero, and a device must not change
    /// reported pages to anything but the driver's poison (virtio 1.3, 5.5.6.7.2).
    pub fn keeps_reported(&self, features: u64) -> bool {
        features & F_PAGE_POISON != 0 && self.config().poison_val != 0
    }

    /// Counts what a pass over the reporting queue has found.
    pub fn count_reports(&self, found: ReportStats) {
        let reports = &self.reports;
        reports.messages_total.add(found.messages_total);
        reports.ranges_total.add(found.ranges_total);
        reports.bytes_total.add(found.bytes_total);
        reports.poisoned_bytes_total.add(found.poisoned_bytes_total);
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> BalloonSaved {
        let targets = *(self.targets.lock()).unwrap_or_else(PoisonError::into_inner);
        let config = self.config();
        BalloonSaved {
            floor: targets.floor,
            actual: config.actual,
            poison: config.poison_val,
            interval: self.interval(),
        }
    }

    /// Takes up what a snapshot has kept.
    pub fn restore(&self, saved: &BalloonSaved) {
        self.change_targets(|targets| targets.floor = saved.floor);
        self.actual.store(saved.actual, Ordering::Relaxed);
        self.poison.store(saved.poison, Ordering::Relaxed);
        self.interval.store(saved.interval, Ordering::Relaxed);
    }

    pub fn interval(&self) -> u16 {
        self.interval.load(Ordering::Relaxed)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_statistics(&self, statistics: Statistics) {
        let at = Some(Instant::now());
        *self.told() = Told { statistics, at };
    }

    /// Changes what is asked for, for the driver to read.
    fn change_targets(&self, change: impl FnOnce(&mut Targets)) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut targets);
        if targets.auto <= targets.floor {
            targets.auto = 0;
        }
        let pages = targets.floor.max(targets.auto);
        self.num_pages.store(pages, Ordering::Relaxed);
    }

    /// Asks the driver for what is to be handed back.
    fn ask(&self, change: impl FnOnce(&mut Targets)) {
        self.change_targets(change);
        if let Some(driver) = self.driver().as_ref() {
            let told = driver.interrupt.configuration_changed();
            told.unwrap_or_else(|error| tracing::warn!("balloon: interrupt: {error}"));
        }
    }

    fn driver(&self) -> MutexGuard<'_, Option<Driver>> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bind(&self, features: u64, interrupt: Arc<dyn VirtioInterrupt>) {
        *self.driver() = Some(Driver {
            features,
            interrupt,
        });
    }

    /// Forgets the driver, its statistics, and what it was asked for beyond an operator's wish.
    pub fn unbind(&self) {
        *self.driver() = None;
        *self.told() = Told::default();
        self.change_targets(|targets| targets.auto = 0);
        self.actual.store(0, Ordering::Relaxed);
        self.poison.store(0, Ordering::Relaxed);
    }
}

/// The number of pages of `bytes` bytes.
fn pages(bytes: u64) -> Result<u32, BalloonError> {
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(BalloonError::TargetUnaligned { bytes });
    }
    let max = u64::from(u32::MAX) * PAGE_SIZE;
    u32::try_from(bytes / PAGE_SIZE).map_err(|_| BalloonError::TargetTooLarge { bytes, max })
}

/// The operator's handle of a balloon.
#[derive(Clone)]
pub struct BalloonHandle {
    pub(super) shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Asks the guest to hand back `bytes`, a multiple of 4 KiB. The guest does so when it can.
    ///
    /// # Errors
    /// [`BalloonError::TargetTooLarge`] or [`BalloonError::TargetUnaligned`].
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        let floor = pages(bytes)?;
        self.shared.ask(|targets| targets.floor = floor);
        Ok(())
    }

    /// Asks the guest to hand back `bytes`, a multiple of 4 KiB, or what [`BalloonHandle::set_target`] has asked for, if
    /// that is more. Forgotten when the driver goes.
    ///
    /// # Errors
    /// [`BalloonError::TargetTooLarge`] or [`BalloonError::TargetUnaligned`].
    pub fn set_auto_target(&self, bytes: u64) -> Result<(), BalloonError> {
        let auto = pages(bytes)?;
        self.shared.ask(|targets| targets.auto = auto);
        Ok(())
    }

    /// Target, actual size and mode.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        let config = self.shared.config();
        let targets = *(self.shared.targets.lock()).unwrap_or_else(PoisonError::into_inner);
        let driver = self.shared.driver();
        let negotiated = |feature| {
            driver
                .as_ref()
                .is_some_and(|driver| driver.features & feature != 0)
        };
        BalloonStatus {
            target_bytes: u64::from(config.num_pages) * PAGE_SIZE,
            floor_bytes: u64::from(targets.floor) * PAGE_SIZE,
            actual_bytes: u64::from(config.actual) * PAGE_SIZE,
            deflate_on_oom: self.shared.features & F_DEFLATE_ON_OOM != 0,
            statistics_interval_s: self.shared.interval(),
            lazy: negotiated(F_MUST_TELL_HOST),
            reporting: negotiated(F_REPORTING),
        }
    }

    /// What the guest has reported free.
    #[must_use]
    pub fn reports(&self) -> ReportStats {
        self.shared.reports.snapshot()
    }

    /// The latest statistics; all `None` before the first ones, and after the driver is gone.
    ///
    /// # Errors
    /// [`BalloonError::NoStatistics`].
    pub fn statistics(&self) -> Result<Statistics, BalloonError> {
        if self.shared.features & F_STATS_VQ == 0 {
            return Err(BalloonError::NoStatistics);
        }
        Ok(self.shared.told().statistics)
    }

    /// The latest statistics, and how old they are; `None` before the first ones, and after the driver is gone.
    #[must_use]
    pub fn latest(&self) -> Option<(Statistics, Duration)> {
        let told = *self.shared.told();
        Some((told.statistics, told.at?.elapsed()))
    }

    /// Asks for statistics every `seconds` from now on.
    ///
    /// # Errors
    /// [`BalloonError::NoStatistics`] or [`BalloonError::IntervalZero`].
    pub fn set_statistics_interval(&self, seconds: u16) -> Result<(), BalloonError> {
        if self.shared.features & F_STATS_VQ == 0 {
            return Err(BalloonError::NoStatistics);
        }
        if seconds == 0 {
            return Err(BalloonError::IntervalZero);
        }
        self.shared.interval.store(seconds, Ordering::Relaxed);
        // The counter can only be full when it is readable anyway.
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    /// Mistakes of guests so far.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.shared.faults.count()
    }
}
