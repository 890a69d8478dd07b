//! Exit statuses of `ebb run`, as crosvm's users know them.

use crate::bus::ExitReason;

/// The guest powered off, or the operator stopped the machine.
pub const STOP: u8 = 0;
/// A command was understood, but could not be carried out.
pub const FAILED: u8 = 1;
/// The guest asked for a reset.
pub const RESET: u8 = 32;
/// The guest could not go on.
pub const CRASH: u8 = 33;
/// The guest's kernel panicked.
pub const PANIC: u8 = 34;
/// The arguments, or what they name on this host, are of no use.
pub const BAD_ARGUMENTS: u8 = 35;

/// The exit status that tells `reason`.
#[must_use]
pub const fn status(reason: ExitReason) -> u8 {
    match reason {
        ExitReason::Stop => STOP,
        ExitReason::Reset => RESET,
        ExitReason::Crash => CRASH,
        ExitReason::Panic => PANIC,
    }
}
