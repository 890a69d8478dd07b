//! Compares what the tracker says with what the host holds: lazy fragments without pages, and discarded memory with pages.

use std::time::{Duration, Instant};

use ebb_core::lazy::{LazyMemory, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::ReleasePages;

use super::turns::Turn;

/// Number of ranges that are looked at before a slice.
const AHEAD: usize = 128;

/// Bytes of discarded memory that are looked at in one step: a fraction of a millisecond.
const STEP: u64 = 64 << 20;

/// When all discarded memory was looked at, orders in the background do not look again for this time.
const PAUSE: Duration = Duration::from_secs(10);

/// The tracker, and the memory that it is about.
#[derive(Clone, Copy)]
pub(super) struct Held<'a> {
    pub lazy: &'a LazyMemory,
    pub pages: &'a dyn ReleasePages,
}

impl Held<'_> {
    /// Looks at the next ranges of `sweep`, up to `bytes` bytes. What the host holds nothing of becomes discarded, for
    /// instance what became lazy with a page that the guest has reused, and was not refilled. That needs neither a system
    /// call that changes pages nor a closed gate. Returns the number of bytes, and whether that is all it has looked at.
    pub fn skip_empty(self, sweep: &Sweep, bytes: u64, turn: &Turn<'_>) -> (u64, bool) {
        let (mut ahead, mut skipped, mut all) = (sweep.clone(), 0, false);
        for number in 0..AHEAD {
            let left = bytes - skipped;
            let next = turn
                .goes_on()
                .then(|| self.lazy.next_range(&mut ahead, left.min(BLOCK_SIZE)));
            let Some(range) = next.flatten() else {
                break;
            };
            let empty = self.discard_empty(&mut sweep.clone().within(range));
            skipped += empty.min(left);
            all = (all || number == 0) && empty > 0;
        }
        (skipped, all)
    }

    /// Takes the next range of `sweep` if the host holds nothing of it. Returns its size.
    fn discard_empty(self, sweep: &mut Sweep) -> u64 {
        let nothing = |range| self.pages.held(range) == Some(0);
        let mut look = sweep.clone();
        if !self
            .lazy
            .next_range(&mut look, BLOCK_SIZE)
            .is_some_and(nothing)
        {
            return 0;
        }
        // From here on a reuse waits, so this answer counts.
        let Some(chunk) = self.lazy.take_chunk(sweep, BLOCK_SIZE) else {
            return 0;
        };
        let range = chunk.range();
        if !nothing(range) {
            return 0;
        }
        chunk.discarded();
        range.len()
    }

    /// Makes discarded memory lazy that the host holds pages for again: a huge page brings back all of its block for one
    /// page that the guest uses. Goes on with `sweep` until `found` has reached `bytes`, or `turn` does not go on: then it
    /// returns false.
    pub fn refill(self, sweep: &mut Sweep, found: &mut u64, bytes: u64, turn: &Turn<'_>) -> bool {
        while *found < bytes {
            if !turn.goes_on() {
                return false;
            }
            let Some(range) = self.lazy.next_range(sweep, STEP) else {
                return true;
            };
            // One look tells of a range without pages, as most are.
            if self.pages.held(range) > Some(0) {
                let held = parts(range, BLOCK_SIZE).filter(|&part| self.pages.held(part) > Some(0));
                *found += held.map(|part| self.lazy.refilled(part)).sum::<u64>();
            }
        }
        true
    }
}

/// Where orders in the background go on to look at discarded memory.
pub(super) struct Look {
    sweep: Sweep,
    again: Option<Instant>,
}

impl Look {
    /// Nothing was looked at yet.
    pub const fn new() -> Self {
        Self {
            sweep: Sweep::discarded(),
            again: None,
        }
    }

    /// Where to begin at `now`. `None`: all was looked at a moment ago.
    pub fn begin(&self, now: Instant) -> Option<Sweep> {
        let due = self.again.is_none_or(|again| now >= again);
        due.then(|| self.sweep.clone())
    }

    /// The sweep has come so far at `now`.
    pub fn end(&mut self, lazy: &LazyMemory, sweep: Sweep, now: Instant) {
        let more = lazy.next_range(&mut sweep.clone(), STEP).is_some();
        *self = Self {
            again: if more { None } else { Some(now + PAUSE) },
            sweep: if more { sweep } else { Sweep::discarded() },
        };
    }
}

/// The parts of `range` between multiples of `size`.
pub(super) fn parts(range: GpaRange, size: u64) -> impl Iterator<Item = GpaRange> {
    let numbers = range.start() / size..range.end().div_ceil(size);
    numbers.filter_map(move |number| {
        let (start, end) = (number * size, (number + 1) * size);
        GpaRange::new(range.start().max(start), range.end().min(end))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use ebb_core::generation::VmGeneration;
    use ebb_core::lazy::Pieces;
    use ebb_core::range::PAGE_SIZE;
    use ebb_core::release::{Release, Released};

    use super::*;
    use crate::reclaim::turns::{Turns, Until, Work};

    /// Memory of which the host holds the pages from `from` on. Counts how often that is asked.
    struct Memory {
        from: u64,
        asked: AtomicU64,
    }

    impl ReleasePages for Memory {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn held(&self, range: GpaRange) -> Option<u64> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Some(if range.end() > self.from {
                range.len()
            } else {
                0
            })
        }

        fn max_batch(&self) -> usize {
            1
        }

        fn release(&self, _: &[GpaRange], _: Release) -> Released {
            unreachable!("nothing is released here")
        }
    }

    /// Every other page of `pages` is lazy, and the host holds those from page `held` on.
    fn with(pages: u64, held: u64, test: impl FnOnce(Held<'_>, &Memory, &Turn<'_>)) {
        let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
        let page = |at| GpaRange::new(at * PAGE_SIZE, (at + 1) * PAGE_SIZE).unwrap();
        lazy.free(&(0..pages).step_by(2).map(page).collect::<Vec<_>>());
        let memory = Memory {
            from: held * PAGE_SIZE,
            asked: AtomicU64::new(0),
        };
        let turns = Turns::default();
        let ticket = turns.ticket(true, Until::default());
        let turn = turns.take(&ticket, Work::Fragments, None).unwrap();
        let held = Held {
            lazy: &lazy,
            pages: &memory,
        };
        test(held, &memory, &turn);
    }

    #[test]
    fn only_some_fragments_are_looked_at_before_a_slice() {
        let all = Sweep::new(Pieces::Fragments, u64::MAX);
        with(4000, 0, |held, memory, turn| {
            assert_eq!(held.skip_empty(&all, u64::MAX, turn), (0, false));
            assert_eq!(memory.asked.load(Ordering::Relaxed), AHEAD as u64);
        });
        with(4000, 4000, |held, _, turn| {
            let some = AHEAD as u64 * PAGE_SIZE;
            assert_eq!(held.skip_empty(&all, u64::MAX, turn), (some, true));
            assert_eq!(held.lazy.snapshot().discarded_bytes, some);
        });
        with(40, 20, |held, _, turn| {
            let bytes = held.skip_empty(&all, 3 * PAGE_SIZE, turn).0;
            assert_eq!(bytes, 3 * PAGE_SIZE);
            let rest = held.skip_empty(&all, u64::MAX, turn);
            assert_eq!(rest, (7 * PAGE_SIZE, false));
        });
    }

    #[test]
    fn what_came_back_is_lazy_and_the_look_goes_on_where_it_was() {
        with(4000, 2000, |held, _, turn| {
            let mut sweep = Sweep::new(Pieces::Any, u64::MAX);
            while let Some(chunk) = held.lazy.take_chunk(&mut sweep, u64::MAX) {
                chunk.discarded();
            }
            let (mut look, now) = (Look::new(), Instant::now());
            let refill = |look: &mut Look, bytes| {
                let mut sweep = look.begin(now)?;
                let mut found = 0;
                assert!(held.refill(&mut sweep, &mut found, bytes, turn));
                look.end(held.lazy, sweep, now);
                Some(found)
            };
            assert_eq!(refill(&mut look, PAGE_SIZE), Some(PAGE_SIZE));
            assert_eq!(refill(&mut look, u64::MAX), Some(999 * PAGE_SIZE));
            assert_eq!(held.lazy.snapshot().lazy_bytes, 1000 * PAGE_SIZE);
            assert_eq!(refill(&mut look, u64::MAX), None, "a moment ago");
            assert!(look.begin(now + PAUSE).is_some());
        });
    }
}
