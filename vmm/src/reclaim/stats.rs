//! Counters of reclaim.

ebb_core::metrics! {
    /// What reclaim has done since the machine started.
    pub struct ReclaimStats from pub(super) struct Counters {
        /// The latest generation that every vCPU in the guest has seen. What was unmapped until then can be discarded
        /// without an interrupt.
        quiescent_generation: Gauge,
        /// Lazily free RAM, in whatever state, that the host still holds in memory or swap. Looked at when it is asked for;
        /// what takes longer than 1 ms is estimated from a part.
        lazy_resident_bytes: Gauge of Bytes,
        /// System calls that discard lazy or unmapped memory.
        discard_calls_total: Counter,
        /// Discards that failed, eager ones included.
        discard_failures_total: Counter,
        /// System calls that invalidate lazy memory.
        invalidate_calls_total: Counter,
        /// Invalidations that failed.
        invalidate_failures_total: Counter,
        /// System calls that discard memory eagerly: before the free is acknowledged, for a driver without
        /// `MUST_TELL_HOST`.
        eager_calls_total: Counter,
        /// Memory discarded eagerly.
        eager_bytes_total: Counter of Bytes,
        /// Slices run with every vCPU out of the guest.
        held_slices_total: Counter,
        /// The part of these slices that vCPU threads have run before they entered the guest.
        passing_slices_total: Counter,
        /// Slices run with vCPUs in the guest, because they were not out within the pause budget.
        open_slices_total: Counter,
        /// Ranges released in slices.
        slice_ranges_total: Counter,
        /// Discards and invalidations of blocks and granules by time, one chunk each: bucket `i` counts those shorter than 2^i
        /// microseconds and not shorter than half of that. A reuse waits for one at most.
        chunks: Histogram of Microseconds,
        /// Times that a reclaim let a more urgent one go first.
        interruptions_total: Counter,
        /// Discarded memory that the host was found to hold pages for again. It is lazy again.
        refilled_bytes_total: Counter of Bytes,
        /// Reclaims started by memory pressure on the host or in a cgroup.
        pressure_events_total: Counter,
        /// Waits ended by the kernel saying that a memory limit of the monitor's cgroup, or of one above it, was reached.
        limit_events_total: Counter,
    }
}
