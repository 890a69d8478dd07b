//! Counters of calls.

use std::sync::atomic::{AtomicU64, Ordering};

use ebb_hypercall_abi::Operation;

const OPERATIONS: usize = Operation::ALL.len();

/// Counters since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HypercallStats {
    /// Calls that made sense, failed ones included, by number of the operation minus one.
    pub calls: [u64; OPERATIONS],
    /// Calls that failed, whether they made sense or not.
    pub failed: u64,
    /// Bytes populated for the guest.
    pub prefaulted_bytes: u64,
    /// Ranges that could not be populated.
    pub prefault_failures: u64,
}

impl HypercallStats {
    /// Calls of one operation.
    #[must_use]
    pub const fn calls(&self, operation: Operation) -> u64 {
        self.calls[operation as usize - 1]
    }
}

/// The same, as the vCPU threads share them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    calls: [AtomicU64; OPERATIONS],
    pub failed: AtomicU64,
    pub prefaulted_bytes: AtomicU64,
    pub prefault_failures: AtomicU64,
}

impl Counters {
    pub fn count(&self, operation: Operation) {
        add(&self.calls[operation as usize - 1], 1);
    }

    pub fn snapshot(&self) -> HypercallStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HypercallStats {
            calls: std::array::from_fn(|index| read(&self.calls[index])),
            failed: read(&self.failed),
            prefaulted_bytes: read(&self.prefaulted_bytes),
            prefault_failures: read(&self.prefault_failures),
        }
    }
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
