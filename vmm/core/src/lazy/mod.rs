//! Lazily freed memory: which ranges the guest has handed back, and what has become of them.
//!
//! Bookkeeping only, no system call on a memory range. The contract is that of `MADV_LAZYFREE` and
//! `MADV_REUSE` (Rik van Riel), with the guest in the place of the process.

mod shared;
mod sweep;
mod tracker;

pub use shared::{Chunk, LazyMemory, LazyStats, ReuseOutcome};
pub use sweep::{Pieces, Sweep};
pub use tracker::{
    DEFAULT_MAX_RANGES, Fate, Freed, RangeState, Reused, Squeezed, Step, Surveyed, Totals, Tracker,
};
