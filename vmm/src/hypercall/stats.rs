//! Counters of calls.

use ebb_core::metrics::Counter;
use ebb_hypercall_abi::Operation;

ebb_core::metrics! {
    /// The guest's calls since the machine started, by operation. Calls that failed are included.
    pub struct HypercallStats from pub(super) struct Counters {
        /// Calls of `LAZY_FREE`.
        lazy_free_total: Counter,
        /// Calls of `REUSE`.
        reuse_total: Counter,
        /// Calls of `LAZY_FREE_BATCH`.
        lazy_free_batch_total: Counter,
        /// Calls of `REUSE_BATCH`.
        reuse_batch_total: Counter,
        /// Calls of `QUERY`.
        query_total: Counter,
        /// Calls of `RESET`.
        reset_total: Counter,
        /// Calls of `FEATURES`.
        features_total: Counter,
        /// Calls of `ARENA_INFO`.
        arena_info_total: Counter,
        /// Calls of `KERNEL_NOTE`.
        kernel_note_total: Counter,
        /// Calls that failed, those of unknown operations included.
        failed_total: Counter,
        /// Memory populated because a reuse asked for it.
        prefaulted_bytes_total: Counter of Bytes,
        /// Ranges that could not be populated.
        prefault_failures_total: Counter,
    }
}

impl Counters {
    /// The counter of an operation.
    pub const fn calls(&self, operation: Operation) -> &Counter {
        match operation {
            Operation::LazyFree => &self.lazy_free_total,
            Operation::Reuse => &self.reuse_total,
            Operation::LazyFreeBatch => &self.lazy_free_batch_total,
            Operation::ReuseBatch => &self.reuse_batch_total,
            Operation::Query => &self.query_total,
            Operation::Reset => &self.reset_total,
            Operation::Features => &self.features_total,
            Operation::ArenaInfo => &self.arena_info_total,
            Operation::KernelNote => &self.kernel_note_total,
        }
    }
}
