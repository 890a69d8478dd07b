//! Reclaim: when the host needs memory, lazily freed ranges are invalidated and discarded.
//!
//! `thread` loops: `sample` watches the host, `peers` says what other monitors have, `policy` decides, and `reclaimer`
//! carries out each decision as one `job`, in passes over `blocks`, `granules` and slices. Jobs take `turns`, the most
//! urgent first. `balloon` sizes a balloon by what is still missing then. This is the shrinker of "`MADV_LAZYFREE`" (Rik
//! van Riel), moved into the monitor.

mod backoff;
pub mod balloon;
mod blocks;
mod free;
mod granules;
mod held;
mod job;
mod outcome;
mod pace;
pub mod peers;
pub mod policy;
pub mod reclaimer;
pub mod reported;
pub mod sample;
pub mod spread;
mod stats;
#[cfg(test)]
mod tests;
pub mod thread;
mod turns;

pub use balloon::{AutoBalloon, AutoBalloonStats, BalloonDevice, BalloonReport};
pub use free::{FreeLists, FreePagesStats, KernelLists, KnownLists, Look};
pub use outcome::{Order, Outcome};
pub use peers::Peers;
pub use policy::{
    Ages, BalloonBounds, BalloonDoing, BalloonFigures, BalloonState, BalloonStep, Decision,
    GuestFigures, Limit, Mode, Others, PolicyState, Reach, ReclaimTuning, Room, Sample, decide,
    run_balloon,
};
pub use reclaimer::{EntryHook, Reclaimer};
pub use reported::{ReportedMemory, ReportedStats};
pub use sample::PressureSource;
pub use stats::ReclaimStats;
pub use thread::{ReclaimThread, StartError};
pub use turns::Until;
