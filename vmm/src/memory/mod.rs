//! Guest memory: address ranges, and the mappings behind them.

pub mod ram;
pub mod range;

pub use ram::{
    Backing, GuestRam, MemoryError, MissingPage, MissingPages, RamRegion, Release, Released,
};
pub use range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
