//! Discards granules of an arena that its table says are lazy, or marks them free.

use std::ops::RangeInclusive;
use std::time::Instant;

use ebb_core::metrics::Histogram;
use ebb_core::range::GpaRange;
use ebb_core::release::{Release, ReleasePages, Released};

use super::Outcome;
use super::pace::Pace;
use super::turns::Turn;
use crate::arena::{Arena, Granules};

/// How far the granules of an arena are marked free. A word does not tell, and a mark is needed once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Marked {
    /// Granules that were freed in earlier generations are marked.
    from: u64,
    /// The present sweep goes up to this generation.
    to: u64,
    /// The first granule that it has not looked at.
    cursor: usize,
}

impl Marked {
    /// What the next pass is to look at, if `now` is the machine's generation.
    pub fn next(&mut self, now: u64) -> (RangeInclusive<u64>, usize) {
        if self.cursor == 0 {
            self.to = now;
        }
        (self.from..=self.to, self.cursor)
    }

    /// That pass has looked at all granules before `cursor`, of `granules` in all.
    pub const fn seen(&mut self, cursor: usize, granules: u64) {
        self.cursor = cursor;
        if cursor as u64 >= granules {
            (self.from, self.cursor) = (self.to + 1, 0);
        }
    }
}

/// One sweep over an arena.
pub(super) struct GranulePass<'a> {
    pub arena: &'a Arena,
    pub pages: &'a dyn ReleasePages,
    /// What is done with a granule. Marked free, it stays lazy.
    pub how: Release,
    /// Granules that were freed in another generation are not taken.
    pub generations: RangeInclusive<u64>,
    /// The first granule that was not looked at.
    pub cursor: usize,
    /// How long each step takes, in microseconds.
    pub chunks: &'a Histogram,
}

impl GranulePass<'_> {
    /// Takes at most `bytes` bytes; ends early when `turn` does not go on. Returns what it did, and whether the pass is at
    /// its end.
    pub fn run(&mut self, bytes: u64, turn: &Turn<'_>, pace: &mut Pace) -> (Outcome, bool) {
        let mut outcome = Outcome::default();
        let granule = self.arena.place().layout.granule();
        while outcome.bytes < bytes {
            if !turn.goes_on() {
                return (outcome, false);
            }
            let first = self.cursor;
            let max = pace.size().max(granule).min(bytes - outcome.bytes);
            let generations = &self.generations;
            let Some(taken) = self.arena.take_of(&mut self.cursor, generations, max) else {
                break;
            };
            let (released, cut_short) = match taken.ranges() {
                &[granule] if granule.len() > pace.size() => {
                    self.pieces(granule, &taken, turn, pace)
                }
                granules => (self.step(granules, pace), false),
            };
            // Of a granule that is not released wholly any part may be gone: it is lazy as before.
            let whole = taken.ranges().iter().zip(&released.bytes);
            let whole = whole.filter(|(range, bytes)| range.len() == **bytes);
            let bytes: u64 = whole.map(|(range, _)| range.len()).sum();
            match self.how {
                Release::Discard => taken.finish(&released.bytes),
                Release::MarkFree => drop(taken),
            }
            outcome.calls += released.calls;
            outcome.failures += released.failures;
            outcome.bytes += bytes;
            if cut_short {
                self.cursor = first;
                return (outcome, false);
            }
        }
        (outcome, true)
    }

    /// Releases a granule that takes several steps, as long as the guest does not wait for it, and `turn` goes on between
    /// them. Returns true if it did not.
    fn pieces(
        &self,
        granule: GpaRange,
        taken: &Granules<'_>,
        turn: &Turn<'_>,
        pace: &mut Pace,
    ) -> (Released, bool) {
        let mut sum = Released {
            bytes: vec![0],
            ..Released::default()
        };
        let mut at = granule.start();
        while let Some(piece) = GpaRange::new(at, granule.end().min(at + pace.size())) {
            if at > granule.start() && !turn.goes_on() {
                return (sum, true);
            }
            if taken.are_wanted() {
                break;
            }
            let released = self.step(&[piece], pace);
            sum.bytes[0] += released.bytes.iter().sum::<u64>();
            sum.calls += released.calls;
            sum.failures += released.failures;
            at = piece.end();
        }
        (sum, false)
    }

    fn step(&self, ranges: &[GpaRange], pace: &mut Pace) -> Released {
        let start = Instant::now();
        let released = self.pages.release(ranges, self.how);
        let took = start.elapsed();
        pace.learn(ranges.iter().map(|range| range.len()).sum(), took);
        self.chunks
            .record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        released
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::thread;

    use ebb_core::generation::{Gate, VmGeneration};
    use ebb_core::lazy::LazyMemory;
    use ebb_hypercall_abi::granule::{State, Word};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::arena::Arenas;
    use crate::memory::{Backing, GuestRam};
    use crate::reclaim::{Mode, Order, Reach, ReclaimTuning, Reclaimer, Sample, Until};

    const MIB: u64 = 1 << 20;
    const GRANULE: u64 = 2 * MIB;
    const START: u64 = 4 << 30;

    /// Pages of `ram` that log how much each call releases, and call `then` before that with the number of calls.
    struct Logged {
        ram: Arc<GuestRam>,
        lengths: Mutex<Vec<u64>>,
        then: Box<dyn Fn(usize) + Send + Sync>,
    }

    impl ReleasePages for Logged {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            1
        }

        fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
            let mut lengths = self.lengths.lock().unwrap();
            lengths.push(ranges.iter().map(|range| range.len()).sum());
            (self.then)(lengths.len());
            self.ram.release(ranges, how)
        }
    }

    const LARGE: u64 = 256 * MIB;

    /// Memory with an arena of four granules of 256 MiB, of which the first that the guest may use is half resident, and lazy.
    fn large_granule() -> (Arc<GuestRam>, Arc<Arena>) {
        let range = |start, len| GpaRange::new(start, start + len).unwrap();
        let gpa = range(START, 4 * LARGE);
        let ram = GuestRam::with_arenas(Backing::default(), &[range(0, 8 * MIB)], &[gpa]);
        let ram = Arc::new(ram.unwrap());
        let arena = Arena::new(0, "a".to_owned(), gpa, LARGE, ram.memory()).unwrap();
        let memory = ram.memory();
        for page in (0..LARGE / 2).step_by(4096) {
            memory
                .write_obj(1u8, GuestAddress(START + LARGE + page))
                .unwrap();
        }
        let lazy_word = Word::new(State::Lazy, 0).raw();
        memory
            .store(lazy_word, GuestAddress(WORD), Ordering::Release)
            .unwrap();
        (ram, Arc::new(arena))
    }

    /// Where that granule's word is.
    const WORD: u64 = START + 4096 + 8;

    /// What came of taking it: the outcome, the lengths of the calls, and the granule's state.
    type Taken = (Outcome, Vec<u64>, Option<State>);

    /// Takes what there is. Before each call of the host's kernel `then` is called with its number, and tells whether the order
    /// ends.
    fn take_large_granule(
        (ram, arena): (&Arc<GuestRam>, &Arc<Arena>),
        then: impl Fn(usize) -> bool + Send + Sync + 'static,
    ) -> Taken {
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let pages = Arc::new(Logged {
            ram: Arc::clone(ram),
            lengths: Mutex::default(),
            then: Box::new(move |call| ends.store(then(call), Ordering::Relaxed)),
        });
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
        let lazy = Arc::new(LazyMemory::new(generation));
        let logged = Arc::clone(&pages) as _;
        let reclaimer = Reclaimer::new(lazy, logged, gate, ReclaimTuning::default())
            .with_arenas(Arenas::from([Arc::clone(arena)]));
        let other = || over.load(Ordering::Relaxed);
        let until = Until {
            deadline: None,
            other: Some(&other),
        };
        let outcome = reclaimer.reclaim_until(u64::MAX, until);
        let raw = ram.memory().read_obj(GuestAddress(WORD)).unwrap();
        let lengths = pages.lengths.lock().unwrap().clone();
        (outcome, lengths, Word::from_raw(raw).state())
    }

    #[test]
    fn a_large_granule_goes_in_steps_between_which_an_order_can_end() {
        let (ram, arena) = large_granule();
        let (outcome, lengths, state) = take_large_granule((&ram, &arena), |_| false);
        assert_eq!((outcome.bytes, outcome.cut_short), (LARGE, false));
        assert_eq!(lengths.iter().sum::<u64>(), LARGE);
        assert_eq!(outcome.calls, lengths.len() as u64);
        assert!(lengths.iter().all(|len| *len <= 16 * MIB), "{lengths:?}");
        let discarded = Some(State::Discarded);
        assert_eq!((state, ram.resident()), (discarded, 2 * 4096));

        let (ram, arena) = large_granule();
        let (outcome, lengths, state) = take_large_granule((&ram, &arena), |call| call >= 3);
        assert_eq!((outcome.bytes, outcome.cut_short), (0, true));
        assert_eq!(lengths.len(), 3);
        assert_eq!(
            state,
            Some(State::Lazy),
            "a part of it is gone, which the guest allows"
        );
    }

    /// A guest does not wait for gigabytes that nobody needs any more.
    #[test]
    fn a_large_granule_is_left_when_the_guest_wants_it() {
        let (ram, arena) = large_granule();
        let page = GpaRange::new(START + LARGE, START + LARGE + 4096).unwrap();
        let (guest, waiting) = (Arc::clone(&arena), Arc::clone(&arena));
        let (outcome, lengths, state) = take_large_granule((&ram, &arena), move |call| {
            if call == 2 {
                let guest = Arc::clone(&guest);
                thread::spawn(move || guest.reuse(page));
                while !waiting.is_wanted(page) {
                    thread::yield_now();
                }
            }
            false
        });
        assert_eq!((outcome.bytes, outcome.cut_short), (0, false));
        assert_eq!(lengths.len(), 2, "{lengths:?}");
        assert_ne!(state, Some(State::Discarded));
        while arena.stats().reuse_waits_total == 0 {
            thread::yield_now();
        }
    }

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
        let lazy = Arc::new(LazyMemory::new(generation));
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
                let at = GuestAddress(START + at);
                memory.store(word, at, Ordering::Release).unwrap();
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
                ..Sample::default()
            };
            self.reclaimer.sampled(sample).lazy
        }
    }

    #[test]
    fn a_granule_that_the_kernel_refuses_stays_lazy_and_is_a_failure() {
        let machine = machine(Mode::Pressure);
        machine.free(9);
        let start = START + 9 * GRANULE;
        let page = GpaRange::new(start, start + 4096).unwrap();
        machine.ram.lock(page);
        let outcome = machine.reclaimer.reclaim(u64::MAX);
        machine.ram.unlock(page);
        assert_eq!((outcome.bytes, machine.state(9)), (0, Some(State::Lazy)));
        assert!(outcome.failures > 0);
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
    fn ahead_of_need_each_granule_is_marked_free_once() {
        let machine = machine(Mode::Pressure);
        (2..6).for_each(|index| machine.free(index));
        let ahead = |bytes| {
            let order = Order {
                bytes,
                reach: Reach::Blocks,
                newest: u64::MAX,
                urgent: false,
            };
            machine.reclaimer.invalidate(order).bytes
        };
        assert_eq!(ahead(3 * GRANULE + MIB), 3 * GRANULE);
        assert_eq!(ahead(u64::MAX), GRANULE, "it goes on where it was");
        assert_eq!(ahead(u64::MAX), 0);
        machine.free(4);
        assert_eq!(ahead(u64::MAX), GRANULE, "freed anew");
        assert_eq!(machine.reclaimer.snapshot().discard_calls_total, 0);
        // A write cancels the mark, and the state is the guest's.
        assert_eq!(machine.state(4), Some(State::Lazy));
        assert_eq!(machine.reclaimer.reclaim(u64::MAX).bytes, 4 * GRANULE);
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
        let ahead = Order {
            newest: u64::MAX,
            ..order
        };
        let invalidate = |order| machine.reclaimer.invalidate(order).bytes;
        assert_eq!(invalidate(ahead), 2 * GRANULE, "marked free");
        assert_eq!(machine.state(2), Some(State::Lazy));
        assert_eq!(invalidate(order), GRANULE);
        assert_eq!(machine.state(2), Some(State::Discarded));
        assert_eq!(machine.state(3), Some(State::Lazy));
        assert_eq!(machine.reclaimer.snapshot().discard_calls_total, 1);
    }
}
