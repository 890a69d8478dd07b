//! The table of an arena and its words: threads of a guest at one end, the monitor's reclaimers at the other. Both
//! sides run the code that they have in production.
#![cfg(loom)]

use std::sync::Arc;

use ebb_core::table::{Table, Words};
use ebb_hypercall_abi::granule::{Reuse, State, Word};
use ebb_hypercall_abi::shared_word;
use ebb_models::{check, must_fail};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// What the guest does. With anything but the real code the models must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    /// The real code.
    Real,
    /// A free stores the word that it has checked, instead of a compare-and-swap.
    StoresToFree,
    /// The same for a reuse.
    StoresToReuse,
    /// A reuse swaps with relaxed order.
    RelaxedReuse,
    /// A reuse takes a granule that is being discarded.
    DoesNotWait,
}

/// Words that both sides share.
struct Shared(Arc<Vec<AtomicU64>>);

impl Words for Shared {
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
        shared_word::swap(&self.0[index], current, new)
    }
}

/// A table from both sides, and the memory of its granules. To discard a granule is to write to it; loom reports
/// two threads that touch one granule with nothing to order them.
struct Machine {
    guest: Guest,
    table: Table<Shared>,
    words: Arc<Vec<AtomicU64>>,
    memory: Vec<UnsafeCell<u64>>,
}

impl Machine {
    /// All granules are in use.
    fn new(guest: Guest, granules: usize) -> Arc<Self> {
        let words: Arc<Vec<_>> = Arc::new((0..granules).map(|_| AtomicU64::new(0)).collect());
        Arc::new(Self {
            guest,
            table: Table::new(Shared(Arc::clone(&words)), 0),
            words,
            memory: (0..granules).map(|_| UnsafeCell::new(0)).collect(),
        })
    }

    fn write(&self, index: usize) {
        self.memory[index].with_mut(|_| ());
    }

    /// Guest: returns true if this freed the granule.
    fn free(&self, index: usize) -> bool {
        let word = &self.words[index];
        if self.guest != Guest::StoresToFree {
            return shared_word::free(word, 1);
        }
        let free = Word::from_raw(word.load(Ordering::Relaxed)).free(1);
        if let Some(free) = free {
            word.store(free.raw(), Ordering::Release);
        }
        free.is_some()
    }

    /// Guest: takes a granule back; `wait` as in [`shared_word::reuse`].
    fn reuse(&self, index: usize, wait: impl Fn()) {
        let word = &self.words[index];
        if matches!(self.guest, Guest::Real | Guest::StoresToFree) {
            shared_word::reuse(word, wait);
            return;
        }
        loop {
            let seen = Word::from_raw(word.load(Ordering::Relaxed));
            let new = match seen.reuse() {
                Reuse::InUse => return,
                Reuse::Swap(new) => new,
                Reuse::Busy if self.guest == Guest::DoesNotWait => {
                    Word::new(State::InUse, seen.generation())
                }
                Reuse::Busy => {
                    wait();
                    continue;
                }
            };
            let done = match self.guest {
                Guest::StoresToReuse => {
                    word.store(new.raw(), Ordering::Release);
                    true
                }
                Guest::RelaxedReuse => {
                    let relaxed = Ordering::Relaxed;
                    word.compare_exchange(seen.raw(), new.raw(), relaxed, relaxed)
                        .is_ok()
                }
                _ => shared_word::swap(word, seen, new),
            };
            if done {
                return;
            }
        }
    }

    /// Guest: writes to a granule in use and frees it.
    fn write_and_free(&self, index: usize) {
        self.write(index);
        assert!(self.free(index), "nobody else changes what is in use");
    }

    /// Guest: takes a granule back, by a call if it is being discarded, and writes to it.
    fn reuse_and_write(&self, index: usize) {
        self.reuse(index, || {
            self.table.reuse(index);
        });
        self.write(index);
    }

    /// Monitor: takes all that is lazy and discards it, or is refused. Returns the number of granules.
    fn reclaim(&self, gone: bool) -> usize {
        let (mut cursor, mut count) = (0, 0);
        while let Some(taken) = self.table.take(&mut cursor, u64::MAX, 1) {
            for index in taken.runs().iter().flat_map(Clone::clone) {
                self.write(index);
                count += 1;
            }
            taken.finish(&[gone]);
        }
        count
    }

    fn state(&self, index: usize) -> Option<State> {
        Word::from_raw(self.words[index].load(Ordering::Relaxed)).state()
    }
}

/// One granule, freed and taken back twice, while a reclaimer takes it.
fn freed_and_reused_twice() {
    let machine = Machine::new(Guest::Real, 1);
    let monitor = Arc::clone(&machine);
    let reclaimer = thread::spawn(move || monitor.reclaim(true));
    for _ in 0..2 {
        machine.write_and_free(0);
        machine.reuse_and_write(0);
    }
    reclaimer.join().unwrap();
    machine.write(0);
}

#[test]
fn one_guest_one_reclaimer() {
    let faults = [
        "a granule is marked late",
        "a reuse does not wait for the granule",
    ];
    check(4, freed_and_reused_twice, &faults);
}

/// Two threads of the guest with a granule each, and two reclaimers, one of which the host refuses.
fn two_against_two() {
    let machine = Machine::new(Guest::Real, 2);
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || match number {
                0 => {
                    machine.write_and_free(1);
                    machine.reuse_and_write(1);
                }
                1 => drop(machine.reclaim(true)),
                _ => drop(machine.reclaim(false)),
            })
        })
        .collect();
    machine.write_and_free(0);
    machine.reuse_and_write(0);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn two_guests_two_reclaimers() {
    check(
        2,
        two_against_two,
        &["a reuse does not wait for the granule"],
    );
}

/// A lazy granule is taken back while a reclaimer takes it twice, because the host refuses the first time: it is left
/// alone once the guest has it. With `calls`, the guest takes it back by a call in any case; else as
/// [`shared_word::reuse`] does, and by a call while it is being discarded.
fn taken_twice(calls: bool) {
    let machine = Machine::new(Guest::Real, 1);
    machine.write_and_free(0);
    let monitor = Arc::clone(&machine);
    let reclaimer = thread::spawn(move || monitor.reclaim(false) + monitor.reclaim(true));
    if calls {
        machine.table.reuse(0);
        machine.write(0);
    } else {
        machine.reuse_and_write(0);
    }
    reclaimer.join().unwrap();
    assert_eq!(machine.state(0), Some(State::InUse));
}

#[test]
fn refused_and_taken_again() {
    let faults = [
        "a reuse does not wait for the granule",
        "a reuse does not wait after its swap",
    ];
    check(4, || taken_twice(true), &faults);
    check(4, || taken_twice(false), &faults);
}

/// A reclaimer gives a granule back that a call waits for: then it is the call's, whoever of the two runs first.
fn given_back_to_who_waits() {
    let machine = Machine::new(Guest::Real, 1);
    machine.write_and_free(0);
    let taken = machine.table.take(&mut 0, u64::MAX, 1).unwrap();
    let guest = Arc::clone(&machine);
    let guest = thread::spawn(move || {
        guest.table.reuse(0);
        guest.write(0);
    });
    machine.write(0);
    let wanted = taken.is_wanted();
    drop(taken);
    let again = machine.reclaim(true);
    assert!(!wanted || again == 0, "the call has waited for it");
    guest.join().unwrap();
    assert_eq!(machine.state(0), Some(State::InUse));
}

#[test]
fn left_to_the_call_that_waits() {
    let faults = [
        "a reuse does not wait for the granule",
        "an awaited granule is taken",
    ];
    check(4, given_back_to_who_waits, &faults);
}

/// The guest's own loop waits without a call. It never swaps a word away that says reclaiming, so it needs no second
/// look: what it takes is lazy or discarded at that moment.
fn taken_twice_without_a_call(guest: Guest) {
    let machine = Machine::new(guest, 1);
    machine.write_and_free(0);
    let monitor = Arc::clone(&machine);
    let reclaimer = thread::spawn(move || monitor.reclaim(false) + monitor.reclaim(true));
    machine.reuse(0, thread::yield_now);
    machine.write(0);
    reclaimer.join().unwrap();
}

#[test]
fn refused_and_taken_again_without_a_call() {
    check(4, || taken_twice_without_a_call(Guest::Real), &[]);
    for guest in [Guest::StoresToReuse, Guest::DoesNotWait] {
        must_fail(4, &format!("{guest:?}"), move || {
            taken_twice_without_a_call(guest);
        });
    }
}

/// A lazy granule is taken back, without a call, while two reclaimers want it: at most one gets it, and neither
/// touches it once the guest has it.
fn reused_under_two_reclaimers(guest: Guest) {
    let machine = Machine::new(guest, 1);
    machine.write_and_free(0);
    let reclaimers = [(); 2].map(|()| {
        let machine = Arc::clone(&machine);
        thread::spawn(move || machine.reclaim(true))
    });
    machine.reuse(0, thread::yield_now);
    machine.write(0);
    let taken = reclaimers.map(|reclaimer| reclaimer.join().unwrap());
    assert!(taken.iter().sum::<usize>() <= 1, "it was lazy once");
    assert_eq!(machine.state(0), Some(State::InUse));
}

#[test]
fn one_guest_two_reclaimers() {
    check(4, || reused_under_two_reclaimers(Guest::Real), &[]);
    for guest in [
        Guest::StoresToReuse,
        Guest::RelaxedReuse,
        Guest::DoesNotWait,
    ] {
        must_fail(4, &format!("{guest:?}"), move || {
            reused_under_two_reclaimers(guest);
        });
    }
}

/// Two threads of the guest free one granule while the monitor takes it: it is freed once, and comes back once.
fn freed_by_two(guest: Guest) {
    let machine = Machine::new(guest, 1);
    let other = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || machine.free(0))
    };
    let monitor = {
        let machine = Arc::clone(&machine);
        thread::spawn(move || machine.reclaim(true))
    };
    let freed = machine.free(0);
    assert!(freed != other.join().unwrap(), "one of them, and one only");
    let state = match monitor.join().unwrap() {
        0 => State::Lazy,
        _ => State::Discarded,
    };
    assert_eq!(machine.state(0), Some(state));
    machine.reuse_and_write(0);
}

#[test]
fn two_guests_free_one_granule() {
    check(4, || freed_by_two(Guest::Real), &[]);
    must_fail(4, "StoresToFree", || freed_by_two(Guest::StoresToFree));
}
