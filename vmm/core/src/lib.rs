//! The part of the monitor that its threads share, and the types that go with it.
//!
//! Nothing here makes a system call on guest memory; the caller supplies that ([`release::ReleasePages`]).
//! Compiled with `--cfg loom`, the atomics and locks are loom's, and the package `ebb-models` checks this very
//! code.

#![forbid(unsafe_code)]

mod fault;

pub mod generation;
pub mod lazy;
pub mod metrics;
pub mod offer;
pub mod range;
pub mod release;
pub mod slice;
pub mod sync;
pub mod table;

#[cfg(loom)]
pub use fault::arm;
