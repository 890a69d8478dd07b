//! A granule's word in the memory that guest and monitor share: how it is changed, and what a guest does to free
//! a granule and to take it back.
//!
//! The models in `tests/models` run these functions.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

use crate::granule::{Reuse, State, Word};

/// Replaces `current` by `new`. Returns false, and changes nothing, if the word is another one by now.
#[inline]
pub fn swap(word: &AtomicU64, current: Word, new: Word) -> bool {
    let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
    word.compare_exchange(current.raw(), new.raw(), success, failure)
        .is_ok()
}

/// Guest: frees a granule, stamped with `generation`. Returns false if it was not in use. One load and one
/// compare-and-swap.
#[inline]
pub fn free(word: &AtomicU64, generation: u64) -> bool {
    let seen = Word::from_raw(word.load(Ordering::Relaxed));
    seen.free(generation)
        .is_some_and(|free| swap(word, seen, free))
}

/// Guest: takes a granule back. Returns the state that it was in. Calls `wait` whenever it finds that the monitor
/// is discarding the granule.
#[inline]
pub fn reuse(word: &AtomicU64, mut wait: impl FnMut()) -> State {
    loop {
        let seen = Word::from_raw(word.load(Ordering::Relaxed));
        match (seen.reuse(), seen.state()) {
            (Reuse::Swap(new), Some(state)) => {
                if swap(word, seen, new) {
                    return state;
                }
            }
            (Reuse::Busy, _) => wait(),
            _ => return State::InUse,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granule_is_freed_once_and_comes_back_from_every_state() {
        let word = AtomicU64::new(0);
        assert!(free(&word, 7) && !free(&word, 8));
        assert_eq!(
            Word::from_raw(word.load(Ordering::Relaxed)),
            Word::new(State::Lazy, 7)
        );
        let never = || unreachable!("nobody discards it");
        assert_eq!(reuse(&word, never), State::Lazy);
        assert_eq!(reuse(&word, never), State::InUse);
        word.store(Word::new(State::Discarded, 7).raw(), Ordering::Relaxed);
        assert_eq!(reuse(&word, never), State::Discarded);
        assert_eq!(
            Word::from_raw(word.load(Ordering::Relaxed)),
            Word::new(State::InUse, 7)
        );
    }

    #[test]
    fn a_reuse_waits_while_the_monitor_discards() {
        let reclaiming = Word::new(State::Reclaiming, 7);
        let word = AtomicU64::new(reclaiming.raw());
        let mut waits = 0;
        let state = reuse(&word, || {
            waits += 1;
            if waits == 3 {
                let lazy = reclaiming.finish(false).unwrap();
                assert!(swap(&word, reclaiming, lazy) && !swap(&word, reclaiming, lazy));
            }
        });
        assert_eq!((state, waits), (State::Lazy, 3));
    }
}
