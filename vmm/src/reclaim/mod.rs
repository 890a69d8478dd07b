//! Reclaim: when the host wants memory, lazily freed ranges are invalidated and discarded.
//!
//! `sample` watches the host, `policy` decides, `execute` carries out in `blocks` and slices, `thread` runs
//! them in a loop. The shrinker of "`MADV_LAZYFREE`" (Rik van Riel), moved into the monitor.

mod blocks;
pub mod execute;
mod granules;
pub mod policy;
pub mod reported;
pub mod sample;
pub mod thread;

#[cfg(test)]
mod refusals;
#[cfg(test)]
mod stress;

pub use execute::{Order, Outcome, ReclaimStats, Reclaimer};
pub use policy::{Ages, Decision, Mode, PolicyState, Reach, Room, Sample, Tuning, decide};
pub use reported::{ReportedMemory, ReportedStats};
pub use sample::PressureSource;
pub use thread::{ReclaimThread, StartError};
