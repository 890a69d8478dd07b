//! Models of the granule word of `hypercall-abi`: a guest's vCPUs and the monitor's reclaimers at one word of the
//! table, by compare-and-swap alone, and the mistakes that the models must catch.
//!
//! The transitions are those of the crate; the loops around them are what any guest and any monitor have to write,
//! and so they stand here.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use ebb_hypercall_abi::granule::{Reuse, State, Word};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

/// A mistake in the loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    /// The guest stores the word that it has checked instead of swapping it in.
    FreeStores,
    /// The same for a reuse.
    ReuseStores,
    /// The monitor stores when it takes a granule.
    TakeStores,
    /// All accesses are relaxed.
    Relaxed,
    /// A guest that meets a granule being discarded takes it at once.
    ReuseDoesNotWait,
    /// The monitor says that it has discarded before it does.
    FinishesFirst,
}

/// A granule: its word and its content, which to discard is to write.
struct Granule {
    word: AtomicU64,
    content: UnsafeCell<u64>,
    mistake: Option<Mistake>,
}

impl Granule {
    fn new(state: State, mistake: Option<Mistake>) -> Arc<Self> {
        Arc::new(Self {
            word: AtomicU64::new(Word::new(state, 1).raw()),
            content: UnsafeCell::new(0),
            mistake,
        })
    }

    fn is(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn load(&self) -> Word {
        let order = if self.is(Mistake::Relaxed) {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        Word::from_raw(self.word.load(order))
    }

    /// Swaps `new` in for `seen`; with a mistake, stores it.
    fn swap(&self, seen: Word, new: Word, stores: Mistake) -> bool {
        if self.is(stores) {
            self.word.store(new.raw(), Ordering::Release);
            return true;
        }
        let order = if self.is(Mistake::Relaxed) {
            Ordering::Relaxed
        } else {
            Ordering::AcqRel
        };
        self.word
            .compare_exchange(seen.raw(), new.raw(), order, Ordering::Relaxed)
            .is_ok()
    }

    /// Guest: gives the granule away; false when it is not its own.
    fn free(&self, generation: u64) -> bool {
        let seen = self.load();
        seen.free(generation)
            .is_some_and(|new| self.swap(seen, new, Mistake::FreeStores))
    }

    /// Guest: wants it back, and waits for as long as it is being discarded.
    fn reuse(&self) -> bool {
        loop {
            let seen = self.load();
            match seen.reuse() {
                Reuse::InUse => return false,
                Reuse::Swap(new) => {
                    if self.swap(seen, new, Mistake::ReuseStores) {
                        return true;
                    }
                }
                Reuse::Busy if self.is(Mistake::ReuseDoesNotWait) => {
                    let new = Word::new(State::InUse, seen.generation());
                    if self.swap(seen, new, Mistake::ReuseStores) {
                        return true;
                    }
                }
                Reuse::Busy => thread::yield_now(),
            }
        }
    }

    /// Monitor: takes the granule if it is lazy and discards it.
    fn reclaim(&self) -> bool {
        let seen = self.load();
        let Some(taken) = seen.take() else {
            return false;
        };
        if !self.swap(seen, taken, Mistake::TakeStores) {
            return false;
        }
        if self.is(Mistake::FinishesFirst) {
            self.finish();
            self.write();
        } else {
            self.write();
            self.finish();
        }
        true
    }

    fn finish(&self) {
        let seen = self.load();
        if let Some(done) = seen.finish(true) {
            self.swap(seen, done, Mistake::TakeStores);
        }
    }

    /// Writes to the content: loom reports who else is at it.
    fn write(&self) {
        self.content.with_mut(|content| {
            // SAFETY: loom has checked that nobody else is at it.
            unsafe { *content += 1 };
        });
    }
}

fn explore(model: fn(Option<Mistake>), mistake: Option<Mistake>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(move || model(mistake));
}

/// The model holds, and each of the mistakes makes it fail.
fn check(model: fn(Option<Mistake>), mistakes: &[Mistake]) {
    explore(model, None);
    for &mistake in mistakes {
        let result = catch_unwind(AssertUnwindSafe(|| explore(model, Some(mistake))));
        assert!(result.is_err(), "{mistake:?} is not noticed");
        println!("{mistake:?} is caught");
    }
}

/// A vCPU takes its granule back and uses it, frees it again and takes it back once more; two reclaimers are after it all the
/// while. Neither touches what is in use, never both at once, and nobody is stuck.
fn what_the_guest_holds_is_its_own(mistake: Option<Mistake>) {
    let granule = Granule::new(State::Lazy, mistake);
    let reclaimers = [(); 2].map(|()| {
        let granule = Arc::clone(&granule);
        thread::spawn(move || granule.reclaim())
    });
    assert!(granule.reuse());
    granule.write();
    let reclaimed = reclaimers.map(|reclaimer| reclaimer.join().unwrap());
    assert_eq!(granule.load().state(), Some(State::InUse));
    assert!(
        !(reclaimed[0] && reclaimed[1]),
        "a granule is lazy once, and taken once"
    );
}

#[test]
fn held() {
    let mistakes = [
        Mistake::ReuseStores,
        Mistake::TakeStores,
        Mistake::Relaxed,
        Mistake::ReuseDoesNotWait,
        Mistake::FinishesFirst,
    ];
    check(what_the_guest_holds_is_its_own, &mistakes);
}

/// A vCPU frees what another one of the same guest frees, too, while the monitor takes it: it is freed once, and comes back once.
fn a_granule_is_freed_once(mistake: Option<Mistake>) {
    let granule = Granule::new(State::InUse, mistake);
    let other = {
        let granule = Arc::clone(&granule);
        thread::spawn(move || granule.free(2))
    };
    let monitor = {
        let granule = Arc::clone(&granule);
        thread::spawn(move || granule.reclaim())
    };
    let freed = granule.free(3);
    let also_freed = other.join().unwrap();
    assert!(freed != also_freed, "one of them, and one only");
    let taken = monitor.join().unwrap();
    let state = if taken { State::Discarded } else { State::Lazy };
    assert_eq!(granule.load().state(), Some(state));
    assert!(granule.reuse());
    granule.write();
}

#[test]
fn freed() {
    check(a_granule_is_freed_once, &[Mistake::FreeStores]);
}
