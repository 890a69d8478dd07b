//! The table of an arena's granules, as the monitor uses it: takes lazy granules, gives them back, waits for them.
//!
//! The guest may write anything to the words at any time. So each change is a compare-and-swap from a word that
//! was loaded once, the monitor tries a limited number of times, and what it must be sure of (which granules
//! it is discarding, and which it has discarded) is in bitmaps of its own.

use std::ops::{ControlFlow, Range, RangeInclusive};

use ebb_hypercall_abi::granule::{Reuse, State, Word};

use crate::fault::fault_point;
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock, wait};

/// Number of words that are loaded at once.
const WINDOW: usize = 512;

/// How often the monitor tries to change a word that a hostile guest keeps changing. An honest guest changes it
/// at most twice.
const MAX_ATTEMPTS: usize = 16;

/// The words of a table, in memory that the guest shares.
pub trait Words: Send + Sync {
    /// Number of words.
    fn count(&self) -> usize;

    /// Loads words from number `first` on; all of them exist.
    fn load_all(&self, first: usize, words: &mut [u64]);

    /// Loads a word with acquire order.
    fn load(&self, index: usize) -> Word;

    /// Replaces `current` by `new`, see [`ebb_hypercall_abi::shared_word::swap`].
    fn swap(&self, index: usize, current: Word, new: Word) -> bool;
}

/// Numbers of granules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Lazy: the guest offers them.
    pub lazy: u64,
    /// Discarded by the monitor, and not taken back by the guest.
    pub discarded: u64,
    /// Discarded at the last count, and taken back by the guest since.
    pub reused: u64,
}

/// A set of granules.
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(len: usize) -> Self {
        Self((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Returns true if it was not in the set.
    fn insert(&self, index: usize) -> bool {
        let bit = 1 << (index % 64);
        self.0[index / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    fn remove(&self, index: usize) {
        self.0[index / 64].fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
    }

    fn contains(&self, index: usize) -> bool {
        self.0[index / 64].load(Ordering::Acquire) & 1 << (index % 64) != 0
    }
}

/// The table of one arena.
///
/// **Locks**: `waiting` is held for moments; no other lock is taken under it.
pub struct Table<W> {
    words: W,
    /// The first granule that the guest may use; the table itself lies in those before it.
    first: usize,
    /// Granules that are being discarded. A thread that has inserted one is the only one to change it until it
    /// has removed it.
    taken: Bits,
    /// Granules that were discarded and not seen in use since.
    discarded: Bits,
    /// Granules that a thread has waited for and not made in use yet. They are not taken. Changes under `waiting` only.
    wanted: Bits,
    /// The numbers of these granules, one entry for each time that a thread has waited.
    waiting: Mutex<Vec<usize>>,
    finished: Condvar,
}

impl<W: Words> Table<W> {
    /// The table in `words`; granules before `first` are not looked at.
    #[must_use]
    pub fn new(words: W, first: usize) -> Self {
        let len = words.count();
        Self {
            words,
            first,
            taken: Bits::new(len),
            discarded: Bits::new(len),
            wanted: Bits::new(len),
            waiting: Mutex::new(Vec::new()),
            finished: Condvar::new(),
        }
    }

    /// Takes at most `max` lazy granules that were freed in generation `newest` or before, from number `cursor` on,
    /// and moves `cursor` to the first that was not looked at. `None`: there is none up to the end.
    pub fn take(&self, cursor: &mut usize, newest: u64, max: usize) -> Option<Taken<'_, W>> {
        self.take_of(cursor, &(0..=newest), max)
    }

    /// As [`Table::take`], for those that were freed in one of `generations`.
    pub fn take_of(
        &self,
        cursor: &mut usize,
        generations: &RangeInclusive<u64>,
        max: usize,
    ) -> Option<Taken<'_, W>> {
        let mut taken = Taken {
            table: self,
            runs: Vec::new(),
        };
        let mut count = 0;
        *cursor = self.scan(*cursor, |first, words| {
            for (index, &raw) in (first..).zip(words) {
                let word = Word::from_raw(raw);
                if word.state() != Some(State::Lazy) {
                    continue;
                }
                if count == max {
                    return ControlFlow::Break(index);
                }
                if generations.contains(&word.generation()) && self.claim(index, word) {
                    taken.push(index);
                    count += 1;
                }
            }
            ControlFlow::Continue(())
        });
        (count > 0).then_some(taken)
    }

    /// Loads the words from number `from` on and shows them to `look`, many at once, with the number of the first
    /// of them. Stops where `look` breaks; returns the number at which the next scan should begin.
    fn scan(
        &self,
        from: usize,
        mut look: impl FnMut(usize, &[u64]) -> ControlFlow<usize>,
    ) -> usize {
        let mut words = [0; WINDOW];
        let mut next = self.first.max(from);
        while next < self.words.count() {
            let words = &mut words[..WINDOW.min(self.words.count() - next)];
            self.words.load_all(next, words);
            if let ControlFlow::Break(index) = look(next, words) {
                return index;
            }
            next += words.len();
        }
        next
    }

    /// Makes a lazy word reclaiming. Returns true if the granule is the caller's now.
    fn claim(&self, index: usize, lazy: Word) -> bool {
        let Some(reclaiming) = lazy.take() else {
            return false;
        };
        if fault_point!("a granule is marked late") {
            return self.words.swap(index, lazy, reclaiming) && self.taken.insert(index);
        }
        // It was given back, but the thread that waited for it has not run yet, and would have to wait once more.
        let awaited = self.wanted.contains(index) && !fault_point!("an awaited granule is taken");
        // First the mark, then the word: a thread that finds the word reclaiming finds the mark too, and waits.
        if awaited || !self.taken.insert(index) {
            return false;
        }
        let claimed = self.words.swap(index, lazy, reclaiming);
        if !claimed {
            self.release(std::iter::once(index));
        }
        claimed
    }

    /// Makes a reclaiming word discarded if `gone`, else lazy.
    fn finish_word(&self, index: usize, gone: bool) {
        for _ in 0..MAX_ATTEMPTS {
            let word = self.words.load(index);
            match word.finish(gone) {
                Some(new) if !self.words.swap(index, word, new) => {}
                // Done, or the guest has written another word, which stays.
                _ => break,
            }
        }
    }

    /// Removes the marks of granules, and wakes the threads that wait for them.
    fn release(&self, granules: impl Iterator<Item = usize>) {
        for index in granules {
            self.taken.remove(index);
        }
        // A waiting thread looks at the mark under the lock: it has looked before this, or finds no mark.
        drop(lock(&self.waiting));
        self.finished.notify_all();
    }

    /// Waits until the monitor has finished with a granule. Returns true if it had to wait. Then the granule is wanted until
    /// [`Table::wants_no_more`].
    fn wait_for(&self, index: usize) -> bool {
        if !self.taken.contains(index) || fault_point!("a reuse does not wait for the granule") {
            return false;
        }
        let mut waiting = lock(&self.waiting);
        waiting.push(index);
        self.wanted.insert(index);
        while self.taken.contains(index) {
            waiting = wait(&self.finished, waiting);
        }
        true
    }

    /// Removes the entries of a thread that has waited for a granule so many `times`: it has the granule now, or has given up.
    fn wants_no_more(&self, index: usize, times: usize) {
        let mut waiting = lock(&self.waiting);
        for _ in 0..times {
            if let Some(at) = waiting.iter().position(|other| *other == index) {
                waiting.swap_remove(at);
            }
        }
        if !waiting.contains(&index) {
            self.wanted.remove(index);
        }
    }

    /// Makes a granule in use, whatever its word says, after the monitor has finished with it. Returns true if it
    /// had to wait. If the guest changes the word at the same time, the guest's change stays.
    pub fn reuse(&self, index: usize) -> bool {
        let mut waits = 0;
        for _ in 0..MAX_ATTEMPTS {
            let word = self.words.load(index);
            let new = match word.reuse() {
                Reuse::InUse => break,
                Reuse::Swap(new) => new,
                Reuse::Busy if self.wait_for(index) => {
                    waits += 1;
                    continue;
                }
                // The monitor is not discarding it, or no longer: the guest has written this word itself, or it
                // has changed since.
                Reuse::Busy => Word::new(State::InUse, word.generation()),
            };
            if self.words.swap(index, word, new) {
                // Taken, refused by the host and taken again since, it says reclaiming as before, and is being
                // discarded. In use now, it is not taken once more.
                let again = word.state() == Some(State::Reclaiming);
                if again && !fault_point!("a reuse does not wait after its swap") {
                    waits += usize::from(self.wait_for(index));
                }
                break;
            }
        }
        if waits > 0 {
            self.wants_no_more(index, waits);
        }
        waits > 0
    }

    /// Whether a thread waits for a granule, which is then not taken again before that thread has made it in use.
    #[must_use]
    pub fn is_wanted(&self, index: usize) -> bool {
        self.wanted.contains(index)
    }

    /// Makes all granules in use.
    pub fn reset(&self) {
        self.scan(0, |first, words| {
            for (index, &raw) in (first..).zip(words) {
                if Word::from_raw(raw).state() != Some(State::InUse) {
                    self.reuse(index);
                }
            }
            ControlFlow::Continue(())
        });
    }

    /// Counts the granules, and forgets those discarded ones that are in use again.
    pub fn count(&self) -> Count {
        let mut count = Count::default();
        self.scan(0, |first, words| {
            let lazy = |raw: &&u64| Word::from_raw(**raw).state() == Some(State::Lazy);
            count.lazy += words.iter().filter(lazy).count() as u64;
            self.count_discarded(first, words, &mut count);
            ControlFlow::Continue(())
        });
        count
    }

    /// Looks at the discarded granules among `words`, the first of which has number `first`.
    fn count_discarded(&self, first: usize, words: &[u64], count: &mut Count) {
        let last = first + words.len() - 1;
        for group in first / 64..=last / 64 {
            let mut bits = self.discarded.0[group].load(Ordering::Acquire);
            while bits != 0 {
                let index = group * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let Some(&raw) = index.checked_sub(first).and_then(|at| words.get(at)) else {
                    continue;
                };
                if Word::from_raw(raw).state() == Some(State::Discarded) {
                    count.discarded += 1;
                } else if !self.taken.contains(index) {
                    self.discarded.remove(index);
                    count.reused += 1;
                }
            }
        }
    }
}

/// Granules that the caller may discard until it calls [`Taken::finish`]; dropped before that, they are lazy
/// again.
pub struct Taken<'a, W: Words> {
    table: &'a Table<W>,
    runs: Vec<Range<usize>>,
}

impl<W: Words> Taken<'_, W> {
    fn push(&mut self, index: usize) {
        match self.runs.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => self.runs.push(index..index + 1),
        }
    }

    /// The granules, ascending, neighbours as one run.
    #[must_use]
    pub fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    /// Whether a thread waits for one of them. Who has not finished with them soon should give them back.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        let mut granules = self.runs.iter().flat_map(Clone::clone);
        granules.any(|index| self.table.is_wanted(index))
    }

    /// Gives them back: a run for which `gone` is true is discarded, the others are lazy again.
    pub fn finish(mut self, gone: &[bool]) {
        self.end(gone);
    }

    fn end(&mut self, gone: &[bool]) {
        let table = self.table;
        for (number, run) in self.runs.iter().enumerate() {
            let gone = gone.get(number).copied().unwrap_or(false);
            for index in run.clone() {
                if gone {
                    table.discarded.insert(index);
                }
                table.finish_word(index, gone);
            }
        }
        table.release(self.runs.iter().flat_map(Clone::clone));
        self.runs.clear();
    }
}

impl<W: Words> Drop for Taken<'_, W> {
    fn drop(&mut self) {
        if !self.runs.is_empty() {
            self.end(&[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table in this process. A swap is counted before it begins, and takes a lock for a moment.
    struct Own(Vec<AtomicU64>, AtomicU64, Mutex<()>);

    impl Words for Own {
        fn count(&self) -> usize {
            self.0.len()
        }

        fn load_all(&self, first: usize, words: &mut [u64]) {
            for (word, from) in words.iter_mut().zip(&self.0[first..]) {
                *word = from.load(Ordering::Relaxed);
            }
        }

        fn load(&self, index: usize) -> Word {
            Word::from_raw(self.0[index].load(Ordering::Acquire))
        }

        fn swap(&self, index: usize, current: Word, new: Word) -> bool {
            self.1.fetch_add(1, Ordering::AcqRel);
            drop(lock(&self.2));
            ebb_hypercall_abi::shared_word::swap(&self.0[index], current, new)
        }
    }

    const FIRST: usize = 3;
    const LEN: usize = 1536;

    fn table() -> Table<Own> {
        let words = (0..LEN).map(|_| AtomicU64::new(0)).collect();
        Table::new(Own(words, AtomicU64::new(0), Mutex::new(())), FIRST)
    }

    fn set(table: &Table<Own>, index: usize, state: State, generation: u64) {
        let word = Word::new(state, generation);
        table.words.0[index].store(word.raw(), Ordering::Release);
    }

    fn state(table: &Table<Own>, index: usize) -> Option<State> {
        table.words.load(index).state()
    }

    #[test]
    fn lazy_granules_are_taken_once_in_runs_and_never_the_table_itself() {
        let table = table();
        for index in [0, 2, 3, 4, 7, 600, 601, LEN - 1] {
            set(&table, index, State::Lazy, 5);
        }
        let mut cursor = 0;
        let first = table.take(&mut cursor, 5, 3).unwrap();
        assert_eq!(first.runs(), [3..5, 7..8]);
        let second = table.take(&mut cursor, 5, 100).unwrap();
        assert_eq!(second.runs(), [600..602, LEN - 1..LEN]);
        assert!(table.take(&mut cursor, 5, 100).is_none());
        assert!(table.take(&mut 0, 5, 100).is_none(), "all are taken");
        first.finish(&[true, false]);
        drop(second);
        let states = [3, 4, 7, 600, 0].map(|index| state(&table, index));
        let (gone, lazy) = (Some(State::Discarded), Some(State::Lazy));
        assert_eq!(states, [gone, gone, lazy, lazy, lazy]);
        let count = table.count();
        assert_eq!((count.lazy, count.discarded, count.reused), (4, 2, 0));
    }

    #[test]
    fn younger_granules_are_left_alone() {
        let table = table();
        set(&table, 9, State::Lazy, 6);
        set(&table, 10, State::Lazy, 5);
        let taken = table.take(&mut 0, 5, 9).unwrap();
        assert!(matches!(taken.runs(), [run] if *run == (10..11)));
        assert!(table.take(&mut 0, 4, 9).is_none());
        drop(taken);
        let taken = table.take_of(&mut 0, &(6..=7), 9).unwrap();
        assert!(matches!(taken.runs(), [run] if *run == (9..10)));
    }

    #[test]
    fn what_comes_back_is_counted_once() {
        let table = table();
        set(&table, 70, State::Lazy, 1);
        set(&table, 71, State::Lazy, 1);
        table.take(&mut 0, 9, 9).unwrap().finish(&[true]);
        assert!(!table.reuse(70), "nothing to wait for");
        let count = |lazy, discarded, reused| Count {
            lazy,
            discarded,
            reused,
        };
        assert_eq!(table.count(), count(0, 1, 1));
        assert_eq!(table.count(), count(0, 1, 0));
        table.reset();
        assert_eq!(table.count(), count(0, 0, 1));
    }

    #[test]
    fn reuse_waits_for_what_is_being_discarded_and_for_nothing_else() {
        let table = table();
        set(&table, 30, State::Reclaiming, 1);
        assert!(!table.reuse(30), "the guest wrote that itself");
        assert_eq!(state(&table, 30), Some(State::InUse));
        for _ in 0..2 {
            set(&table, 20, State::Lazy, 1);
            set(&table, 40, State::Lazy, 1);
            let taken = table.take(&mut 0, 9, 1).unwrap();
            let other = table.take(&mut 0, 9, 1).unwrap();
            assert!(!taken.is_wanted());
            std::thread::scope(|scope| {
                let reuse = scope.spawn(|| table.reuse(20));
                while !taken.is_wanted() {
                    std::thread::yield_now();
                }
                assert_eq!(state(&table, 20), Some(State::Reclaiming));
                assert!(!reuse.is_finished() && !other.is_wanted());
                taken.finish(&[true]);
                assert!(reuse.join().unwrap(), "it waited");
            });
            assert_eq!(state(&table, 20), Some(State::InUse));
        }
    }

    #[test]
    fn reuse_waits_for_what_is_taken_between_its_look_and_its_swap() {
        let table = table();
        // On a crowded host the thread may look too late to have to wait.
        let waited = || {
            set(&table, 20, State::Reclaiming, 1);
            std::thread::scope(|scope| {
                let swaps = lock(&table.words.2);
                let before = table.words.1.load(Ordering::Acquire);
                let reuse = scope.spawn(|| table.reuse(20));
                while table.words.1.load(Ordering::Acquire) == before {
                    std::thread::yield_now();
                }
                // Refused by the host and taken again, the granule says what it said.
                table.taken.insert(20);
                drop(swaps);
                std::thread::sleep(std::time::Duration::from_millis(10));
                table.release(std::iter::once(20));
                reuse.join().unwrap()
            })
        };
        while !waited() {}
        assert_eq!(state(&table, 20), Some(State::InUse));
    }

    #[test]
    fn what_a_thread_has_waited_for_is_not_taken_again_before_it_has_it() {
        let table = table();
        set(&table, 20, State::Lazy, 1);
        let taken = table.take(&mut 0, 9, 9).unwrap();
        std::thread::scope(|scope| {
            let reuse = scope.spawn(|| table.reuse(20));
            while !taken.is_wanted() {
                std::thread::yield_now();
            }
            table.finish_word(20, false);
            // The thread that waited comes up to its swap, and no further.
            let swaps = lock(&table.words.2);
            let before = table.words.1.load(Ordering::Acquire);
            let after = |count| table.words.1.load(Ordering::Acquire) == before + count;
            table.release(std::iter::once(20));
            while !after(1) {
                std::thread::yield_now();
            }
            let second = scope.spawn(|| table.take(&mut 0, 9, 9).is_none());
            while !second.is_finished() && !after(2) {
                std::thread::yield_now();
            }
            assert!(after(1), "the granule is being taken");
            drop(swaps);
            assert!(second.join().unwrap() && reuse.join().unwrap());
        });
        assert_eq!(state(&table, 20), Some(State::InUse));
        set(&table, 20, State::Lazy, 1);
        assert!(table.take(&mut 0, 9, 9).is_some(), "nobody waits any more");
    }

    #[test]
    fn a_granule_is_wanted_as_long_as_one_thread_waits_for_it() {
        let table = table();
        for _ in 0..2 {
            lock(&table.waiting).push(20);
        }
        table.wanted.insert(20);
        table.wants_no_more(20, 1);
        assert!(table.is_wanted(20));
        table.wants_no_more(20, 1);
        assert!(!table.is_wanted(20));
    }

    #[test]
    fn a_guest_that_scribbles_gets_what_it_wants() {
        let table = table();
        set(&table, 20, State::Lazy, 1);
        set(&table, 21, State::Lazy, 1);
        let taken = table.take(&mut 0, 9, 9).unwrap();
        table.words.0[20].store(u64::MAX, Ordering::Release);
        set(&table, 21, State::Lazy, 7);
        assert!(table.take(&mut 0, 9, 9).is_none(), "it is still ours");
        taken.finish(&[true]);
        assert_eq!(state(&table, 20), None);
        assert_eq!(state(&table, 21), Some(State::Lazy));
        assert_eq!(table.count().discarded, 0);
        assert!(table.take(&mut 0, 9, 9).is_some());
    }
}
