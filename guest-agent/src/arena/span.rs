//! Granules by number, for an allocator: it owns address space, not values, and does its own bookkeeping.

use std::ops::Range;
use std::sync::atomic::Ordering;

use ebb_hypercall_abi::granule::State;

use super::Arena;

impl Arena {
    /// Where the arena lies in this process. Granule `n` begins at `n` times [`Arena::granule_size`].
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.memory.start()
    }

    /// The granules behind the head, by number.
    #[must_use]
    pub fn numbers(&self) -> Range<usize> {
        self.first()..self.granules()
    }

    /// Claims `count` granules in a row; the number of the first.
    ///
    /// They are this process's until it dies, but not in use: each must be taken by [`Arena::take_granule`] before
    /// it is touched. It then holds what another process left there, or zeroes. Allocates nothing.
    /// Returns `None` if there are no such granules, even after [`Arena::recover`].
    #[must_use]
    pub fn claim_span(&self, count: usize) -> Option<usize> {
        self.find_span(count).or_else(|| {
            let recovered = self.recover().unwrap_or(0);
            (recovered > 0).then(|| self.find_span(count)).flatten()
        })
    }

    /// Two passes over the arena: from the hint, then from the beginning.
    fn find_span(&self, count: usize) -> Option<usize> {
        let (first, end) = (self.first(), self.granules());
        let hint = first + self.hint.load(Ordering::Relaxed) % (end - first).max(1);
        [hint, first]
            .into_iter()
            .find_map(|start| self.find_span_from(start, count))
    }

    fn find_span_from(&self, start: usize, count: usize) -> Option<usize> {
        let mut index = start;
        while count > 0 && index.checked_add(count)? <= self.granules() {
            match (index..index + count).find(|granule| !self.own(*granule)) {
                None => {
                    self.hint
                        .store(index + count - self.first(), Ordering::Relaxed);
                    return Some(index);
                }
                Some(taken) => {
                    (index..taken).for_each(|granule| self.disown(granule));
                    index = taken + 1;
                }
            }
        }
        None
    }

    /// Undoes [`Arena::own`] of a granule whose word was not touched since.
    fn disown(&self, index: usize) {
        let me = self.slot.owner().raw();
        // It fails only where somebody scribbles over the room.
        let _ = self
            .owner(index)
            .compare_exchange(me, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Takes granule `index`, of [`Arena::claim_span`] and not in use, from the host; waits while the monitor discards it. Whether its memory is
    /// zero now. Two loads and at most one compare-and-swap.
    ///
    /// # Panics
    /// When there is no such granule.
    #[inline]
    pub fn take_granule(&self, index: usize) -> bool {
        // A granule that nobody has is never left in use, so this one was never used.
        let fresh = self.word(index).load(Ordering::Relaxed) == 0;
        self.reuse_word(index) == State::Discarded || fresh
    }

    /// Frees granule `index` lazily: the host may take its memory until [`Arena::take_granule`]. It stays this process's.
    /// Two loads and one compare-and-swap.
    ///
    /// # Safety
    /// The granule is from [`Arena::claim_span`], and nobody uses what is in it.
    ///
    /// # Panics
    /// When there is no such granule.
    #[inline]
    pub unsafe fn free_granule(&self, index: usize) {
        self.free_word(index);
    }
}
