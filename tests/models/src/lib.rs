//! The parts of the monitor that threads meet in, compiled a second time: under `--cfg loom` their atomics
//! and locks are loom's. Nothing else of the monitor is needed for that, and its dependencies need not bear
//! the flag.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p ebb-models --target-dir target/loom`; `cargo xtask test`
//! does that.

#[path = "../../../vmm/src/generation/mod.rs"]
pub mod generation;
#[path = "../../../vmm/src/lazy/mod.rs"]
pub mod lazy;
#[path = "../../../vmm/src/reclaim/offer.rs"]
pub mod offer;
#[path = "../../../vmm/src/memory/range.rs"]
mod range;
#[path = "../../../vmm/src/reclaim/slice.rs"]
pub mod slice;
#[path = "../../../vmm/src/sync.rs"]
pub mod sync;

/// What the modules know of guest memory.
pub mod memory {
    pub use crate::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
}
