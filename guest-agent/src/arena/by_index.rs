//! Granules by index, for an allocator that keeps its own record of what it has claimed and what is in use.

use std::ops::Range;
use std::sync::atomic::Ordering;

use ebb_hypercall_abi::granule::State;

use super::Arena;

impl Arena {
    /// Address of granule 0 in this process. Granule `n` begins `n` times [`Arena::granule_size`] after it.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.mapping.start()
    }

    /// Indices of the granules that can be claimed. The arena's head takes those before.
    #[must_use]
    pub fn indices(&self) -> Range<usize> {
        self.first()..self.granules()
    }

    /// Claims `count` adjacent granules. Returns the index of the first. Allocates nothing.
    ///
    /// They belong to this process until it dies, but are not in use: each needs [`Arena::reuse_granule`] before it is
    /// touched. Returns `None` if no such granules are free, even after [`Arena::recover`].
    #[must_use]
    pub fn claim_run(&self, count: usize) -> Option<usize> {
        self.find_run(count).or_else(|| {
            let recovered = self.recover().unwrap_or(0);
            (recovered > 0).then(|| self.find_run(count)).flatten()
        })
    }

    /// Two passes over the arena: from where the last search ended, then from the beginning.
    fn find_run(&self, count: usize) -> Option<usize> {
        let all = self.indices();
        let hint = all.start + self.search_from.load(Ordering::Relaxed) % all.len().max(1);
        [hint, all.start]
            .into_iter()
            .find_map(|start| self.find_run_from(start, count))
    }

    fn find_run_from(&self, start: usize, count: usize) -> Option<usize> {
        let mut index = start;
        while count > 0 && index.checked_add(count)? <= self.granules() {
            match (index..index + count).find(|granule| !self.try_own(*granule)) {
                None => {
                    let next = index + count - self.first();
                    self.search_from.store(next, Ordering::Relaxed);
                    return Some(index);
                }
                Some(taken) => {
                    let me = self.slot.owner().raw();
                    (index..taken).for_each(|granule| self.clear_owner(granule, me));
                    index = taken + 1;
                }
            }
        }
        None
    }

    /// Takes a granule of [`Arena::claim_run`] that is not in use back from the host. Waits while the monitor discards it.
    ///
    /// Returns true if its memory is known to be zero. Costs two loads and at most one compare-and-swap.
    ///
    /// # Panics
    /// When there is no such granule.
    #[inline]
    pub fn reuse_granule(&self, index: usize) -> bool {
        // Claimed granules with a word of 0 were never used: those that are released are lazy, and so not 0.
        let never_used = self.state_word(index).load(Ordering::Relaxed) == 0;
        self.mark_in_use(index) == State::Discarded || never_used
    }

    /// Frees granule `index` lazily: the host may take its memory until [`Arena::reuse_granule`]. It still belongs to this
    /// process. Costs two loads and one compare-and-swap.
    ///
    /// # Safety
    /// The granule is from [`Arena::claim_run`], and nobody uses its content.
    ///
    /// # Panics
    /// When there is no such granule.
    #[inline]
    pub unsafe fn free_granule(&self, index: usize) {
        self.mark_lazy(index);
    }
}
