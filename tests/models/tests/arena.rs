//! The table of an arena between a guest that keeps to the rules and the monitor's reclaimers.
#![cfg(loom)]

use std::sync::Arc;

use ebb_core::table::{Table, Words};
use ebb_hypercall_abi::granule::{Reuse, Word};
use ebb_models::check;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// Words that both sides share.
struct Shared(Arc<Vec<AtomicU64>>);

fn swap(word: &AtomicU64, old: u64, new: u64) -> bool {
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

impl Words for Shared {
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
        swap(&self.0[index], current, new)
    }
}

/// A machine: the table from both sides, and the memory of its granules. Whoever touches memory that another touches at
/// the same time fails the model.
struct Machine {
    table: Table<Shared>,
    words: Arc<Vec<AtomicU64>>,
    memory: Vec<UnsafeCell<u64>>,
}

// The cells are checked by loom.
impl Machine {
    fn new(granules: usize) -> Arc<Self> {
        let words: Arc<Vec<_>> = Arc::new((0..granules).map(|_| AtomicU64::new(0)).collect());
        Arc::new(Self {
            table: Table::new(Shared(Arc::clone(&words)), 0),
            words,
            memory: (0..granules).map(|_| UnsafeCell::new(0)).collect(),
        })
    }

    /// The guest writes and frees; it holds the granule.
    fn write_and_free(&self, index: usize) {
        self.memory[index].with_mut(|_| ());
        let raw = self.words[index].load(Ordering::Relaxed);
        let free = Word::from_raw(raw).free(1).expect("it is in use");
        assert!(
            swap(&self.words[index], raw, free.raw()),
            "nobody else changes what is in use"
        );
    }

    /// The guest takes it back and writes.
    fn reuse_and_write(&self, index: usize) {
        loop {
            let raw = self.words[index].load(Ordering::Acquire);
            match Word::from_raw(raw).reuse() {
                Reuse::Swap(new) if swap(&self.words[index], raw, new.raw()) => break,
                // The monitor was faster.
                Reuse::Swap(_) => {}
                // No spinning here: the call at once.
                Reuse::Busy => {
                    self.table.reuse(index);
                    break;
                }
                Reuse::InUse => panic!("freed, and in use"),
            }
        }
        self.memory[index].with_mut(|_| ());
    }

    /// The monitor takes what there is and discards it.
    fn reclaim(&self, gone: bool) {
        let mut cursor = 0;
        while let Some(taken) = self.table.take(&mut cursor, u64::MAX, 1) {
            for index in taken.runs().iter().flat_map(Clone::clone) {
                self.memory[index].with_mut(|_| ());
            }
            taken.finish(&[gone]);
        }
    }
}

/// One granule, freed and taken back twice, while a reclaimer takes it.
fn a_granule_in_use_is_never_discarded() {
    let machine = Machine::new(1);
    let monitor = Arc::clone(&machine);
    let reclaimer = thread::spawn(move || monitor.reclaim(true));
    for _ in 0..2 {
        machine.write_and_free(0);
        machine.reuse_and_write(0);
    }
    reclaimer.join().unwrap();
    machine.memory[0].with_mut(|_| ());
}

#[test]
fn one_guest_one_reclaimer() {
    let faults = [
        "a granule is marked late",
        "a reuse does not wait for the granule",
    ];
    check(4, a_granule_in_use_is_never_discarded, &faults);
}

/// Two threads of the guest with a granule each, and two reclaimers, one of which the host refuses.
fn two_against_two() {
    let machine = Machine::new(2);
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || match number {
                0 => {
                    machine.write_and_free(1);
                    machine.reuse_and_write(1);
                }
                1 => machine.reclaim(true),
                _ => machine.reclaim(false),
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
