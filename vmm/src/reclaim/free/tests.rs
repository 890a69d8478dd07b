//! Free pages are taken from a model of a guest, of its kernel and of what the host holds.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::Duration;

use ebb_core::generation::{Gate, Hold, Kick, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages, Released};

use super::{FreeLists, KernelLists, Look, ReadLists};
use crate::reclaim::held::parts;
use crate::reclaim::job::MAX_MISSES;
use crate::reclaim::tests::order;
use crate::reclaim::{EntryHook, Order, Outcome, Reach, ReclaimTuning, Reclaimer, Until};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).unwrap()
}

/// Block number `index`.
fn block(index: u64) -> GpaRange {
    range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
}

/// What is free, what the host holds, and what was done.
#[derive(Default)]
struct State {
    free: Vec<GpaRange>,
    /// Not held by the host.
    absent: Vec<GpaRange>,
    /// In huge pages.
    huge: bool,
    poisoned: bool,
    /// Nothing else than whole free blocks may be released.
    only_free: bool,
    /// The number of the kernel that counts; 0: none.
    kernel: u64,
    orders: Vec<u32>,
    looked_at: Vec<GpaRange>,
    /// Number of calls that ask what the host holds, and how.
    asked: u64,
    calls: Vec<Vec<GpaRange>>,
}

impl State {
    fn is_free(&self, range: GpaRange) -> bool {
        self.free.iter().any(|free| free.contains(range))
    }

    fn released(&self) -> Vec<GpaRange> {
        self.calls.concat()
    }
}

type Hook = Box<dyn Fn(&World) + Send + Sync>;

/// The guest and its memory.
struct World {
    ram: [GpaRange; 1],
    unit: u64,
    max_batch: usize,
    state: Mutex<State>,
    /// Is called when vCPUs are kicked, at the end of each `find`, in each look, and in each release.
    on_kick: OnceLock<Hook>,
    on_find: OnceLock<Hook>,
    on_look: OnceLock<Hook>,
    on_release: OnceLock<Hook>,
}

impl World {
    fn new(mib: u64) -> Self {
        Self {
            ram: [range(0, mib * MIB)],
            unit: PAGE_SIZE,
            max_batch: usize::MAX,
            state: Mutex::new(State {
                kernel: 1,
                huge: true,
                ..State::default()
            }),
            on_kick: OnceLock::new(),
            on_find: OnceLock::new(),
            on_look: OnceLock::new(),
            on_release: OnceLock::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn call(&self, hook: &OnceLock<Hook>) {
        hook.get().inspect(|hook| hook(self));
    }
}

fn set(hook: &OnceLock<Hook>, action: impl Fn(&World) + Send + Sync + 'static) {
    assert!(hook.set(Box::new(action)).is_ok());
}

impl ReleasePages for World {
    fn can_mark_free(&self) -> bool {
        true
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn held(&self, range: GpaRange) -> Option<u64> {
        let mut state = self.state();
        state.asked += 1;
        let gone = state
            .absent
            .iter()
            .filter_map(|gone| gone.intersection(range));
        Some(range.len() - gone.map(GpaRange::len).sum::<u64>())
    }

    fn in_huge_pages(&self, range: GpaRange) -> Vec<GpaRange> {
        let mut state = self.state();
        state.asked += 1;
        state.huge.then_some(range).into_iter().collect()
    }

    fn max_batch(&self) -> usize {
        self.max_batch
    }

    fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        assert_eq!(how, Release::Discard);
        self.call(&self.on_release);
        let mut state = self.state();
        if state.only_free {
            assert!(
                ranges
                    .iter()
                    .all(|range| parts(*range, BLOCK_SIZE).all(|block| state.is_free(block)))
            );
        }
        state.calls.push(ranges.to_vec());
        state.absent.extend(ranges);
        Released {
            bytes: ranges.iter().map(|range| range.len()).collect(),
            calls: 1,
            ..Released::default()
        }
    }
}

struct Lists(Arc<World>);

struct Kernel {
    world: Arc<World>,
    number: u64,
}

impl FreeLists for Lists {
    fn current(&self) -> Option<Arc<dyn KernelLists>> {
        let (world, number) = (Arc::clone(&self.0), self.0.state().kernel);
        (number > 0).then(|| Arc::new(Kernel { world, number }) as _)
    }

    fn ram(&self) -> &[GpaRange] {
        &self.0.ram
    }
}

impl KernelLists for Kernel {
    fn find(&self, within: GpaRange, order: u32, found: &mut Vec<GpaRange>) -> u64 {
        let mut state = self.world.state();
        state.orders.push(order);
        let parts = state
            .free
            .iter()
            .filter_map(|free| free.intersection(within));
        found.extend(parts.filter(|part| part.len() >= PAGE_SIZE << order));
        drop(state);
        self.world.call(&self.world.on_find);
        within.end()
    }

    fn is_current(&self, _: &Hold<'_>) -> bool {
        self.world.state().kernel == self.number
    }

    fn reader<'a>(&'a self, _: &'a Hold<'_>) -> Box<dyn ReadLists + 'a> {
        Box::new(Reader(&self.world))
    }
}

struct Reader<'a>(&'a World);

impl ReadLists for Reader<'_> {
    fn look(&mut self, piece: GpaRange) -> Look {
        self.0.call(&self.0.on_look);
        let mut state = self.0.state();
        state.looked_at.push(piece);
        match (state.poisoned, state.is_free(piece)) {
            (true, true) => Look::Poisoned,
            (false, true) => Look::Free,
            (_, false) => Look::InUse,
        }
    }
}

struct Kicks(Arc<World>);

impl Kick for Kicks {
    fn kick(&self, _: usize) {
        self.0.call(&self.0.on_kick);
    }
}

struct Scene {
    world: Arc<World>,
    gate: Arc<Gate>,
    lazy: Arc<LazyMemory>,
    reclaimer: Arc<Reclaimer>,
}

fn scene_with(world: World, pause: Duration) -> Scene {
    let world = Arc::new(world);
    let generation = Arc::new(VmGeneration::default());
    let kicks = Box::new(Kicks(Arc::clone(&world)));
    let gate = Arc::new(Gate::new(2, Arc::clone(&generation), kicks));
    let lazy = Arc::new(LazyMemory::new(generation));
    let tuning = ReclaimTuning {
        pause,
        share: 50,
        ..ReclaimTuning::default()
    };
    let pages = Arc::clone(&world) as _;
    let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, Arc::clone(&gate), tuning);
    let lists = Box::new(Lists(Arc::clone(&world)));
    Scene {
        gate,
        lazy,
        reclaimer: Arc::new(reclaimer.with_free_lists(lists)),
        world,
    }
}

/// A guest with blocks number 0 to `free` free, and one more that is in use.
fn scene(free: u64) -> Scene {
    let world = World::new(2 * (free + 1));
    world.state().free = (0..free).map(block).collect();
    scene_with(world, LONG)
}

impl Scene {
    fn discard(&self, bytes: u64, reach: Reach) -> Outcome {
        self.reclaimer.discard(order(bytes, reach))
    }
}

#[test]
fn free_blocks_are_taken_neighbours_together_and_only_as_many_as_asked_for() {
    let scene = scene(8);
    let outcome = scene.discard(3 * BLOCK_SIZE + MIB, Reach::Blocks);
    assert_eq!((outcome.bytes, outcome.calls), (3 * BLOCK_SIZE, 1));
    let taken = range(0, 3 * BLOCK_SIZE);
    assert_eq!(scene.world.state().calls, [[taken]]);
    assert_eq!(scene.discard(BLOCK_SIZE, Reach::Blocks).bytes, BLOCK_SIZE);
    assert_eq!(scene.world.state().calls[1], [block(3)]);
    let stats = scene.reclaimer.free_pages();
    assert_eq!(
        (stats.taken_bytes_total, stats.pauses_total),
        (4 * BLOCK_SIZE, 2)
    );
    assert_eq!((stats.candidates_total, stats.stale_total), (4, 0));
    assert_eq!(
        scene.lazy.snapshot().discarded_bytes,
        0,
        "nothing is tracked"
    );
    let all = scene.discard(u64::MAX, Reach::Blocks).bytes;
    assert_eq!(all, 4 * BLOCK_SIZE, "what is in use never");
}

#[test]
fn what_the_guest_takes_before_its_last_vcpu_is_out_is_left_alone() {
    let scene = scene(2);
    let (kicked, kicks) = std::sync::mpsc::channel();
    set(&scene.world.on_kick, move |_| kicked.send(()).unwrap());
    let (gate, world) = (&scene.gate, &scene.world);
    thread::scope(|scope| {
        let insides = [gate.enter(0).unwrap(), gate.enter(1).unwrap()];
        let worker = scope.spawn(|| scene.discard(u64::MAX, Reach::Everything));
        kicks.recv().unwrap();
        kicks.recv().unwrap();
        let [first, last] = insides;
        drop(first);
        world.state().free.retain(|free| *free != block(0));
        drop(last);
        assert_eq!(worker.join().unwrap().bytes, BLOCK_SIZE);
    });
    assert_eq!(world.state().released(), [block(1)]);
    assert_eq!(scene.reclaimer.free_pages().stale_total, 1);
}

#[test]
fn nothing_is_taken_while_a_vcpu_is_in_the_guest() {
    let world = World::new(8);
    world.state().free = vec![block(0)];
    let scene = scene_with(world, Duration::from_micros(10));
    let inside = scene.gate.enter(0);
    let background = Order {
        urgent: false,
        ..order(u64::MAX, Reach::Blocks)
    };
    let missed = || {
        assert_eq!(scene.reclaimer.discard(background).bytes, 0);
        scene.gate.stats().missed_total
    };
    let missed: [u64; 100] = std::array::from_fn(|_| missed());
    assert_eq!(missed[0], u64::from(MAX_MISSES));
    assert!(
        missed[99] < 30,
        "a guest that never comes out is left alone: {missed:?}"
    );
    assert!(
        missed[99] >= missed[89] + 2,
        "but the host does not give up: {missed:?}"
    );
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 0);
    let urgent = scene.gate.stats().missed_total - missed[99];
    assert_eq!(urgent, 32, "who waits tries more often, but not for ever");
    assert!(scene.world.state().looked_at.is_empty());
    drop(inside);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, BLOCK_SIZE);
    let stats = scene.reclaimer.free_pages();
    assert_eq!(stats.missed_total, missed[99] + urgent);
}

/// A vCPU goes in and out, and does what is offered before it enters.
#[test]
fn a_vcpu_thread_takes_what_is_free_before_it_enters() {
    let scene = scene(1);
    let inside = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&inside);
    set(&scene.world.on_release, move |_| {
        assert!(!seen.load(Ordering::SeqCst), "a vCPU is in the guest");
    });
    let passing = || scene.reclaimer.free_pages().passing_total;
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            while passing() == 0 {
                scene.reclaimer.before_entry();
                let entered = scene.gate.enter(0);
                inside.store(true, Ordering::SeqCst);
                thread::yield_now();
                inside.store(false, Ordering::SeqCst);
                drop(entered);
            }
        });
        while passing() == 0 {
            scene.world.state().absent.clear();
            assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, BLOCK_SIZE);
        }
        vcpu.join().unwrap();
    });
    let stats = scene.reclaimer.free_pages();
    assert_eq!(stats.pauses_total * BLOCK_SIZE, stats.taken_bytes_total);
    assert!(stats.passing_total <= stats.pauses_total);
}

/// Two vCPUs take blocks and give them back without a word while they are taken from under them.
#[test]
fn what_is_released_is_free_at_that_moment_whatever_the_vcpus_do() {
    const BLOCKS: u64 = 16;
    let scene = scene(BLOCKS);
    scene.world.state().only_free = true;
    let inside = Arc::new(AtomicU64::new(0));
    let (end, seen) = (AtomicBool::new(false), Arc::clone(&inside));
    set(&scene.world.on_release, move |_| {
        assert_eq!(seen.load(Ordering::SeqCst), 0, "a vCPU is in the guest");
    });
    let run = |index: usize| {
        let mut number = index as u64;
        while !end.load(Ordering::Relaxed) {
            let Some(entered) = scene.gate.enter(index) else {
                return;
            };
            inside.fetch_add(1, Ordering::SeqCst);
            number = number.wrapping_mul(5).wrapping_add(3);
            let used = block(number % BLOCKS);
            let mut state = scene.world.state();
            let free = state.free.len();
            state.free.retain(|free| *free != used);
            if state.free.len() == free {
                state.free.push(used);
            }
            drop(state);
            inside.fetch_sub(1, Ordering::SeqCst);
            drop(entered);
        }
    };
    thread::scope(|scope| {
        let vcpus = [0, 1].map(|index| scope.spawn(move || run(index)));
        for _ in 0..200 {
            scene.discard(4 * BLOCK_SIZE, Reach::Blocks);
        }
        end.store(true, Ordering::Relaxed);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
    assert!(scene.reclaimer.free_pages().taken_bytes_total > 0);
}

#[test]
fn nothing_is_taken_by_the_lists_of_a_kernel_that_does_not_count_any_more() {
    let scene = scene(4);
    set(&scene.world.on_find, |world| world.state().kernel = 2);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 0);
    assert!(scene.world.state().looked_at.is_empty());
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 4 * BLOCK_SIZE);
    scene.world.state().kernel = 0;
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 0);
}

#[test]
fn a_kernel_that_poisons_free_pages_keeps_them() {
    let scene = scene(4);
    scene.world.state().poisoned = true;
    assert_eq!(scene.discard(u64::MAX, Reach::Everything).bytes, 0);
    assert_eq!(scene.world.state().looked_at, [block(0); 2], "once a pass");
}

#[test]
fn only_what_the_host_holds_is_looked_at() {
    let scene = scene(4);
    {
        let mut state = scene.world.state();
        state.absent = vec![block(0), range(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 700 * KIB)];
        state.huge = false;
    }
    let outcome = scene.discard(u64::MAX, Reach::Blocks);
    assert_eq!(
        outcome.bytes,
        3 * BLOCK_SIZE - 700 * KIB,
        "what the host gets"
    );
    let state = scene.world.state();
    let untouched = range(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 512 * KIB);
    let touched = |range: &GpaRange| {
        let meets = |other: GpaRange| range.intersection(other).is_some();
        meets(block(0)) || meets(untouched)
    };
    assert!(
        !state.looked_at.iter().any(touched),
        "{:?}",
        state.looked_at
    );
    assert!(state.looked_at.iter().all(|piece| piece.len() == 512 * KIB));
}

#[test]
fn what_lies_in_huge_pages_as_a_whole_is_asked_for_as_a_whole() {
    let scene = scene(8);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 8 * BLOCK_SIZE);
    assert_eq!(scene.world.state().asked, 2);
}

#[test]
fn pieces_go_only_when_fragments_do_and_after_them() {
    let world = World::new(16);
    let pieces = [
        range(MIB, MIB + 64 * KIB),
        range(3 * MIB, 3 * MIB + 32 * KIB),
    ];
    world.state().free = [pieces.to_vec(), vec![block(4)]].concat();
    let scene = scene_with(world, LONG);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, BLOCK_SIZE);
    assert!(
        scene
            .world
            .state()
            .orders
            .iter()
            .all(|order| *order == super::BLOCKS)
    );
    scene.world.state().absent = vec![block(4)];
    let fragment = range(10 * MIB, 10 * MIB + PAGE_SIZE);
    scene.lazy.free(&[fragment]);
    let outcome = scene.discard(u64::MAX, Reach::Fragments);
    assert_eq!(outcome.bytes, PAGE_SIZE + 64 * KIB, "32 KiB are too small");
    let state = scene.world.state();
    assert_eq!(state.released()[1..], [fragment, pieces[0]]);
}

#[test]
fn a_pause_ends_in_time_and_the_next_goes_on() {
    let pause = Duration::from_millis(20);
    let mut world = World::new(20);
    world.max_batch = 1;
    world.state().free = (0..10).step_by(2).map(block).collect();
    set(&world.on_release, move |_| thread::sleep(pause));
    let scene = scene_with(world, pause);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 5 * BLOCK_SIZE);
    let stats = scene.reclaimer.free_pages();
    assert_eq!((stats.pauses_total, stats.missed_total), (5, 0));
    assert_eq!(scene.world.state().calls.len(), 5, "one call a pause");
}

#[test]
fn each_pause_comes_on_even_if_its_time_is_over_at_once() {
    let world = World::new(10);
    world.state().free = (0..4).map(block).collect();
    let scene = scene_with(world, Duration::ZERO);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 4 * BLOCK_SIZE);
    assert_eq!(scene.reclaimer.free_pages().pauses_total, 4);
}

#[test]
fn a_pause_ends_in_time_if_nothing_is_free_any_more() {
    let pause = Duration::from_millis(5);
    let world = World::new(10);
    world.state().free = (0..4).map(block).collect();
    set(&world.on_look, move |world| {
        world.state().free.clear();
        thread::sleep(pause);
    });
    let scene = scene_with(world, pause);
    assert_eq!(scene.discard(u64::MAX, Reach::Blocks).bytes, 0);
    let stats = scene.reclaimer.free_pages();
    assert_eq!(
        (stats.pauses_total, stats.stale_total),
        (4, 4),
        "one look a pause"
    );
}

#[test]
fn what_would_not_fit_into_the_pause_waits_for_the_next() {
    let world = World::new(2 << 10);
    world.state().free = vec![range(0, 1 << 30)];
    world.state().huge = false;
    // By the assumed cost of a page, a piece of 512 KiB takes 20 us: three fit, whatever the calls take in truth.
    let scene = scene_with(world, Duration::from_micros(70));
    let taken = scene.discard(2 * BLOCK_SIZE, Reach::Blocks).bytes;
    assert_eq!(taken, 2 * BLOCK_SIZE);
    let first = scene.world.state().calls[0].clone();
    let bytes: u64 = first.iter().map(|range| range.len()).sum();
    assert!(bytes <= 3 * 512 * KIB, "{first:?}");
}

#[test]
fn hugetlb_pages_go_as_a_whole() {
    let mut world = World::new(8);
    world.unit = BLOCK_SIZE;
    world.state().free = vec![block(1), range(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + MIB)];
    let scene = scene_with(world, LONG);
    assert_eq!(scene.discard(u64::MAX, Reach::Everything).bytes, BLOCK_SIZE);
    assert_eq!(scene.world.state().orders, [super::BLOCKS]);
}

#[test]
fn candidates_are_bounded() {
    let world = World::new(64 << 10);
    world.state().free = vec![range(0, 64 << 30)];
    world.state().huge = false;
    let scene = scene_with(world, LONG);
    let reclaimer = Arc::downgrade(&scene.reclaimer);
    set(&scene.world.on_release, move |_| {
        reclaimer.upgrade().unwrap().stop();
    });
    let outcome = scene.discard(u64::MAX, Reach::Blocks);
    assert!(outcome.cut_short);
    let stats = scene.reclaimer.free_pages();
    assert_eq!((stats.candidates_total, stats.pauses_total), (256, 1));
    assert_eq!(stats.taken_bytes_total, outcome.bytes);
}

#[test]
fn an_order_ends_between_two_steps() {
    let scene = scene_with(World::new(64 << 10), LONG);
    let over = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&over);
    set(&scene.world.on_find, move |world| {
        ends.store(world.state().orders.len() == 3, Ordering::Relaxed);
    });
    let other = || over.load(Ordering::Relaxed);
    let until = Until {
        deadline: None,
        other: Some(&other),
    };
    let outcome = scene.reclaimer.reclaim_until(u64::MAX, until);
    assert!(outcome.cut_short);
    assert_eq!(scene.world.state().orders.len(), 3);
    over.store(false, Ordering::Relaxed);
}

#[test]
fn what_is_free_is_taken_after_lazy_blocks_and_never_by_age() {
    let scene = scene(2);
    let lazy = range(4 * BLOCK_SIZE, 5 * BLOCK_SIZE);
    scene.lazy.free(&[lazy]);
    assert_eq!(
        scene.discard(2 * BLOCK_SIZE, Reach::Blocks).bytes,
        2 * BLOCK_SIZE
    );
    assert_eq!(scene.world.state().released(), [lazy, block(0)]);
    let aged = Order {
        newest: scene.lazy.generation(),
        ..order(u64::MAX, Reach::Everything)
    };
    assert_eq!(scene.reclaimer.discard(aged).bytes, 0);
}

#[test]
fn by_age_only_blocks_that_were_free_at_two_looks_are_taken() {
    let scene = scene(4);
    let age = Duration::from_secs(60);
    let old_free = |seconds| scene.reclaimer.old_free(Duration::from_secs(seconds), age);
    let free = |blocks: &[u64]| {
        scene.world.state().free = blocks.iter().copied().map(block).collect();
    };
    assert_eq!(old_free(0), 0);
    free(&[1, 2, 3]);
    scene.world.state().absent = vec![block(3)];
    assert_eq!(old_free(59), 0, "no look is due");
    assert_eq!(
        old_free(60),
        2 * BLOCK_SIZE,
        "0 is in use, and the host has no 3"
    );
    free(&[0, 1, 3]);
    let take = || {
        let aged = order(u64::MAX, Reach::Fragments);
        scene
            .reclaimer
            .discard_old_free(aged, Until::default())
            .bytes
    };
    assert_eq!(take(), BLOCK_SIZE, "2 is in use again");
    assert_eq!(scene.world.state().released(), [block(1)]);
    assert_eq!((old_free(61), take()), (0, 0));
    assert_eq!(old_free(120), 0, "0 was not free the last time");
    assert_eq!(old_free(180), BLOCK_SIZE);
    scene.world.state().kernel = 0;
    assert_eq!((old_free(181), take()), (0, 0));
}

/// A small free block beside another one is no part of it: each is looked at by itself, and both are taken.
#[test]
fn small_free_blocks_side_by_side_are_taken() {
    let world = World::new(4);
    let free = [64, 128, 256, 512].map(|kib| range(kib * KIB, 2 * kib * KIB));
    world.state().free = free.to_vec();
    world.state().huge = false;
    let scene = scene_with(world, LONG);
    let outcome = scene.discard(u64::MAX, Reach::Everything);
    assert_eq!(outcome.bytes, 960 * KIB);
    assert_eq!(scene.reclaimer.free_pages().stale_total, 0);
}
