//! A guest in Rust without an operating system.
//!
//! This file is compiled twice: by the build script of `ebb-payload` into a flat image that is loaded at [`map::IMAGE`], and
//! by cargo into a library, from which the host takes constants, and in which unit tests run.
//!
//! The host puts [`Parameters`] at [`map::PARAMETERS`]. The guest answers with 64-bit words on the serial port.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(ebb_guest, no_main)]

pub mod calls;
pub mod cpu;
pub mod guarded;
pub mod integrity;
pub mod interpreter;
pub mod isolation;
pub mod map;
pub mod meter;
pub mod mischief;
pub mod random;
pub mod ranges;
pub mod records;
pub mod script;
pub mod storm;

#[cfg(ebb_guest)]
mod faults;
#[cfg(ebb_guest)]
mod start;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Task {
    /// Frees, reuses and verifies memory on all vCPUs, see [`integrity`].
    Integrity = 1,
    /// Makes valid and invalid hypercalls as fast as possible, forever, see [`storm`].
    Storm = 2,
    /// Measures the time of a fixed computation, forever, see [`meter`].
    Meter = 3,
    /// Frees scattered ranges and makes hypercalls until the host has discarded them, see [`meter`].
    Caller = 4,
    /// Runs scripts on command, see [`interpreter`].
    Scripts = 5,
    /// Looks for another guest's data and leaves its own, see [`isolation`]. With `operations` it powers off then.
    Isolation = 6,
}

/// The guest's parameters, 64 bits each.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Parameters {
    /// A [`Task`].
    pub task: u64,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Size of RAM in bytes. The guest tests the part from [`map::TEST_MEMORY`] on.
    pub ram: u64,
    /// Ranges that each vCPU frees or reuses before it ends.
    pub operations: u64,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// The last answer in [`Task::Integrity`], after [`marker::COUNTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Ranges freed or reused.
    pub operations: u64,
    /// Hypercalls for that, including batches.
    pub calls: u64,
    /// Batches.
    pub batches: u64,
    /// Pages verified while they were in use.
    pub kept: u64,
    /// Pages in use without the content that was written last. Must be 0.
    pub lost: u64,
    /// Pages with their old content after a reuse.
    pub reused_intact: u64,
    /// Pages that were zero after a reuse.
    pub reused_zero: u64,
    /// Bytes after a reuse that were neither old content nor zero, and bytes of pages that were a mix of both. Must be 0.
    pub foreign_bytes: u64,
    /// Hypercalls with an unexpected status. Must be 0.
    pub bad_statuses: u64,
    /// Hypercalls that were refused because the monitor's tracker was full.
    pub refused: u64,
    /// Pages that were zero at the end, after everything was freed and the host had time to discard it.
    pub zero_at_end: u64,
}

/// Number of words in [`Counts`].
pub const COUNTS: usize = size_of::<Counts>() / 8;

impl Counts {
    /// Decodes the words on the serial port.
    #[must_use]
    pub const fn from_words(words: [u64; COUNTS]) -> Self {
        let [
            operations,
            calls,
            batches,
            kept,
            lost,
            reused_intact,
            reused_zero,
            foreign_bytes,
            bad_statuses,
            refused,
            zero_at_end,
        ] = words;
        Self {
            operations,
            calls,
            batches,
            kept,
            lost,
            reused_intact,
            reused_zero,
            foreign_bytes,
            bad_statuses,
            refused,
            zero_at_end,
        }
    }

    /// Encodes the counts for the serial port.
    #[must_use]
    pub const fn to_words(self) -> [u64; COUNTS] {
        [
            self.operations,
            self.calls,
            self.batches,
            self.kept,
            self.lost,
            self.reused_intact,
            self.reused_zero,
            self.foreign_bytes,
            self.bad_statuses,
            self.refused,
            self.zero_at_end,
        ]
    }
}

/// Words that report the guest's progress.
pub mod marker {
    /// The memory is initialized and the test begins.
    pub const READY: u64 = 0xebb0_0001;
    /// Everything is freed, and the host has discarded most of it.
    pub const TAKEN: u64 = 0xebb0_0002;
    /// [`super::Counts`] follow.
    pub const COUNTS: u64 = 0xebb0_0003;
    /// A script has ended. The number of the step that went otherwise than expected follows, or [`super::script::PASSED`],
    /// and the result of that step, or of the last one.
    pub const SCRIPT: u64 = 0xebb0_0004;
    /// The memory was looked through. The number of words that another guest has left follows, and that of words in use.
    pub const SCANNED: u64 = 0xebb0_0005;
    /// The guest has panicked.
    pub const PANIC: u64 = 0xebb0_00ff;
}
