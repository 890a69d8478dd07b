//! The guest's calls to the monitor: decoded, checked, carried out and counted.
//!
//! The guest is not trusted: whatever it says, a call costs the monitor bounded time and memory, and what
//! goes wrong is the guest's own loss. What the calls mean stands in `hypercall-abi/SPECIFICATION.md`.

mod blocks;
mod decode;
mod dispatch;
mod stats;
#[cfg(test)]
mod tests;

use ebb_hypercall_abi::arena::ArenaInfo;

pub use decode::{Arguments, Request, decode};
pub use dispatch::{Hypercalls, offer};
use ebb_core::range::GpaRange;
pub use stats::HypercallStats;

/// Pages by state, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct States {
    /// Lazily free, still with the guest's content; what is being discarded right now counts here.
    pub lazy: u64,
    /// Lazily free, and the host may drop the content at any time.
    pub unmapped: u64,
    /// Returned to the host.
    pub discarded: u64,
}

/// What a range and the machine consist of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The range, as far as it was looked at.
    pub range: States,
    /// Bytes of the range that were looked at, from its start on.
    pub examined: u64,
    /// The whole machine.
    pub machine: States,
    /// Ranges in the book of lazy memory.
    pub ranges: u64,
    /// The machine's generation.
    pub generation: u64,
}

/// What the calls are carried out by.
pub trait LazyOps: Send + Sync {
    /// Whether every page of `range` is RAM.
    fn is_ram(&self, range: GpaRange) -> bool;

    /// Whether `_range` names granules of one arena, no more than a call may reuse.
    fn is_granules(&self, _range: GpaRange) -> bool {
        false
    }

    /// How many arenas there are: none, unless a machine says otherwise.
    fn arenas(&self) -> u64 {
        0
    }

    /// Tells about arena number `_index`; the count is the caller's to fill in.
    fn arena(&self, _index: u64) -> Option<ArenaInfo> {
        None
    }

    /// The guest promises not to touch `ranges` before it reuses them; one batch. Returns how many bytes
    /// stay in use because the book is full.
    fn lazy_free(&self, ranges: &[GpaRange]) -> u64;

    /// `ranges`, of RAM or granules, are in use when this returns. Whether no lazy range of RAM is left.
    fn reuse(&self, ranges: &[GpaRange]) -> bool;

    /// Everything is in use when this returns.
    fn reset(&self);

    /// Puts pages behind `range`; whether that worked.
    fn prefault(&self, range: GpaRange) -> bool;

    /// Tells about a range, in bounded time, and about the machine.
    fn survey(&self, range: Option<GpaRange>) -> Survey;
}
