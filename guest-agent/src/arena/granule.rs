//! Granules as values: in use, or lazily free.

use ebb_hypercall_abi::granule::State;

use super::Arena;

/// A granule in use by this value alone. Dropping it releases the granule to all processes.
pub struct Granule<'a> {
    pub(super) arena: &'a Arena,
    pub(super) index: usize,
}

impl<'a> Granule<'a> {
    /// Its memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        let size = self.arena.granule_size();
        // The owner word says that it is ours, and no other value has this index.
        self.arena.mapping.bytes(self.index * size, size)
    }

    /// Frees it: the host may take its memory from now on. Makes no system call and causes no fault.
    #[must_use = "dropping the lazy granule releases it to all processes"]
    pub fn lazy_free(self) -> LazyGranule<'a> {
        let (arena, index) = (self.arena, self.index);
        std::mem::forget(self);
        arena.mark_lazy(index);
        LazyGranule { arena, index }
    }
}

impl Drop for Granule<'_> {
    fn drop(&mut self) {
        self.arena.release_own(self.index);
    }
}

/// A granule that is lazily free but still belongs to this process. Dropping it releases it to all processes.
pub struct LazyGranule<'a> {
    arena: &'a Arena,
    index: usize,
}

impl<'a> LazyGranule<'a> {
    /// Takes it back. Waits about a millisecond if the monitor is discarding it.
    ///
    /// Each page then holds its old content or zeroes. Returns true with the granule if all pages are known to be zero.
    #[must_use]
    pub fn reuse(self) -> (Granule<'a>, bool) {
        let (arena, index) = (self.arena, self.index);
        std::mem::forget(self);
        let zeroed = arena.mark_in_use(index) == State::Discarded;
        (Granule { arena, index }, zeroed)
    }
}

impl Drop for LazyGranule<'_> {
    fn drop(&mut self) {
        self.arena.release_own(self.index);
    }
}
