use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::arena::ArenaInfo;
use ebb_hypercall_abi::block::{BATCH_MAX, Descriptor};
use ebb_hypercall_abi::status::{self, LAST_RANGE};
use ebb_hypercall_abi::{Attributes, Error, Features, Flags, Operation, Success};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::guest_memory::{BadNote, LazyOps, States, Survey};

const PAGE: u64 = PAGE_SIZE;
/// Two regions of RAM, in pages, with a hole between them.
const REGIONS: [(u64, u64); 2] = [(0, 64), (80, 96)];
/// Where tests put their blocks.
const BLOCK: u64 = 40 * PAGE;

/// Keeps a set of lazy pages, and what was prefaulted.
#[derive(Default)]
struct Model {
    lazy: Mutex<BTreeSet<u64>>,
    prefaulted: Mutex<Vec<GpaRange>>,
    arenas: bool,
    reused_granules: Mutex<Vec<GpaRange>>,
    /// Where the kernel's note may be; `None`: no note is taken.
    note: Option<GpaRange>,
}

/// What the model has.
fn more(model: &Model) -> Features {
    let arenas = model.arenas.then_some(Features::ARENA);
    let note = model.note.map(|_| Features::KERNEL_NOTE);
    let more = arenas.into_iter().chain(note);
    more.fold(Features::default(), Features::union)
}

/// The model, shared with the test.
struct SharedModel(Arc<Model>);

fn pages(range: GpaRange) -> impl Iterator<Item = u64> {
    range.start() / PAGE..range.end() / PAGE
}

/// Where [`ARENAS`] are, in pages; the first eight of each are its head.
const ARENAS: [(u64, u64); 2] = [(128, 160), (192, 256)];

impl LazyOps for SharedModel {
    fn is_granules(&self, range: GpaRange) -> bool {
        let (start, end) = (range.start() / PAGE, range.end() / PAGE);
        let inside = |(from, to): &(u64, u64)| from + 8 <= start && end <= *to;
        self.0.arenas && ARENAS.iter().any(inside)
    }

    fn kernel_note(&self, note: GpaRange) -> Result<(), BadNote> {
        let good = self.0.note == Some(note);
        good.then_some(()).ok_or_else(|| BadNote("no note".into()))
    }

    fn arenas(&self) -> u64 {
        if self.0.arenas { 2 } else { 0 }
    }

    fn arena(&self, index: u64) -> Option<ArenaInfo> {
        let (from, to) = ARENAS.get(usize::try_from(index).ok()?)?;
        Some(ArenaInfo {
            index,
            gpa: from * PAGE,
            size: (to - from) * PAGE,
            granule: 4 * PAGE,
            first: 2,
            table: PAGE,
            ..ArenaInfo::default()
        })
    }

    fn is_ram(&self, range: GpaRange) -> bool {
        let (start, end) = (range.start() / PAGE, range.end() / PAGE);
        REGIONS
            .iter()
            .any(|(from, to)| *from <= start && end <= *to)
    }

    fn lazy_free(&self, ranges: &[GpaRange]) {
        assert!(!ranges.is_empty() && ranges.iter().all(|range| self.is_ram(*range)));
        let pages = ranges.iter().flat_map(|range| pages(*range));
        self.0.lazy.lock().unwrap().extend(pages);
    }

    fn reuse(&self, ranges: &[GpaRange]) -> bool {
        let (granules, ranges): (Vec<_>, Vec<_>) =
            ranges.iter().partition(|range| self.is_granules(**range));
        assert!(ranges.iter().all(|range| self.is_ram(*range)));
        self.0.reused_granules.lock().unwrap().extend(granules);
        let mut lazy = self.0.lazy.lock().unwrap();
        for page in ranges.iter().flat_map(|range| pages(*range)) {
            lazy.remove(&page);
        }
        lazy.is_empty()
    }

    fn reset(&self) {
        self.0.lazy.lock().unwrap().clear();
    }

    fn prefault(&self, range: GpaRange) -> bool {
        self.0.prefaulted.lock().unwrap().push(range);
        range.start() != 0
    }

    fn survey(&self, range: Option<GpaRange>) -> Survey {
        let lazy = self.0.lazy.lock().unwrap();
        let count = |range| pages(range).filter(|page| lazy.contains(page)).count() as u64;
        Survey {
            range: range.map_or_else(States::default, |range| States {
                lazy: count(range) * PAGE,
                unmapped: 6 * PAGE,
                discarded: 7 * PAGE,
            }),
            examined: range.map_or(0, GpaRange::len),
            machine: States {
                lazy: lazy.len() as u64 * PAGE,
                unmapped: 2 * PAGE,
                discarded: 3 * PAGE,
            },
            ranges: 4,
            generation: 5,
        }
    }
}

struct Fixture {
    model: Arc<Model>,
    memory: Arc<GuestMemoryMmap>,
    calls: Hypercalls,
}

impl Fixture {
    fn new(model: Model) -> Self {
        let regions = REGIONS.map(|(from, to)| {
            (
                GuestAddress(from * PAGE),
                ((to - from) * PAGE).try_into().unwrap(),
            )
        });
        let model = Arc::new(model);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let ops = Arc::new(SharedModel(Arc::clone(&model)));
        let interface = offer(Some(Features::VMMCALL), more(&model));
        Self {
            calls: Hypercalls::new(interface, Arc::clone(&memory), ops),
            model,
            memory,
        }
    }

    fn call(&self, operation: Operation, gpa: u64, pages: u64) -> Result<Success, Error> {
        self.raw(gpa, pages, Attributes::new(operation).encode())
    }

    fn raw(&self, gpa: u64, pages: u64, attributes: u64) -> Result<Success, Error> {
        let arguments = Arguments {
            gpa,
            pages,
            attributes,
        };
        status::decode(self.calls.call(arguments))
    }

    fn lazy(&self) -> Vec<u64> {
        self.model.lazy.lock().unwrap().iter().copied().collect()
    }

    /// Writes a batch block at [`BLOCK`]; ranges in pages.
    fn write_batch(&self, count: u32, ranges: &[(u64, u64)]) {
        let at = GuestAddress(BLOCK);
        let header = [u64::from(count) | 0xdead << 32, 0];
        self.memory.write_slice(&words(&header), at).unwrap();
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|&(gpa, pages)| Descriptor { gpa, pages }.to_bytes())
            .collect();
        let at = GuestAddress(BLOCK + 16);
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn done(&self) -> u32 {
        self.memory.read_obj(GuestAddress(BLOCK + 4)).unwrap()
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn fixture() -> Fixture {
    Fixture::new(Model::default())
}

#[test]
fn free_and_reuse_and_the_last_range() {
    let fixture = fixture();
    assert_eq!(
        fixture.call(Operation::LazyFree, 8 * PAGE, 4),
        Ok(Success::Done)
    );
    assert_eq!(
        fixture.call(Operation::LazyFree, 8 * PAGE, 2),
        Ok(Success::Done)
    );
    assert_eq!(fixture.lazy(), [8, 9, 10, 11]);
    let reuse = |gpa, pages| fixture.call(Operation::Reuse, gpa, pages);
    assert_eq!(reuse(9 * PAGE, 3), Ok(Success::Done));
    assert_eq!(reuse(0, 9), Ok(Success::LastRange));
    assert_eq!(reuse(0, 1), Ok(Success::LastRange), "never freed");
    let stats = fixture.calls.stats();
    assert_eq!(
        (stats.lazy_free_total, stats.failed_total),
        (2, 0),
        "{stats:?}"
    );
}

#[test]
fn features_are_those_of_cpuid() {
    let fixture = fixture();
    let bits = offer(Some(Features::VMMCALL), Features::default())
        .features
        .bits();
    let features = fixture.call(Operation::Features, 0, 1);
    assert_eq!(features, Ok(Success::Value(bits)));
    assert!(
        !offer(None, Features::default())
            .features
            .contains(Features::VMMCALL)
    );
    assert!(
        !offer(None, Features::default())
            .features
            .contains(Features::VMCALL)
    );
    assert!(
        !offer(None, Features::default())
            .features
            .contains(Features::ARENA)
    );
    let arena = fixture.call(Operation::ArenaInfo, 0, 1);
    assert_eq!(arena, Err(Error::NoSuchCall));
}

#[test]
fn a_note_is_taken_or_refused() {
    let without = fixture();
    let told = |fixture: &Fixture, gpa, pages| fixture.call(Operation::KernelNote, gpa, pages);
    assert_eq!(told(&without, 8 * PAGE, 2), Err(Error::NoSuchCall));
    let fixture = Fixture::new(Model {
        note: GpaRange::new(8 * PAGE, 10 * PAGE),
        ..Model::default()
    });
    assert_eq!(told(&fixture, 8 * PAGE, 2), Ok(Success::Done));
    assert_eq!(told(&fixture, 7 * PAGE, 2), Err(Error::Invalid), "no note");
    assert_eq!(told(&fixture, 63 * PAGE, 2), Err(Error::Invalid), "no RAM");
    assert_eq!(fixture.calls.stats().kernel_note_total, 3);
}

#[test]
fn arenas_are_told_and_their_granules_reused() {
    let fixture = Fixture::new(Model {
        arenas: true,
        ..Model::default()
    });
    let Ok(Success::Value(bits)) = fixture.call(Operation::Features, 0, 1) else {
        panic!("features are bits")
    };
    assert!(Features::from_bits(bits).contains(Features::ARENA));
    let ask = |index: u64| {
        let block = [index, 99, 99, 99, 99, 99, 99, 99];
        fixture
            .memory
            .write_slice(&words(&block), GuestAddress(BLOCK))
            .unwrap();
        let status = fixture.call(Operation::ArenaInfo, BLOCK, 1);
        let word = |n| {
            fixture
                .memory
                .read_obj(GuestAddress(BLOCK + n * 8))
                .unwrap()
        };
        (status, std::array::from_fn(|n| word(n as u64)))
    };
    let second: [u64; 8] = [1, 2, 192 * PAGE, 64 * PAGE, 4 * PAGE, 2, PAGE, 0];
    assert_eq!(ask(1), (Ok(Success::Done), second));
    for index in [2, u64::MAX] {
        assert_eq!(
            ask(index),
            (Err(Error::Invalid), [index, 2, 99, 99, 99, 99, 99, 99])
        );
    }
    let info = |gpa, pages| fixture.call(Operation::ArenaInfo, gpa, pages);
    assert_eq!(info(BLOCK, 2), Err(Error::Invalid));
    assert_eq!(
        info(130 * PAGE, 1),
        Err(Error::Fault),
        "an arena is not RAM"
    );

    let call = |operation, page, pages| fixture.call(operation, page * PAGE, pages);
    assert_eq!(call(Operation::Reuse, 140, 4), Ok(Success::LastRange));
    fixture.write_batch(3, &[(150 * PAGE, 4), (8 * PAGE, 1), (130 * PAGE, 1)]);
    assert_eq!(
        fixture.call(Operation::ReuseBatch, BLOCK, 1),
        Err(Error::Invalid)
    );
    assert_eq!(fixture.done(), 2, "the last one is in the head");
    let granules = |page: u64| GpaRange::new(page * PAGE, (page + 4) * PAGE).unwrap();
    assert_eq!(
        *fixture.model.reused_granules.lock().unwrap(),
        [granules(140), granules(150)]
    );
    for operation in [Operation::LazyFree, Operation::Query] {
        assert!(call(operation, 140, 1).is_err(), "{operation:?}");
    }
    assert_eq!(
        call(Operation::Reuse, 130, 1),
        Err(Error::Invalid),
        "the head"
    );
    assert_eq!(
        call(Operation::Reuse, 150, 60),
        Err(Error::Invalid),
        "two arenas"
    );
}

#[test]
fn hostile_ranges_change_nothing() {
    let fixture = fixture();
    for (gpa, pages) in [
        (96 * PAGE, 1),             // out of range
        (64 * PAGE, 1),             // in the hole
        (63 * PAGE, 2),             // straddling the end of a region
        (0, 96),                    // over the hole
        (79 * PAGE, 2),             // from the hole into RAM
        (8 * PAGE, 0),              // empty
        (0, u64::MAX),              // longer than addresses are
        (8 * PAGE, u64::MAX),       // wraps in pages
        (8 * PAGE, (1 << 52) - 8),  // wraps in bytes
        (u64::MAX - (PAGE - 1), 1), // ends at the last address
        (8 * PAGE + 1, 1),          // not aligned
        (8 * PAGE - 1, 1),          // not aligned
    ] {
        for operation in [Operation::LazyFree, Operation::Reuse] {
            let result = fixture.call(operation, gpa, pages);
            assert_eq!(
                result,
                Err(Error::Invalid),
                "{operation:?} {gpa:#x} {pages:#x}"
            );
        }
        // A block is no better there.
        for operation in [
            Operation::LazyFreeBatch,
            Operation::ReuseBatch,
            Operation::Query,
        ] {
            let result = fixture.call(operation, gpa, pages);
            assert!(
                matches!(result, Err(Error::Invalid | Error::Fault)),
                "{operation:?} {gpa:#x} {pages:#x}: {result:?}"
            );
        }
    }
    assert!(fixture.lazy().is_empty());
    let stats = fixture.calls.stats();
    assert_eq!(stats.failed_total, 12 * 5);
}

#[test]
fn unknown_operations_and_flags() {
    let fixture = fixture();
    for attributes in [0, 0x10, 0xebb0_0000, 0xebb0_0900, u64::MAX] {
        assert_eq!(fixture.raw(PAGE, 1, attributes), Err(Error::NoSuchCall));
    }
    for attributes in [0xebb1_0200, 0xebb8_0300, 0xebb0_0301] {
        assert_eq!(fixture.raw(PAGE, 1, attributes), Err(Error::Invalid));
    }
    for operation in [Operation::Features, Operation::Reset] {
        for (gpa, pages) in [(PAGE, 1), (0, 2)] {
            assert_eq!(fixture.call(operation, gpa, pages), Err(Error::Invalid));
        }
    }
}

#[test]
fn a_batch_goes_up_to_its_first_bad_descriptor() {
    let fixture = fixture();
    let ranges = [
        (8 * PAGE, 2),
        (9 * PAGE, 2),
        (8 * PAGE, 2),
        (63 * PAGE, 2),
        (20 * PAGE, 1),
    ];
    fixture.write_batch(3, &ranges);
    let free = || fixture.call(Operation::LazyFreeBatch, BLOCK, 1);
    assert_eq!((free(), fixture.done()), (Ok(Success::Done), 3));
    assert_eq!(fixture.lazy(), [8, 9, 10]);
    fixture.model.lazy.lock().unwrap().clear();
    fixture.write_batch(5, &ranges);
    assert_eq!((free(), fixture.done()), (Err(Error::Invalid), 3));
    assert_eq!(fixture.lazy(), [8, 9, 10]);
    let reuse = fixture.call(Operation::ReuseBatch, BLOCK, 1);
    assert_eq!((reuse, fixture.done()), (Err(Error::Invalid), 3));
    assert!(fixture.lazy().is_empty());
    fixture.write_batch(1, &ranges);
    let reuse = fixture.call(Operation::ReuseBatch, BLOCK, 1);
    assert_eq!((reuse, fixture.done()), (Ok(Success::LastRange), 1));
}

#[test]
fn a_batch_that_is_bad_from_the_start_does_nothing() {
    let fixture = fixture();
    fixture.write_batch(2, &[(1, 1), (8 * PAGE, 1)]);
    let free = |pages| fixture.call(Operation::LazyFreeBatch, BLOCK, pages);
    assert_eq!((free(1), fixture.done()), (Err(Error::Invalid), 0));
    for count in [0, 256, BATCH_MAX + 1, u32::MAX] {
        fixture.write_batch(count, &[(8 * PAGE, 1)]);
        assert_eq!(free(1), Err(Error::Invalid), "{count}");
        assert_eq!(fixture.done(), 0xdead, "{count}: not written");
    }
    fixture.write_batch(1, &[(8 * PAGE, 1)]);
    assert_eq!(free(5), Err(Error::Invalid), "a block of 5 pages");
    let reserved = GuestAddress(BLOCK + 8);
    fixture.memory.write_obj(1u64, reserved).unwrap();
    assert_eq!(free(1), Err(Error::Invalid), "a reserved word");
    let fault = fixture.call(Operation::LazyFreeBatch, 62 * PAGE, 4);
    assert_eq!(fault, Err(Error::Fault));
    assert!(fixture.lazy().is_empty());
}

#[test]
fn the_largest_batch_fits_into_the_largest_block() {
    let fixture = fixture();
    let ranges: Vec<_> = (0..u64::from(BATCH_MAX))
        .map(|n| (n % 16 * PAGE, 1))
        .collect();
    fixture.write_batch(BATCH_MAX, &ranges);
    let free = fixture.call(Operation::LazyFreeBatch, BLOCK, 4);
    assert_eq!((free, fixture.done()), (Ok(Success::Done), BATCH_MAX));
    assert!(fixture.lazy().into_iter().eq(0..16));
}

#[test]
fn prefault_is_bounded_and_its_failure_is_none_of_the_calls() {
    let fixture = fixture();
    let what = Attributes::new(Operation::ReuseBatch).with(Flags::PREFAULT);
    let ranges = [(PAGE, 60); 200];
    fixture.write_batch(200, &ranges);
    let reuse = fixture.raw(BLOCK, 1, what.encode());
    assert_eq!(reuse, Ok(Success::LastRange));
    let prefaulted: u64 = fixture
        .model
        .prefaulted
        .lock()
        .unwrap()
        .iter()
        .map(|range| range.len())
        .sum();
    assert_eq!(prefaulted, 8192 * PAGE);
    let what = Attributes::new(Operation::Reuse).with(Flags::PREFAULT);
    assert_eq!(
        fixture.raw(0, 1, what.encode()).map(|s| s.code()),
        Ok(LAST_RANGE)
    );
    let stats = fixture.calls.stats();
    assert_eq!(
        (stats.prefaulted_bytes_total, stats.prefault_failures_total),
        (8192 * PAGE, 1)
    );
}

#[test]
fn a_query_is_answered_in_its_block() {
    let fixture = fixture();
    fixture.call(Operation::LazyFree, 8 * PAGE, 4).unwrap();
    let ask = |gpa: u64, pages: u64| {
        let block = words(&[gpa, pages, 77, 77, 77, 77, 77, 77, 77, 77, 77, 77, 99]);
        fixture
            .memory
            .write_slice(&block, GuestAddress(BLOCK))
            .unwrap();
        let result = fixture.call(Operation::Query, BLOCK, 1);
        let mut answer = [0u64; 13];
        for (index, word) in answer.iter_mut().enumerate() {
            let at = GuestAddress(BLOCK + index as u64 * 8);
            *word = fixture.memory.read_obj(at).unwrap();
        }
        (result, answer)
    };
    let (result, answer) = ask(10 * PAGE, 5);
    assert_eq!(result, Ok(Success::Done));
    assert_eq!(answer, [10 * PAGE, 5, 5, 2, 6, 7, 4, 2, 3, 4, 5, 0, 99]);
    let (result, answer) = ask(1, 0);
    assert_eq!(result, Ok(Success::Done), "the machine alone");
    assert_eq!(answer[..7], [1, 0, 0, 0, 0, 0, 4]);
    for (gpa, pages) in [(1, 1), (0, 96), (0, u64::MAX)] {
        let (result, answer) = ask(gpa, pages);
        assert_eq!((result, answer[2]), (Err(Error::Invalid), 77));
    }
    assert_eq!(
        fixture.call(Operation::Query, BLOCK, 2),
        Err(Error::Invalid)
    );
}

#[test]
fn a_block_is_as_long_as_its_call_allows() {
    let fixture = Fixture::new(Model {
        arenas: true,
        ..Model::default()
    });
    fixture.write_batch(1, &[(8 * PAGE, 1)]);
    let call = |operation, pages| fixture.call(operation, BLOCK, pages);
    for operation in [Operation::LazyFreeBatch, Operation::ReuseBatch] {
        assert!(call(operation, 4).is_ok(), "{operation:?}");
        assert_eq!(call(operation, 5), Err(Error::Invalid), "{operation:?}");
    }
    // The question about all of the machine, and the number of the first arena.
    let zeros = words(&[0; 13]);
    fixture
        .memory
        .write_slice(&zeros, GuestAddress(BLOCK))
        .unwrap();
    for operation in [Operation::Query, Operation::ArenaInfo] {
        assert_eq!(call(operation, 2), Err(Error::Invalid), "{operation:?}");
        assert_eq!(call(operation, 1), Ok(Success::Done), "{operation:?}");
    }
}

#[test]
fn a_reset_leaves_nothing_lazy() {
    let fixture = fixture();
    fixture.call(Operation::LazyFree, 0, 64).unwrap();
    let reset = fixture.call(Operation::Reset, 0, 1);
    assert_eq!((reset, fixture.lazy()), (Ok(Success::LastRange), vec![]));
}

/// Numbers around which bounds lie, and any others.
fn number() -> impl Strategy<Value = u64> {
    let shifted =
        (0..64u32, -2..3i64).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off));
    prop_oneof![
        4 => (0..100u64).prop_map(|page| page * PAGE),
        2 => 0..100u64,
        1 => shifted,
        1 => any::<u64>(),
    ]
}

proptest! {
    /// Registers and blocks of any content: nothing panics, nothing outside RAM is touched (the model checks),
    /// and what fails has changed nothing, except for the good beginning of a batch.
    #[test]
    fn whatever_the_guest_says_is_answered(
        calls in prop::collection::vec((number(), number(), 0..10u64, 0..16u64, number()), 1..20),
        block in prop::collection::vec(number(), 32),
        count in 0..20u32,
    ) {
        let fixture = fixture();
        for (gpa, pages, operation, flags, odd) in calls {
            fixture.memory.write_slice(&words(&block), GuestAddress(BLOCK)).unwrap();
            fixture.memory.write_obj(u64::from(count), GuestAddress(BLOCK)).unwrap();
            fixture.memory.write_obj(0u64, GuestAddress(BLOCK + 8)).unwrap();
            let gpa = if operation == 4 && flags < 8 { BLOCK } else { gpa };
            let attributes = match flags {
                15 => odd,
                2.. => 0xebb0_0000 | operation << 8,
                _ => 0xebb0_0000 | operation << 8 | flags << 16,
            };
            let before = fixture.lazy();
            let result = fixture.raw(gpa, pages, attributes);
            if result.is_err() && !(4..6).contains(&operation) {
                prop_assert_eq!(before, fixture.lazy());
            }
            if let Ok(Attributes { operation: Operation::LazyFree, .. }) = Attributes::decode(attributes)
                && result.is_ok()
            {
                let lazy = fixture.lazy();
                prop_assert!((gpa / PAGE..gpa / PAGE + pages).all(|page| lazy.contains(&page)));
            }
        }
    }
}
