//! The few legacy ports that a PC guest expects: power, reset, panic, PCI configuration.

mod i8042;
mod pci;
mod power;
mod pvpanic;

pub use i8042::{I8042, NotRead};
pub use pci::PciConfig;
pub use power::Power;
pub use pvpanic::PvPanic;
