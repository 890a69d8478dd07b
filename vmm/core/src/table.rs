//! The table of granules from the monitor's side: takes what is lazy, ends what was taken, waits.
//!
//! The guest can write whatever it likes to the words, at any time. So every change is a compare-and-swap from a word
//! that was loaded once, nothing is tried more often than [`ATTEMPTS`] times, and what the monitor must be sure of
//! (which granules it is discarding, which it has discarded) stands in bitmaps of its own.

use std::ops::Range;

use ebb_hypercall_abi::granule::{Reuse, State, Word};

use crate::fault::fault_point;
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock, wait};

/// Words that are loaded at once.
const WINDOW: usize = 512;

/// How often a word is tried to change that a hostile guest changes at the same time. An honest guest leaves it alone
/// after the second time at the latest.
pub const ATTEMPTS: usize = 16;

/// Where the words are.
pub trait Words: Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Loads the words from number `first` on, which are there.
    fn load_all(&self, first: usize, words: &mut [u64]);

    /// Loads a word with acquire order.
    fn load(&self, index: usize) -> u64;

    /// Stores `new` if the word is still `current`, with acquire and release order; whether it was.
    fn swap(&self, index: usize, current: u64, new: u64) -> bool;
}

/// What a count has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Granules that the guest offers.
    pub lazy: u64,
    /// Granules that the monitor has discarded and the guest has not taken back.
    pub discarded: u64,
    /// Granules that the monitor had discarded at the last count, and the guest has taken back since.
    pub reused: u64,
}

/// A set of granules.
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(len: usize) -> Self {
        Self((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

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
/// **Locks**: `sleepers` guards the condition variable alone and is held for moments; no other lock is taken under it.
pub struct Table<W> {
    words: W,
    /// The words before this one are not looked at: the table's own granules.
    first: usize,
    /// Granules that are being discarded. Whoever inserts one may take it; nobody else touches it until he has removed
    /// it.
    taken: Bits,
    /// Granules that were discarded and not seen in use since.
    discarded: Bits,
    sleepers: Mutex<()>,
    finished: Condvar,
}

impl<W: Words> Table<W> {
    /// The table in `words`, of which those before `first` belong to the table's own granules.
    #[must_use]
    pub fn new(words: W, first: usize) -> Self {
        let len = words.count();
        Self {
            words,
            first,
            taken: Bits::new(len),
            discarded: Bits::new(len),
            sleepers: Mutex::new(()),
            finished: Condvar::new(),
        }
    }

    /// Takes lazy granules that were freed at `newest` or before, from number `cursor` on, at most `most` of them, and
    /// moves `cursor` behind the last that was looked at. `None`: there is none up to the end.
    pub fn take(&self, cursor: &mut usize, newest: u64, most: usize) -> Option<Taken<'_, W>> {
        let mut taken = Taken {
            table: self,
            runs: Vec::new(),
        };
        let (mut count, mut window) = (0, [0; WINDOW]);
        let mut next = self.first.max(*cursor);
        while next < self.words.count() && count < most {
            let window = &mut window[..WINDOW.min(self.words.count() - next)];
            self.words.load_all(next, window);
            let start = next;
            next += window.len();
            for (index, &raw) in (start..).zip(window.iter()) {
                if Word::from_raw(raw).state() != Some(State::Lazy) {
                    continue;
                }
                if count == most {
                    next = index;
                    break;
                }
                if Word::from_raw(raw).generation() <= newest && self.claim(index, raw) {
                    taken.push(index);
                    count += 1;
                }
            }
        }
        *cursor = next;
        (count > 0).then_some(taken)
    }

    /// Makes a lazy word, as it was loaded, reclaiming; whether it is ours now.
    fn claim(&self, index: usize, raw: u64) -> bool {
        let Some(new) = Word::from_raw(raw).take() else {
            return false;
        };
        if fault_point!("a granule is marked late") {
            return self.words.swap(index, raw, new.raw()) && self.taken.insert(index);
        }
        // First the mark, then the word: who finds the word reclaiming finds the mark, too, and waits.
        if !self.taken.insert(index) {
            return false;
        }
        let ours = self.words.swap(index, raw, new.raw());
        if !ours {
            self.release(std::iter::once(index));
        }
        ours
    }

    /// Unmarks granules, and wakes who waits for one.
    fn release(&self, granules: impl Iterator<Item = usize>) {
        for index in granules {
            self.taken.remove(index);
        }
        // A waiter has looked at the mark under the lock, or will.
        drop(lock(&self.sleepers));
        self.finished.notify_all();
    }

    /// Waits until the monitor is done with granule `index`; whether it had to.
    fn wait_for(&self, index: usize) -> bool {
        if !self.taken.contains(index) || fault_point!("a reuse does not wait for the granule") {
            return false;
        }
        let mut sleepers = lock(&self.sleepers);
        while self.taken.contains(index) {
            sleepers = wait(&self.finished, sleepers);
        }
        true
    }

    /// Makes granule `index` in use, whatever its word says, after the monitor is done with it; whether it had to wait.
    /// A guest that changes the word at the same time gets what it wants.
    pub fn reuse(&self, index: usize) -> bool {
        let mut waited = false;
        for _ in 0..ATTEMPTS {
            let raw = self.words.load(index);
            let word = Word::from_raw(raw);
            let new = match word.reuse() {
                Reuse::InUse => break,
                Reuse::Swap(new) => new,
                Reuse::Busy if self.wait_for(index) => {
                    waited = true;
                    continue;
                }
                // Ours it was not, or not any more: the guest has written that by itself, or another word stands there by now.
                Reuse::Busy => Word::new(State::InUse, word.generation()),
            };
            if self.words.swap(index, raw, new.raw()) {
                break;
            }
        }
        waited
    }

    /// Makes all granules in use.
    pub fn reset(&self) {
        let mut window = [0; WINDOW];
        let mut next = self.first;
        while next < self.words.count() {
            let window = &mut window[..WINDOW.min(self.words.count() - next)];
            self.words.load_all(next, window);
            for (index, &raw) in (next..).zip(window.iter()) {
                if Word::from_raw(raw).state() != Some(State::InUse) {
                    self.reuse(index);
                }
            }
            next += window.len();
        }
    }

    /// Counts, and forgets discarded granules that are in use again.
    pub fn count(&self) -> Count {
        let (mut count, mut window) = (Count::default(), [0; WINDOW]);
        let mut next = self.first;
        while next < self.words.count() {
            let window = &mut window[..WINDOW.min(self.words.count() - next)];
            self.words.load_all(next, window);
            let lazy = |raw: &&u64| Word::from_raw(**raw).state() == Some(State::Lazy);
            count.lazy += window.iter().filter(lazy).count() as u64;
            self.settle(next, window, &mut count);
            next += window.len();
        }
        count
    }

    /// Looks what became of the discarded granules among `words`, the first of which has number `first`.
    fn settle(&self, first: usize, words: &[u64], count: &mut Count) {
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

/// Granules that are ours until [`Taken::finish`]; lazy again when dropped without.
pub struct Taken<'a, W: Words> {
    table: &'a Table<W>,
    runs: Vec<Range<usize>>,
}

impl<W: Words> Taken<'_, W> {
    /// Neighbours are one run.
    fn push(&mut self, index: usize) {
        match self.runs.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => self.runs.push(index..index + 1),
        }
    }

    /// Which they are, ascending.
    #[must_use]
    pub fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    /// Ends it: the runs for which `gone` is true are discarded, the others are lazy again.
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
                for _ in 0..ATTEMPTS {
                    let raw = table.words.load(index);
                    match Word::from_raw(raw).finish(gone) {
                        Some(new) if !table.words.swap(index, raw, new.raw()) => {}
                        // Done, or the guest has scribbled over it: then it stays as the guest wants it.
                        _ => break,
                    }
                }
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

    /// A table in this process.
    struct Own(Vec<AtomicU64>);

    impl Words for Own {
        fn count(&self) -> usize {
            self.0.len()
        }

        fn load_all(&self, first: usize, words: &mut [u64]) {
            for (word, from) in words.iter_mut().zip(&self.0[first..]) {
                *word = from.load(Ordering::Relaxed);
            }
        }

        fn load(&self, index: usize) -> u64 {
            self.0[index].load(Ordering::Acquire)
        }

        fn swap(&self, index: usize, current: u64, new: u64) -> bool {
            let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
            self.0[index]
                .compare_exchange(current, new, success, failure)
                .is_ok()
        }
    }

    const FIRST: usize = 3;
    const LEN: usize = 1500;

    fn table() -> Table<Own> {
        Table::new(Own((0..LEN).map(|_| AtomicU64::new(0)).collect()), FIRST)
    }

    fn set(table: &Table<Own>, index: usize, state: State, generation: u64) {
        let word = Word::new(state, generation);
        table.words.0[index].store(word.raw(), Ordering::Release);
    }

    fn state(table: &Table<Own>, index: usize) -> Option<State> {
        Word::from_raw(table.words.load(index)).state()
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
        // On a crowded host the thread may begin too late to have to wait.
        let waited = || {
            set(&table, 20, State::Lazy, 1);
            let taken = table.take(&mut 0, 9, 9).unwrap();
            std::thread::scope(|scope| {
                let reuse = scope.spawn(|| table.reuse(20));
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert_eq!(state(&table, 20), Some(State::Reclaiming));
                assert!(!reuse.is_finished());
                taken.finish(&[true]);
                let waited = reuse.join().unwrap();
                assert_eq!(state(&table, 20), Some(State::InUse));
                waited
            })
        };
        while !waited() {}
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
