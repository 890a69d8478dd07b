//! Takes memory that is free in the guest although the guest has said nothing: what its kernel's free lists hold.
//!
//! Candidates are collected with the vCPUs running, from what the host holds. They are taken with the gate closed, each one
//! after it was read again at that moment; see [`crate::guest_kernel`] for why it has to be then. Nothing is tracked: the
//! guest's next touch finds a page of zeroes.

mod ages;
mod cost;
mod estimate;
mod job;
mod lists;
mod pass;
#[cfg(test)]
mod tests;
mod walk;

use std::time::Instant;

use ebb_core::range::GpaRange;

use super::backoff::Backoff;
use super::job::MAX_MISSES;
use ages::{Bits, FreeAges};
use cost::Cost;

pub(super) use estimate::held_bytes;
pub(super) use job::FreeOffer;
pub use lists::{FreeLists, KernelLists, KnownLists, Look, ReadLists};
pub(super) use pass::Taken;
use walk::Walk;

/// Orders of the blocks of 2 MiB and more, and of the smallest pieces that are worth a pause.
pub(super) const BLOCKS: u32 = 9;
pub(super) const PIECES: u32 = 4;

/// At most so many orders in the background make no attempt after vCPUs have missed pauses: about half a second passes, and
/// it goes on.
const MAX_SKIPPED: u32 = 4;

/// Bytes of RAM that are looked at in one step.
const STEP: u64 = 128 << 20;

ebb_core::metrics! {
    /// What was done with memory that is free by the guest kernel's free lists, since the machine started.
    pub struct FreePagesStats from pub(super) struct Counters {
        /// Memory that is free in blocks of 2 MiB or more and that the host holds. Looked at when it is asked for; what takes
        /// longer than 1 ms is estimated from a part.
        resident_bytes: Gauge of Bytes,
        /// Memory of the host that was taken.
        taken_bytes_total: Counter of Bytes,
        /// Pauses in which it was taken. The vCPUs were out of the guest.
        pauses_total: Counter,
        /// The part of these pauses that vCPU threads have made before they entered the guest. Nobody was interrupted.
        passing_total: Counter,
        /// Pauses that were given up because a vCPU was not out in time. Nothing was taken.
        missed_total: Counter,
        /// Pieces that were free when they were looked at with the vCPUs running: whole blocks in huge pages, else at most
        /// 512 KiB.
        candidates_total: Counter,
        /// Pieces that were not free any more when the vCPUs were out. They were left alone.
        stale_total: Counter,
        /// Calls that the host's kernel refused.
        failures_total: Counter,
    }
}

/// A part of RAM that is taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub range: GpaRange,
    /// Bytes of it that the host holds.
    pub held: u64,
    /// It is a whole block in a huge page.
    pub huge: bool,
}

/// What one pass leaves to the next.
#[derive(Debug)]
pub(super) struct Progress {
    /// Where the next pass begins.
    pub cursor: u64,
    pub cost: Cost,
    /// Skips attempts after vCPUs have missed [`MAX_MISSES`] pauses in a row.
    pub holds: Backoff,
    /// What there was to take when it was last estimated, less what was taken since: when, of which order, and the bytes.
    pub estimate: Option<(Instant, u32, u64)>,
    /// Which blocks have been free for some time. Only for orders by age.
    pub ages: FreeAges,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            cursor: 0,
            cost: Cost::new(),
            holds: Backoff::tolerant(MAX_MISSES - 1).skipping_at_most(MAX_SKIPPED),
            estimate: None,
            ages: FreeAges::default(),
        }
    }
}
