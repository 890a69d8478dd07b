//! Discards granules of an arena that its table says are lazy.

use std::time::Instant;

use ebb_core::release::{Release, ReleasePages};

use super::Outcome;
use super::pace::Pace;
use crate::arena::Arena;

/// One sweep over an arena.
pub(super) struct GranulePass<'a> {
    pub arena: &'a Arena,
    pub pages: &'a dyn ReleasePages,
    /// Granules that were freed in a later generation are not taken.
    pub newest: u64,
    /// Maximum number of bytes.
    pub bytes: u64,
}

impl GranulePass<'_> {
    /// Runs the pass. `chunk` is the size of the first chunk in bytes, and then of the first chunk of the next pass.
    pub fn run(&self, chunk: &mut u64) -> Outcome {
        let (mut outcome, mut cursor, mut pace) = (Outcome::default(), 0, Pace::new(*chunk));
        let granule = self.arena.place().layout.granule();
        while outcome.bytes < self.bytes {
            let max = pace.size.max(granule).min(self.bytes - outcome.bytes);
            let Some(taken) = self.arena.take(&mut cursor, self.newest, max) else {
                break;
            };
            let len = taken.ranges().iter().map(|range| range.len()).sum();
            let start = Instant::now();
            let released = self.pages.release(taken.ranges(), Release::Discard);
            pace.learn(len, start.elapsed());
            taken.finish(&released.bytes);
            outcome += &released;
        }
        *chunk = pace.size;
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ebb_core::generation::{Gate, VmGeneration};
    use ebb_core::lazy::LazyMemory;
    use ebb_core::range::GpaRange;
    use ebb_hypercall_abi::granule::{State, Word};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::arena::Arenas;
    use crate::memory::{Backing, GuestRam};
    use crate::reclaim::{Mode, Order, Reach, ReclaimTuning, Reclaimer, Sample};

    const MIB: u64 = 1 << 20;
    const GRANULE: u64 = 2 * MIB;
    const START: u64 = 4 << 30;

    struct Machine {
        ram: Arc<GuestRam>,
        lazy: Arc<LazyMemory>,
        reclaimer: Reclaimer,
    }

    fn machine(mode: Mode) -> Machine {
        let range = |start, len| GpaRange::new(start, start + len).unwrap();
        let gpa = range(START, 64 * MIB);
        let ram = GuestRam::with_arenas(Backing::default(), &[range(0, 8 * MIB)], &[gpa]);
        let ram = Arc::new(ram.unwrap());
        let arena = Arena::new(0, "a".to_owned(), gpa, GRANULE, ram.memory()).unwrap();
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
        let lazy = Arc::new(LazyMemory::new(1000, generation));
        let tuning = ReclaimTuning {
            mode,
            ..ReclaimTuning::default()
        };
        let pages: Arc<dyn ReleasePages> = ram.clone();
        let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, gate, tuning);
        let arenas = Arenas::from([Arc::new(arena)]);
        Machine {
            reclaimer: reclaimer.with_arenas(arenas),
            ram,
            lazy,
        }
    }

    impl Machine {
        /// The guest touches granule `index` and frees it with the generation that it finds in the header.
        fn free(&self, index: u64) {
            let memory = self.ram.memory();
            let store = |at, word: u64| {
                let order = std::sync::atomic::Ordering::Release;
                memory.store(word, GuestAddress(START + at), order).unwrap();
            };
            store(index * GRANULE, 1);
            let at = GuestAddress(START + ebb_hypercall_abi::arena::GENERATION);
            let generation: u64 = memory.read_obj(at).unwrap();
            store(4096 + 8 * index, Word::new(State::Lazy, generation).raw());
        }

        fn state(&self, index: u64) -> Option<State> {
            let at = GuestAddress(START + 4096 + 8 * index);
            Word::from_raw(self.ram.memory().read_obj(at).unwrap()).state()
        }

        fn lazy_now(&self, stalled: bool) -> u64 {
            let sample = Sample {
                stalled,
                available: 9 << 30,
                total: 16 << 30,
                ..Sample::default()
            };
            self.reclaimer.sampled(sample).lazy
        }
    }

    #[test]
    fn what_has_survived_a_reclaim_goes_first() {
        let machine = machine(Mode::Pressure);
        machine.free(9);
        assert_eq!(
            machine.reclaimer.reclaim(MIB).bytes,
            0,
            "less than a granule"
        );
        machine.free(3);
        let outcome = machine.reclaimer.reclaim(GRANULE);
        assert_eq!((outcome.bytes, outcome.calls), (GRANULE, 1));
        assert_eq!(machine.state(9), Some(State::Discarded));
        assert_eq!(machine.state(3), Some(State::Lazy));
        assert_eq!(machine.reclaimer.reclaim(u64::MAX).bytes, GRANULE);
        assert_eq!(machine.reclaimer.snapshot().discard_calls_total, 2);
    }

    #[test]
    fn ram_and_granules_are_one_supply() {
        let machine = machine(Mode::Pressure);
        machine.lazy.free(&[GpaRange::new(0, 4 * MIB).unwrap()]);
        (2..6).for_each(|index| machine.free(index));
        assert_eq!(machine.lazy_now(true), 12 * MIB);
        assert_eq!(machine.lazy_now(false), 4 * MIB, "calm: nobody counts");
        assert_eq!(machine.reclaimer.reclaim(8 * MIB).bytes, 8 * MIB);
        assert_eq!(
            machine.lazy.snapshot().discarded_bytes,
            4 * MIB,
            "RAM first"
        );
        assert_eq!(machine.lazy_now(true), 4 * MIB);
        assert_eq!(machine.reclaimer.reclaim(u64::MAX).bytes, 4 * MIB);
        assert_eq!(machine.ram.resident(), 2 * 4096, "header and table");
    }

    #[test]
    fn by_age_only_what_was_freed_before() {
        let machine = machine(Mode::Age(std::time::Duration::from_secs(1)));
        machine.free(2);
        let order = Order {
            bytes: u64::MAX,
            reach: Reach::Blocks,
            newest: machine.lazy.generation(),
            urgent: false,
        };
        assert_eq!(machine.lazy_now(false), GRANULE, "and a generation begins");
        machine.free(3);
        assert_eq!(machine.reclaimer.discard(order).bytes, GRANULE);
        assert_eq!(machine.state(3), Some(State::Lazy));
    }
}
