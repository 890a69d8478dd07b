//! What the guest may ask of its memory: by hypercalls ([`LazyOps`]) and through the balloon ([`RangeSink`]); and what is
//! learned of its kernel ([`KernelEvents`]).
//!
//! The callers (`hypercall`, `devices`) stand above this module and know these traits only, so their tests can put a
//! model in the place of [`super::GuestMemory`].

use ebb_core::range::GpaRange;
use ebb_hypercall_abi::arena::ArenaInfo;

use crate::guest_kernel::{BadNote, Lost, NoteSource};

/// Bytes of lazily freed memory by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct States {
    /// Lazily free, with the guest's content still there. Chunks that are being discarded right now count here.
    pub lazy: u64,
    /// Lazily free, and the host may drop the content at any time.
    pub unmapped: u64,
    /// Returned to the host.
    pub discarded: u64,
}

/// The state of a range and of the whole machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The part of the range that was examined.
    pub range: States,
    /// Length of that part in bytes, from the start of the range.
    pub examined: u64,
    /// The whole machine.
    pub machine: States,
    /// Number of ranges in the tracker: neighbouring pages in one state.
    pub ranges: u64,
    /// The machine's generation.
    pub generation: u64,
}

/// The operations behind the guest's hypercalls. Ranges were checked by the caller with [`LazyOps::is_ram`] and
/// [`LazyOps::is_granules`].
pub trait LazyOps: Send + Sync {
    /// Returns true if every page of `range` is RAM.
    fn is_ram(&self, range: GpaRange) -> bool;

    /// Returns true if `_range` lies in the granules of one arena and names no more of them than one call may reuse.
    fn is_granules(&self, _range: GpaRange) -> bool {
        false
    }

    /// Number of arenas.
    fn arenas(&self) -> u64 {
        0
    }

    /// Describes arena number `_index`, or returns `None` if there is no such arena. The caller fills in the count.
    fn arena(&self, _index: u64) -> Option<ArenaInfo> {
        None
    }

    /// The kernel's vmcoreinfo note begins `_note`.
    ///
    /// # Errors
    /// [`BadNote`]: it is not used.
    fn kernel_note(&self, _note: GpaRange) -> Result<(), BadNote> {
        Err(BadNote("free lists are not read".into()))
    }

    /// The guest promises not to touch `ranges` before it reuses them.
    fn lazy_free(&self, ranges: &[GpaRange]);

    /// Makes `ranges`, of RAM or granules, in use before it returns. Returns true if no lazy range of RAM is left.
    fn reuse(&self, ranges: &[GpaRange]) -> bool;

    /// Makes all memory, arenas included, in use before it returns.
    fn reset(&self);

    /// Populates `range`. Returns false if the host has too few pages.
    fn prefault(&self, range: GpaRange) -> bool;

    /// Describes `range`, as far as that takes bounded time, and the machine.
    fn survey(&self, range: Option<GpaRange>) -> Survey;
}

/// The operations behind the balloon's queues. The ranges of one call are sorted, do not touch each other, and are RAM.
pub trait RangeSink: Send + Sync {
    /// The guest promises not to touch `ranges` before it reuses them. Bookkeeping only.
    fn lazy_free(&self, ranges: &[GpaRange]);

    /// Makes `ranges` in use before it returns: what the guest writes from then on is kept.
    fn reuse(&self, ranges: &[GpaRange]);

    /// Returns `ranges` to the host before it returns: for drivers without `VIRTIO_BALLOON_F_MUST_TELL_HOST`, which may
    /// use the pages at any time without a message.
    fn discard(&self, ranges: &[GpaRange]);

    /// The guest reports that `ranges` are free. Their content is unspecified until the guest writes to them. It may do
    /// so without a message as soon as this returns, so nothing may discard them unconditionally after that.
    fn report(&self, ranges: &[GpaRange]);

    /// The driver is gone: makes all RAM in use before it returns.
    fn reset(&self);

    /// Returns true if every page of `range` is RAM.
    fn is_ram(&self, range: GpaRange) -> bool;
}

/// What devices learn of the guest's kernel. They report it before the vCPU that has caused it enters the guest
/// again.
pub trait KernelEvents: Send + Sync {
    /// The kernel's vmcoreinfo note is at `note`.
    ///
    /// # Errors
    /// [`BadNote`]: it is not used.
    fn note(&self, note: GpaRange, source: NoteSource) -> Result<(), BadNote>;

    /// A note that was given before does not count any more.
    fn lost(&self, why: Lost);
}
