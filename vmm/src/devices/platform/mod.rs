//! The few legacy ports that a PC guest expects: power, reset, panic, keyboard.

mod i8042;
mod power;
mod pvpanic;

pub use i8042::{I8042, NotRead};
pub use power::Power;
pub use pvpanic::PvPanic;
