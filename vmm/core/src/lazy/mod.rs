//! Lazily freed memory: which pages the guest has freed, and in which state they are.
//!
//! Only bookkeeping: no system call on memory. The contract is that of `MADV_LAZYFREE` and `MADV_REUSE` (Rik van
//! Riel), for a guest instead of a process.

mod flights;
mod map;
mod region;
mod shared;
mod sweep;
mod tracker;

pub use shared::{Chunk, LazyMemory, LazyStats, ReuseOutcome, Surveyed};
pub use sweep::{Pieces, Sweep};
pub use tracker::Totals;
