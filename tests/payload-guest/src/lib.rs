//! A guest without an operating system, in Rust. `payload`'s build script compiles this file once more, as a
//! flat image that starts at [`map::IMAGE`]; the library that cargo sees shares the numbers with the host's
//! side, and lets the logic be tested.
//!
//! What the guest does is chosen by the [`Parameters`] that the host puts at [`map::PARAMETERS`]; it answers
//! with 64-bit words on the serial port.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(ebb_guest, no_main)]

pub mod calls;
pub mod cpu;
pub mod integrity;
pub mod map;
pub mod meter;
pub mod random;
pub mod slots;
pub mod stamp;
pub mod storm;

#[cfg(ebb_guest)]
mod start;

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Job {
    /// Free, reuse and verify memory on all vCPUs, see [`integrity`].
    Integrity = 1,
    /// Make calls, good and bad, as fast as possible and for ever, see [`storm`].
    Storm = 2,
    /// Measure the time of a piece of work for ever, see [`meter`].
    Meter = 3,
    /// Free scattered ranges and make calls all the time, until they are taken, see [`meter`].
    Caller = 4,
}

/// The host's words to the guest, all 64 bits wide.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Parameters {
    /// A [`Job`].
    pub job: u64,
    /// vCPUs of the machine; each takes part.
    pub vcpus: u64,
    /// Size of RAM in bytes, of which the guest uses what lies above [`map::FREE`].
    pub ram: u64,
    /// Ranges that each vCPU frees or reuses before it ends.
    pub operations: u64,
    /// Seed of everything that is random.
    pub seed: u64,
}

/// Words of the guest's last answer in [`Job::Integrity`], after [`marker::COUNTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Ranges freed or reused.
    pub operations: u64,
    /// Calls made for that, single ones and batches.
    pub calls: u64,
    /// Of these, batches.
    pub batches: u64,
    /// Pages verified while they were in use.
    pub kept: u64,
    /// Pages in use that did not hold what was written last: must be 0.
    pub lost: u64,
    /// Pages that held their old content at a reuse.
    pub reused_intact: u64,
    /// Pages that read zero at a reuse.
    pub reused_zero: u64,
    /// Bytes at a reuse that were neither their old content nor zero, and bytes of pages that were both: must be 0.
    pub foreign_bytes: u64,
    /// Calls with a status that they must not have: must be 0.
    pub bad_statuses: u64,
    /// Calls that were refused for want of room in the monitor's book.
    pub refused: u64,
    /// Pages that read zero at the very end, after everything was freed and the host had time to take it.
    pub zero_at_end: u64,
}

/// Number of words in [`Counts`].
pub const COUNTS: usize = size_of::<Counts>() / 8;

impl Counts {
    /// From the words on the serial port.
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

    /// To words.
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

/// What the guest says before it goes on, one word each.
pub mod marker {
    /// Everything is written for the first time, or the work begins.
    pub const READY: u64 = 0xebb0_0001;
    /// Everything is freed, and the host has taken most of it.
    pub const TAKEN: u64 = 0xebb0_0002;
    /// [`super::Counts`] follow.
    pub const COUNTS: u64 = 0xebb0_0003;
    /// The guest has panicked: its own mistake.
    pub const PANIC: u64 = 0xebb0_00ff;
}
