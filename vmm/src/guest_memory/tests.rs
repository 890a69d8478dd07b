//! The service as its callers use it: over real memory, without a guest.

use ebb_core::range::PAGE_SIZE;
use ebb_hypercall_abi::granule::{State, Word};
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 2 * MIB;
/// First address of the first arena.
const ARENA: u64 = 4 << 30;

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start * MIB, end * MIB).unwrap()
}

fn setup() -> Setup {
    let arena = |index: u64| ArenaSetup {
        id: format!("a{index}"),
        gpa: GpaRange::new(ARENA + index * 64 * MIB, ARENA + (index + 1) * 64 * MIB).unwrap(),
        granule: GRANULE,
    };
    Setup {
        backing: Backing::default(),
        ram: vec![range(0, 8), range(16, 24)],
        arenas: vec![arena(0), arena(1)],
        tuning: ReclaimTuning::default(),
        reported: Release::MarkFree,
        strict: false,
        free_pages: true,
        restored: None,
    }
}

/// Memory with RAM at `ram` and nothing else.
pub fn plain(ram: GpaRange) -> GuestMemory {
    memory(&Setup {
        ram: vec![ram],
        arenas: Vec::new(),
        ..setup()
    })
}

fn memory(setup: &Setup) -> GuestMemory {
    let ram = Arc::new(setup.map().unwrap());
    GuestMemory::new(setup, ram, 1, &Arc::new(KickTable::new(1))).unwrap()
}

fn put(memory: &GuestMemory, mib: u64) {
    let ram = memory.ram().memory();
    ram.write_obj(7_u8, GuestAddress(mib * MIB)).unwrap();
}

/// Returns true if the page is as [`put`] has left it.
fn holds(memory: &GuestMemory, mib: u64) -> bool {
    let ram = memory.ram().memory();
    ram.read_obj::<u8>(GuestAddress(mib * MIB)).unwrap() == 7
}

/// The guest frees granule number `index` of the first arena.
fn free_granule(memory: &GuestMemory, index: u64) {
    let at = GuestAddress(ARENA + 4096 + 8 * index);
    let word = Word::new(State::Lazy, 0).raw();
    memory.ram().memory().write_obj(word, at).unwrap();
}

fn granule(memory: &GuestMemory, index: u64) -> Option<State> {
    let at = GuestAddress(ARENA + 4096 + 8 * index);
    Word::from_raw(memory.ram().memory().read_obj(at).unwrap()).state()
}

fn granules(first: u64, count: u64) -> GpaRange {
    let start = ARENA + first * GRANULE;
    GpaRange::new(start, start + count * GRANULE).unwrap()
}

#[test]
fn what_is_lazily_free_and_still_there_is_counted() {
    let mut setup = setup();
    setup.backing.thp = false;
    let memory = memory(&setup);
    let touch = |pages: u64| {
        let mut at = range(0, 8).start();
        for _ in 0..pages {
            memory
                .ram()
                .memory()
                .write_obj(7_u8, GuestAddress(at))
                .unwrap();
            at += PAGE_SIZE;
        }
    };
    touch(512);
    assert_eq!(memory.lazy_resident_bytes(), 0, "it is in use");
    memory.lazy().free(&[range(1, 6), range(17, 19)]);
    assert_eq!(memory.lazy_resident_bytes(), MIB);
    memory.reclaimer().reclaim(u64::MAX);
    assert_eq!(memory.lazy_resident_bytes(), 0);
    touch(300);
    assert_eq!(memory.lazy_resident_bytes(), 44 * PAGE_SIZE, "it came back");
}

#[test]
fn a_free_is_bookkeeping_and_a_reuse_of_the_last_range_says_so() {
    let memory = memory(&setup());
    let (calls, balloon): (&dyn LazyOps, &dyn RangeSink) = (&memory, &memory);
    (0..8).for_each(|mib| put(&memory, mib));
    calls.lazy_free(&[range(0, 2), range(4, 5)]);
    balloon.lazy_free(&[range(6, 7)]);
    assert_eq!(memory.lazy().snapshot().lazy_bytes, 4 * MIB);
    assert!((0..8).all(|mib| holds(&memory, mib)), "nothing is released");
    assert!(!calls.reuse(&[range(0, 2)]));
    balloon.reuse(&[range(6, 7)]);
    assert!(calls.reuse(&[range(4, 5)]));
    assert_eq!(memory.lazy().snapshot().ranges, 0);
}

#[test]
fn in_strict_mode_both_ways_discard_at_once() {
    let strict = Setup {
        tuning: ReclaimTuning {
            mode: Mode::Off,
            ..ReclaimTuning::default()
        },
        strict: true,
        ..setup()
    };
    let memory = memory(&strict);
    (0..8).for_each(|mib| put(&memory, mib));
    LazyOps::lazy_free(&memory, &[range(0, 2)]);
    RangeSink::lazy_free(&memory, &[range(4, 5)]);
    let kept: Vec<_> = (0..8).filter(|&mib| holds(&memory, mib)).collect();
    assert_eq!(kept, [2, 3, 5, 6, 7]);
    assert_eq!(memory.lazy().snapshot().discarded_bytes, 3 * MIB);
    assert!(memory.strict().is_some() && memory.start_reclaim(None).unwrap().is_none());
}

#[test]
fn granules_are_reused_in_their_arena_and_ram_in_the_tracker() {
    let memory = memory(&setup());
    LazyOps::lazy_free(&memory, &[range(0, 2)]);
    (5..8).for_each(|index| free_granule(&memory, index));
    let last = LazyOps::reuse(&memory, &[granules(5, 2), range(1, 2)]);
    assert!(!last, "a MiB of RAM is lazy still");
    let states = [5, 6, 7].map(|index| granule(&memory, index));
    let (in_use, lazy) = (Some(State::InUse), Some(State::Lazy));
    assert_eq!(states, [in_use, in_use, lazy]);
    assert_eq!(memory.lazy().snapshot().lazy_bytes, MIB);

    let is_granules = |range| LazyOps::is_granules(&memory, range);
    assert!(is_granules(granules(5, 2)) && !is_granules(range(0, 2)));
    assert!(!is_granules(granules(0, 1)), "the table's own");
    assert!(!is_granules(granules(31, 2)), "of two arenas");
    let is_ram = |range| LazyOps::is_ram(&memory, range);
    assert!(is_ram(range(0, 8)) && !is_ram(range(0, 9)) && !is_ram(granules(5, 1)));
    assert!(RangeSink::is_ram(&memory, range(16, 24)));
    assert!(!RangeSink::is_ram(&memory, range(7, 9)));
}

#[test]
fn a_reset_by_a_call_is_for_arenas_too_one_of_the_balloon_is_not() {
    let memory = memory(&setup());
    let free = || {
        LazyOps::lazy_free(&memory, &[range(0, 2)]);
        free_granule(&memory, 5);
    };
    free();
    RangeSink::reset(&memory);
    assert_eq!(memory.lazy().snapshot().ranges, 0);
    assert_eq!(granule(&memory, 5), Some(State::Lazy));
    free();
    LazyOps::reset(&memory);
    assert_eq!(memory.lazy().snapshot().ranges, 0);
    assert_eq!(granule(&memory, 5), Some(State::InUse));
}

#[test]
fn a_prefault_populates_exactly_its_range() {
    let memory = memory(&setup());
    let before = memory.ram().resident();
    assert!(LazyOps::prefault(&memory, range(2, 5)));
    assert_eq!(memory.ram().resident(), before + 3 * MIB);
    assert!(!LazyOps::prefault(&memory, range(6, 9)), "not wholly RAM");
    assert_eq!(memory.ram().resident(), before + 3 * MIB);
}

#[test]
fn arenas_are_described_by_number() {
    let memory = memory(&setup());
    assert_eq!(LazyOps::arenas(&memory), 2);
    let info = LazyOps::arena(&memory, 1).unwrap();
    let layout = memory.arenas()[1].place().layout;
    let expected = ArenaInfo {
        index: 1,
        gpa: ARENA + 64 * MIB,
        size: 64 * MIB,
        granule: GRANULE,
        first: layout.first(),
        table: layout.table(),
        ..ArenaInfo::default()
    };
    assert_eq!(info, expected);
    assert_eq!(LazyOps::arena(&memory, 2), None);
    assert_eq!(LazyOps::arena(&memory, u64::MAX), None);
}

#[test]
fn a_survey_tells_the_states_of_the_range_and_of_the_machine() {
    let memory = memory(&setup());
    LazyOps::lazy_free(&memory, &[range(0, 8), range(16, 20)]);
    assert_eq!(memory.reclaimer().reclaim(2 * MIB).bytes, 2 * MIB);
    let survey = LazyOps::survey(&memory, Some(range(0, 6)));
    let states = |lazy: u64, discarded: u64| States {
        lazy: lazy * MIB,
        unmapped: 0,
        discarded: discarded * MIB,
    };
    assert_eq!((survey.range, survey.examined), (states(4, 2), 6 * MIB));
    assert_eq!((survey.machine, survey.ranges), (states(10, 2), 3));
    assert_eq!(survey.generation, memory.lazy().generation());
    let machine = LazyOps::survey(&memory, None);
    assert_eq!((machine.range, machine.examined), (States::default(), 0));
    assert_eq!(machine.machine, survey.machine);
}

#[test]
fn what_a_driver_will_not_announce_is_discarded_and_reports_are_released() {
    for (how, marked) in [(Release::Discard, 0), (Release::MarkFree, 1)] {
        let memory = memory(&Setup {
            reported: how,
            ..setup()
        });
        (0..8).for_each(|mib| put(&memory, mib));
        RangeSink::discard(&memory, &[range(0, 1)]);
        RangeSink::report(&memory, &[range(4, 5)]);
        assert!(!holds(&memory, 0) && holds(&memory, 1));
        assert_eq!(memory.lazy().snapshot().ranges, 0, "neither is tracked");
        let (eager, reported) = (memory.reclaimer().snapshot(), memory.reported().snapshot());
        assert_eq!(eager.eager_bytes_total, MIB);
        assert_eq!(reported.marked_bytes_total, marked * MIB);
        assert_eq!(reported.discarded_bytes_total, (1 - marked) * MIB);
    }
}

#[test]
fn memory_ends_where_its_last_region_does() {
    let two = setup();
    assert_eq!(two.end(), ARENA + 128 * MIB);
    let none = Setup {
        arenas: Vec::new(),
        ..two
    };
    assert_eq!(none.end(), 24 * MIB);
}

#[test]
fn the_reclaim_thread_runs_unless_the_mode_is_off() {
    let with = |mode| {
        let tuning = ReclaimTuning {
            mode,
            ..ReclaimTuning::default()
        };
        memory(&Setup { tuning, ..setup() })
    };
    assert!(with(Mode::Off).start_reclaim(None).unwrap().is_none());
    let eager = with(Mode::Eager);
    LazyOps::lazy_free(&eager, &[range(0, 2)]);
    let thread = eager.start_reclaim(None).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while eager.lazy().snapshot().discarded_bytes < 2 * MIB {
        assert!(std::time::Instant::now() < deadline, "nothing is taken");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop(thread);
    assert!(with(Mode::Pressure).start_strict().unwrap().is_none());
}
