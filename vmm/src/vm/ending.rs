//! How the guest's memory is freed, and by whom.

use std::sync::{Arc, Mutex, PoisonError};

use ebb_core::range::{BLOCK_SIZE, GpaRange};

use crate::config::MemoryConfig;
use crate::control::{CommandError, TeardownState};
use crate::guardian::Guardian;
use crate::guest_memory::GuestMemory;
use crate::kvm;
use crate::reclaim::PressureSource;
use crate::sys::heir::MAX_WORKERS;
use crate::sys::{self, Legacy, Part, Pins, nodes};
use crate::teardown::plan::{DEFAULT_BATCH, DEFAULT_HUGE_BATCH};
use crate::teardown::{self, Pages, Plan, Region, Tuning, plan};

/// What is needed to free the guest's memory at the end, whoever will do it.
pub struct Ending {
    guardian: &'static Guardian,
    memory: Arc<GuestMemory>,
    pages: Pages,
    /// What keeps the machine in KVM alive, as long as its vCPUs' threads run.
    pins: Arc<Pins>,
    tuning: Mutex<Tuning>,
}

impl Ending {
    /// From here on `memory` is freed fast even if the monitor is killed.
    pub fn new(
        guardian: &'static Guardian,
        memory: Arc<GuestMemory>,
        pins: Arc<Pins>,
        config: &MemoryConfig,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let pages = if config.hugepages {
            Pages::Huge
        } else {
            Pages::Small
        };
        let ending = Self {
            guardian,
            memory,
            pages,
            pins,
            tuning: Mutex::new(Tuning::for_host(cores, nodes::count())),
        };
        ending.entrust(&ending.plan(|_| 0));
        ending
    }

    /// The API's socket, by device and inode, is removed even if the monitor is killed.
    pub fn watch_socket(&self, identity: (u64, u64)) {
        self.guardian.watch_socket(identity);
    }

    /// Where the vCPUs' threads say what they have mapped.
    pub fn pins(&self) -> Arc<Pins> {
        Arc::clone(&self.pins)
    }

    /// How it is done.
    pub fn state(&self) -> TeardownState {
        let tuning = self.tuning();
        let default = match self.pages {
            Pages::Small => DEFAULT_BATCH,
            Pages::Huge => DEFAULT_HUGE_BATCH,
        };
        TeardownState {
            workers: tuning.workers,
            batch_bytes: tuning.batch.unwrap_or(default),
            guardian: self.guardian.is_there(),
        }
    }

    /// Does it otherwise from now on.
    ///
    /// # Errors
    /// [`CommandError::OutOfBounds`].
    pub fn tune(&self, workers: Option<usize>, batch: Option<u64>) -> Result<(), CommandError> {
        let mut tuning = self.tuning();
        if let Some(workers) = workers {
            if !(1..=MAX_WORKERS).contains(&workers) {
                return Err(CommandError::OutOfBounds {
                    what: "workers",
                    value: workers as u64,
                    bound: format!("there can be 1 to {MAX_WORKERS}"),
                });
            }
            tuning.workers = workers;
        }
        if batch == Some(0) {
            return Err(CommandError::OutOfBounds {
                what: "the batch",
                value: 0,
                bound: "it must be 2 MiB or more".to_owned(),
            });
        }
        tuning.batch = batch.or(tuning.batch);
        *self.tuning.lock().unwrap_or_else(PoisonError::into_inner) = tuning;
        self.entrust(&self.plan(|_| 0));
        Ok(())
    }

    /// Frees the memory, or leaves that to the heir: then this returns at once. Whoever does it closes `beside`
    /// the work what takes long: KVM releases its own tables serially, and the kernel waits before it forgets a trigger
    /// of memory pressure.
    ///
    /// No thread may need the memory or KVM any more.
    pub fn free(&self, beside: (kvm::Machine, Option<PressureSource>)) {
        let plan = if nodes::count() > 1 {
            self.plan(|batch| {
                let part = self.part(batch);
                part.and_then(|part| nodes::node_at(part.address))
                    .unwrap_or(0)
            })
        } else {
            self.plan(|_| 0)
        };
        if plan.workers() > 1 && self.guardian.frees() {
            self.entrust(&plan);
            // The heir closes its descriptors: they are one process's as much as the other's.
            std::mem::forget(beside);
            return;
        }
        self.guardian.disinherit();
        let before = sys::resident_bytes();
        let mut report = teardown::execute(&plan, self.memory.ram(), move || drop(beside));
        let freed = before.zip(sys::resident_bytes());
        report.bytes = freed.map_or(report.bytes, |(a, b)| a.saturating_sub(b));
        report.log();
    }

    fn tuning(&self) -> Tuning {
        *self.tuning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&self, node_of: impl FnMut(GpaRange) -> u32) -> Plan {
        let regions = self.memory.ram().regions().iter().map(|region| Region {
            range: region.gpa,
            pages: self.pages,
            unit: region.file.unwrap_or(BLOCK_SIZE),
        });
        plan(regions, self.tuning(), node_of)
    }

    fn entrust(&self, plan: &Plan) {
        // A batch is a part of a region, and a region fits the address space.
        let parts = plan.batches().iter().filter_map(|batch| self.part(*batch));
        self.guardian.entrust(Legacy {
            parts: parts.collect(),
            workers: plan.workers(),
            pins: Arc::clone(&self.pins),
        });
    }

    /// What a batch is in this process.
    fn part(&self, batch: GpaRange) -> Option<Part> {
        let regions = self.memory.ram().regions();
        let region = regions.iter().find(|region| region.gpa.contains(batch))?;
        let offset = batch.start() - region.gpa.start();
        Some(Part {
            address: region.host + usize::try_from(offset).ok()?,
            len: usize::try_from(batch.len()).ok()?,
            shared: region.file.is_some(),
        })
    }
}
