//! The guest's calls to the monitor: decodes, checks and counts them, and hands them down to
//! [`LazyOps`](crate::guest_memory::LazyOps).
//!
//! The guest is not trusted: every call takes bounded time and memory of the monitor, and a wrong call harms only the guest
//! itself. `hypercall-abi/SPECIFICATION.md` specifies the calls.

mod blocks;
mod decode;
mod dispatch;
mod stats;
#[cfg(test)]
mod tests;

pub use decode::{Arguments, Request, decode};
pub use dispatch::{Hypercalls, offer};
pub use stats::HypercallStats;
