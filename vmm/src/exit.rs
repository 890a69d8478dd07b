//! Exit statuses of `ebb run`, the same as crosvm's.

use crate::bus::ExitReason;

/// The guest powered off, or the operator stopped the machine.
pub const STOP: u8 = 0;
/// A valid command could not be carried out.
pub const FAILED: u8 = 1;
/// The guest asked for a reset.
pub const RESET: u8 = 32;
/// The guest crashed: a triple fault, or something that KVM cannot do.
pub const CRASH: u8 = 33;
/// The guest's kernel panicked.
pub const PANIC: u8 = 34;
/// The arguments are invalid, or the host lacks what they name.
pub const BAD_ARGUMENTS: u8 = 35;
/// The page server of a restored machine is gone. 37 is [`crate::sys::seccomp::FORBIDDEN_CALL`].
pub const PAGE_SERVER: u8 = 38;

/// The exit status for `reason`.
#[must_use]
pub const fn status(reason: ExitReason) -> u8 {
    match reason {
        ExitReason::Stop => STOP,
        ExitReason::Reset => RESET,
        ExitReason::Crash => CRASH,
        ExitReason::Panic => PANIC,
        ExitReason::PageServer => PAGE_SERVER,
    }
}

/// The exit status of `ebb firecracker` for `reason`. A guest of Firecracker has no other way to end its machine than a reset.
#[must_use]
pub const fn firecracker_status(reason: ExitReason) -> u8 {
    match reason {
        ExitReason::Stop | ExitReason::Reset | ExitReason::Panic => STOP,
        ExitReason::Crash => FAILED,
        ExitReason::PageServer => PAGE_SERVER,
    }
}
