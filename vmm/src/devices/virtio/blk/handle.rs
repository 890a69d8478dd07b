//! What a disk's queues share, and the operator's handle of it.

use std::convert::Infallible;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::worker::DiskCounters;
use super::{Disk, DiskError, DiskStats};
use crate::config::{DiskConfig, Rate};
use crate::devices::virtio::VirtioInterrupt;
use crate::devices::virtio::queue::{GuestFaults, Limiter};
use crate::sys::transfer::Kind;

/// How long an exchange waits for requests that are under way.
const PATIENCE: Duration = Duration::from_secs(10);

/// The disk, and who hears when nobody uses it any more.
struct Current {
    disk: Arc<Disk>,
    unused: Receiver<Infallible>,
}

/// What the device, its queues and the operator share.
pub(super) struct Shared {
    config: DiskConfig,
    current: Mutex<Current>,
    /// Notifies the driver, while there is one.
    pub driver: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
    /// The device offers to free and zero what the guest does not need.
    pub discards: bool,
    /// Size of a block in bytes, as the guest is told at the start.
    pub block: u64,
    limiter: Mutex<Limiter>,
    pub counters: Arc<DiskCounters>,
    pub faults: GuestFaults,
}

impl Shared {
    pub fn new(name: String, mut disk: Disk, config: &DiskConfig) -> Self {
        let (user, unused) = mpsc::channel();
        disk.set_user(user);
        Self {
            config: config.clone(),
            discards: disk.can_discard(),
            block: disk.block(),
            current: Mutex::new(Current {
                disk: Arc::new(disk),
                unused,
            }),
            driver: Mutex::default(),
            limiter: Mutex::new(Limiter::new(config.bw, config.ops)),
            counters: Arc::default(),
            faults: GuestFaults::new(name),
        }
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk as it is now. Requests that are under way may be for an older one.
    pub fn disk(&self) -> Arc<Disk> {
        Arc::clone(&self.current().disk)
    }

    pub fn limiter(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the driver, if there is one, that the disk's size may be another.
    fn tell(&self) {
        let driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = &*driver
            && let Err(error) = driver.configuration_changed()
        {
            self.faults.report(format_args!("interrupt: {error}"));
        }
    }
}

/// The operator's handle of a disk.
#[derive(Clone)]
pub struct DiskHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) kind: Kind,
}

impl std::fmt::Debug for DiskHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("DiskHandle").finish()
    }
}

impl DiskHandle {
    /// Path of the file that it is on.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.shared.disk().path().to_owned()
    }

    /// Returns true if the guest may only read.
    #[must_use]
    pub fn is_readonly(&self) -> bool {
        self.shared.disk().is_readonly()
    }

    /// Size in bytes, as the guest is told.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.disk().bytes()
    }

    /// How its requests are carried out.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The disk's counters.
    #[must_use]
    pub fn stats(&self) -> DiskStats {
        self.shared.counters.snapshot()
    }

    /// Takes on the size that the file has now, and tells the guest. Requests beyond a nearer end fail from now on.
    ///
    /// # Errors
    /// [`DiskError`]; the disk is as it was.
    pub fn measure(&self) -> Result<(), DiskError> {
        let mut current = self.shared.current();
        current.disk = Arc::new(current.disk.measured()?);
        drop(current);
        self.shared.tell();
        Ok(())
    }

    /// Goes on with `file`, which was opened at `path`: locks and checks it, and tells the guest its size. Returns when no
    /// request uses the old file any more; its lock is released then.
    ///
    /// # Errors
    /// [`DiskError`]; but for [`DiskError::Busy`] the disk is as it was.
    pub fn exchange(&self, file: File, path: &Path) -> Result<(), DiskError> {
        let shared = &self.shared;
        let config = DiskConfig {
            path: path.to_owned(),
            ..shared.config.clone()
        };
        let mut disk = Disk::take(file, &config)?;
        if disk.block() > shared.block {
            return Err(DiskError::Block {
                path: config.path,
                block: disk.block(),
                told: shared.block,
            });
        }
        let (user, unused) = mpsc::channel();
        disk.set_user(user);
        let new = Current {
            disk: Arc::new(disk),
            unused,
        };
        let Current { disk, unused } = std::mem::replace(&mut *shared.current(), new);
        let old = disk.path().to_owned();
        drop(disk);
        shared.tell();
        match unused.recv_timeout(PATIENCE) {
            Err(mpsc::RecvTimeoutError::Timeout) => Err(DiskError::Busy(old)),
            _ => Ok(()),
        }
    }

    /// Sets limits; `None` leaves one as it is.
    pub fn limit(&self, bandwidth: Option<Rate>, operations: Option<Rate>) {
        self.shared.limiter().set(bandwidth, operations);
    }
}
