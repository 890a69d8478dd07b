//! Strict mode: a debugging aid for authors of guest allocators. Memory that the guest frees lazily is discarded at once. A
//! thread that touches it before a reuse is caught by its page fault and reported, and then reads zeroes.
//!
//! The guest's memory is watched with userfaultfd. A vCPU waits for its fault inside `KVM_RUN`, because the machine was told
//! to fault synchronously (see [`crate::kvm::Machine::fault_synchronously`]). So the watcher first kicks that vCPU and then
//! makes the page: the vCPU leaves `KVM_RUN` before it enters the guest again, and its instruction pointer is still at the
//! instruction whose access was caught.

mod thread;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::faults::GuestFaults;
use crate::kvm::KickTable;
use crate::memory::{GuestRam, MissingPage};

use ebb_core::generation::Kick;
use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::range::GpaRange;
use ebb_core::release::Release;
pub use thread::{StartError, StrictThread};

#[cfg(test)]
mod tests;

/// Maximum size in bytes of a chunk that is discarded: a reuse may have to wait for it.
const CHUNK: u64 = 8 << 20;

/// Maximum number of caught accesses that are reported for one exit of a vCPU. Only instructions that KVM emulates make more
/// than one.
const MAX_CAUGHT: usize = 16;

ebb_core::metrics! {
    /// What strict mode has caught since the machine started. A page is caught once, until it is freed again.
    pub struct StrictStats from struct Counters {
        /// Missing pages that were made, for any reason.
        faults_total: Counter,
        /// Lazily free pages that a vCPU touched.
        vcpu_violations_total: Counter,
        /// Lazily free pages that a thread of the monitor touched for the guest.
        device_violations_total: Counter,
        /// Chunks of lazily free memory that the host would not take. Accesses to them are not caught.
        discard_failures_total: Counter,
    }
}

/// An access to lazily free memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    page: u64,
    write: bool,
}

impl Access {
    const fn verb(self) -> &'static str {
        if self.write { "writes to" } else { "reads" }
    }
}

/// What was caught of one vCPU.
#[derive(Default)]
struct Vcpu {
    /// Its thread is in `KVM_RUN`, so its accesses are the guest's.
    in_guest: AtomicBool,
    /// True if `caught` is not empty.
    any: AtomicBool,
    caught: Mutex<Vec<Access>>,
}

impl Vcpu {
    fn caught(&self) -> MutexGuard<'_, Vec<Access>> {
        self.caught.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Strict mode of one machine.
///
/// **Locks**: `caught` of a vCPU is taken alone and held for moments. The watcher takes it and the tracker's lock, one after
/// the other. A thread that touches guest memory may wait for the watcher, so no thread may touch guest memory while it
/// holds one of these locks.
pub struct Strict {
    lazy: Arc<LazyMemory>,
    ram: Arc<GuestRam>,
    kicks: Arc<KickTable>,
    vcpus: Box<[Vcpu]>,
    faults: GuestFaults,
    counters: Counters,
}

impl Strict {
    /// Strict mode for the memory `ram` of a machine with `vcpus` vCPUs, whose threads register with `kicks`.
    #[must_use]
    pub fn new(
        lazy: Arc<LazyMemory>,
        ram: Arc<GuestRam>,
        kicks: Arc<KickTable>,
        vcpus: usize,
    ) -> Self {
        Self {
            lazy,
            ram,
            kicks,
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            faults: GuestFaults::new("strict"),
            counters: Counters::default(),
        }
    }

    /// Frees `ranges` as [`LazyMemory::free`] does, and discards them before it returns. What is freed again without a reuse
    /// is discarded again, so that the next access is caught, too.
    pub fn free(&self, ranges: &[GpaRange]) {
        self.lazy.reuse(ranges);
        self.lazy.free(ranges);
        for &range in ranges {
            let mut sweep = Sweep::new(Pieces::Any, u64::MAX).within(range);
            while let Some(chunk) = self.lazy.take_chunk(&mut sweep, CHUNK) {
                match self.ram.release_range(chunk.range(), Release::Discard) {
                    Ok(_) => chunk.discarded(),
                    Err(error) => {
                        self.counters.discard_failures_total.increment();
                        tracing::debug!(%error, "accesses to this are not caught");
                    }
                }
            }
        }
    }

    /// The thread of the vCPU `index` is in `KVM_RUN` until the returned value is dropped.
    pub fn in_guest(&self, index: usize) -> InGuest<'_> {
        self.vcpus[index].in_guest.store(true, Ordering::Release);
        InGuest(&self.vcpus[index])
    }

    /// Returns true if the vCPU `index` was caught since [`Strict::tell`] was last called for it.
    #[must_use]
    pub fn is_caught(&self, index: usize) -> bool {
        self.vcpus[index].any.load(Ordering::Acquire)
    }

    /// Reports the caught accesses of the vCPU `index`, whose instruction pointer is `rip`. Must be called by its thread
    /// between an exit and the next entry.
    pub fn tell(&self, index: usize, rip: u64) {
        let vcpu = &self.vcpus[index];
        vcpu.any.store(false, Ordering::Release);
        for access in std::mem::take(&mut *vcpu.caught()) {
            self.faults.report(format_args!(
                "vCPU {index} at RIP {rip:#x} {} page {:#x}, which is lazily free: no REUSE since its LAZY_FREE",
                access.verb(),
                access.page
            ));
        }
    }

    /// The counters.
    #[must_use]
    pub fn snapshot(&self) -> StrictStats {
        self.counters.snapshot()
    }

    /// Counts an access whose page is about to be made, and reports it if the page is lazily free.
    fn judge(&self, missing: &MissingPage) {
        self.counters.faults_total.increment();
        if self.lazy.survey(missing.page).totals.tracked() == 0 {
            return;
        }
        let access = Access {
            page: missing.page.start(),
            write: missing.write,
        };
        let vcpu = self.kicks.vcpu_of(missing.thread);
        let inside = |index: &usize| self.vcpus[*index].in_guest.load(Ordering::Acquire);
        match vcpu.filter(inside) {
            Some(index) => {
                self.counters.vcpu_violations_total.increment();
                self.catch(index, access);
            }
            None => {
                self.counters.device_violations_total.increment();
                self.report_thread(missing.thread, access);
            }
        }
    }

    fn catch(&self, index: usize, access: Access) {
        let vcpu = &self.vcpus[index];
        let mut caught = vcpu.caught();
        if caught.len() < MAX_CAUGHT {
            caught.push(access);
        }
        drop(caught);
        vcpu.any.store(true, Ordering::Release);
        self.kicks.kick(index);
    }

    fn report_thread(&self, thread: i32, access: Access) {
        let name = crate::sys::thread_name(thread);
        let name = name.as_deref().unwrap_or("of the host's kernel");
        self.faults.report(format_args!(
            "device: the thread {name} {} page {:#x}, which is lazily free: no REUSE since its LAZY_FREE",
            access.verb(),
            access.page
        ));
    }
}

/// See [`Strict::in_guest`].
#[must_use = "the vCPU is out when this is dropped"]
pub struct InGuest<'a>(&'a Vcpu);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.in_guest.store(false, Ordering::Release);
    }
}
