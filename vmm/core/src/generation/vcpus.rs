//! One word for each vCPU, which only its own thread writes.

use crate::fault::fault_point;
use crate::sync::{AtomicU64, Ordering};

/// The lowest bit of a word: the vCPU is in the guest, or about to be.
const IN_GUEST: u64 = 1;

/// A word on cache lines of its own, as each vCPU writes its word at every entry: two, as x86 fetches them in pairs.
#[repr(align(128))]
#[derive(Debug)]
struct Padded(AtomicU64);

/// The words of all vCPUs: is it in the guest, and which generation did it see when it entered?
///
/// A generation is *quiescent* if every vCPU is out of the guest or has seen it. A vCPU that is out uses no
/// translation. One that has seen a generation entered after everything that was invalidated before it began, and KVM
/// flushes stale translations at that entry.
#[derive(Debug)]
pub struct VcpuWords(Box<[Padded]>);

impl VcpuWords {
    /// Words of `vcpus` vCPUs, all out of the guest.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| Padded(AtomicU64::new(0))).collect())
    }

    /// The vCPU `index` enters, and has seen `generation`. The caller must have loaded the generation before, and
    /// must put a fence between this and its look at the gate.
    pub(super) fn publish_in(&self, index: usize, generation: u64) {
        self.0[index]
            .0
            .store(generation << 1 | IN_GUEST, publication());
    }

    /// The vCPU `index` is out. What it did in the guest happens before what is done by a thread that sees it out.
    pub(super) fn publish_out(&self, index: usize) {
        self.0[index].0.store(0, publication());
    }

    /// Returns true if every vCPU is out, or has seen `generation`. The caller must have invalidated before
    /// `generation` began, and have put a fence after that.
    #[must_use]
    pub fn quiescent(&self, generation: u64) -> bool {
        self.0
            .iter()
            .all(|word| !behind(word.0.load(Ordering::Acquire), generation))
    }

    /// The vCPUs that are in the guest and have not seen `generation`; for `u64::MAX`, all that are in the guest.
    pub fn behind(&self, generation: u64) -> impl Iterator<Item = usize> {
        let words = self.0.iter().enumerate();
        words.filter_map(move |(index, word)| {
            behind(word.0.load(Ordering::Acquire), generation).then_some(index)
        })
    }

    /// The latest quiescent generation of those up to `current`.
    #[must_use]
    pub fn quiescent_generation(&self, current: u64) -> u64 {
        let words = self.0.iter().map(|word| word.0.load(Ordering::Acquire));
        let seen = words.filter(|word| word & IN_GUEST != 0);
        seen.map(|word| word >> 1).fold(current, u64::min)
    }
}

const fn behind(word: u64, generation: u64) -> bool {
    word & IN_GUEST != 0 && word >> 1 < generation
}

fn publication() -> Ordering {
    if fault_point!("a vCPU's word is relaxed") {
        Ordering::Relaxed
    } else {
        Ordering::Release
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_in_the_guest_are_behind_until_they_have_seen_it() {
        let words = VcpuWords::new(3);
        assert!(words.quiescent(9) && words.quiescent_generation(9) == 9);
        words.publish_in(0, 4);
        words.publish_in(2, 7);
        assert!(words.quiescent(4) && !words.quiescent(5));
        assert_eq!(words.quiescent_generation(9), 4);
        assert_eq!(words.behind(5).collect::<Vec<_>>(), [0]);
        assert_eq!(words.behind(u64::MAX).collect::<Vec<_>>(), [0, 2]);
        words.publish_out(0);
        assert!(words.quiescent(7) && !words.quiescent(8));
    }

    #[test]
    fn no_two_words_share_a_cache_line() {
        assert_eq!(size_of::<Padded>(), 128);
    }
}
