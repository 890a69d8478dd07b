//! Guest memory: address ranges, and the mappings behind them.

pub mod error;
pub mod ram;

pub use error::MemoryError;
pub use ram::{Backing, GuestRam, MissingPage, MissingPages, RamRegion, Release, Released};
