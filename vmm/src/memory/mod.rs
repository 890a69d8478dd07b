//! Guest memory: the mappings behind ranges of guest-physical addresses.

mod backing;
pub mod error;
pub mod ram;
mod release;

pub use backing::Backing;
pub use error::MemoryError;
pub use ram::{GuestRam, MissingPage, MissingPages, RamRegion, Served};
