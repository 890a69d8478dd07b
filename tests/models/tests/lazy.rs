//! vCPUs, gate, tracker, reclaimers and the offer slot.
#![cfg(loom)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

use ebb_core::generation::{Gate, NoKick, VmGeneration};
use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::offer::OfferSlot;
use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages, Released};
use ebb_core::slice::{Limits, SliceOutcome, SliceRequest, Slicer};
use ebb_models::check;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

fn page(index: u64) -> GpaRange {
    GpaRange::new(index * PAGE_SIZE, (index + 1) * PAGE_SIZE).unwrap()
}

/// A page of the guest and the second-level entry that leads to it.
struct Page {
    mapped: AtomicBool,
    content: UnsafeCell<u64>,
}

impl Page {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            mapped: AtomicBool::new(true),
            content: UnsafeCell::new(0),
        })
    }

    /// A vCPU inside the guest uses the page if it is mapped.
    fn touch(&self) {
        if self.mapped.load(Ordering::Relaxed) {
            self.content.with_mut(|_| ());
        }
    }
}

fn gate(vcpus: usize) -> (Arc<VmGeneration>, Arc<Gate>) {
    let generation = Arc::new(VmGeneration::default());
    let gate = Gate::new(vcpus, Arc::clone(&generation), Box::new(NoKick));
    (generation, Arc::new(gate))
}

/// Once the generation of an invalidation is quiescent, no vCPU uses the page any more.
fn quiescence_is_real() {
    let ((generation, gate), page) = (gate(2), Page::new());
    let vcpu = {
        let (gate, page) = (Arc::clone(&gate), Arc::clone(&page));
        thread::spawn(move || {
            for _ in 0..2 {
                let inside = gate.enter(0);
                page.touch();
                drop(inside);
            }
        })
    };
    page.mapped.store(false, Ordering::Relaxed);
    let invalidated = generation.advance();
    if gate.quiescent(invalidated) {
        // The host may give it to somebody else.
        page.content.with_mut(|_| ());
    }
    vcpu.join().unwrap();
}

#[test]
fn quiescence() {
    let faults = ["a vCPU's word is relaxed", "no fence on entry"];
    check(5, quiescence_is_real, &faults);
}

/// A thread that waits for the vCPUs that are behind is woken when they have caught up.
fn catching_up_ends() {
    let ((generation, gate), page) = (gate(2), Page::new());
    let vcpu = {
        let (gate, page) = (Arc::clone(&gate), Arc::clone(&page));
        thread::spawn(move || {
            for _ in 0..2 {
                let inside = gate.enter(0);
                page.touch();
                drop(inside);
            }
        })
    };
    page.mapped.store(false, Ordering::Relaxed);
    let invalidated = generation.advance();
    assert!(gate.catch_up(invalidated, Duration::MAX));
    page.content.with_mut(|_| ());
    vcpu.join().unwrap();
}

#[test]
fn catching_up() {
    check(
        4,
        catching_up_ends,
        &[
            "a vCPU's word is relaxed",
            "no fence on entry",
            "the last to leave wakes nobody",
        ],
    );
}

/// While the gate is held no vCPU is inside, and afterwards every vCPU gets in.
fn a_hold_excludes_vcpus() {
    let ((_, gate), page) = (gate(2), Page::new());
    let vcpus = [0, 1].map(|index| {
        let (gate, page) = (Arc::clone(&gate), Arc::clone(&page));
        thread::spawn(move || {
            let inside = gate.enter(index);
            page.content.with(|_| ());
            drop(inside);
        })
    });
    let hold = gate.hold(Duration::MAX).expect("nobody stops");
    page.content.with_mut(|_| ());
    drop(hold);
    for vcpu in vcpus {
        vcpu.join().unwrap();
    }
}

#[test]
fn holding() {
    // A relaxed word is no fault here: the fences on both sides give the order.
    let faults = [
        "no fence on entry",
        "opening wakes nobody",
        "the last to leave wakes nobody",
    ];
    check(2, a_hold_excludes_vcpus, &faults);
}

/// Stopping ends every wait of a closer and of a vCPU.
fn stopping_ends_every_wait() {
    let (_, gate) = gate(1);
    let vcpu = {
        let gate = Arc::clone(&gate);
        thread::spawn(move || {
            while gate.enter(0).is_some() {
                thread::yield_now();
            }
        })
    };
    let closer = {
        let gate = Arc::clone(&gate);
        thread::spawn(move || drop(gate.hold(Duration::MAX)))
    };
    gate.stop();
    vcpu.join().unwrap();
    closer.join().unwrap();
    assert!(gate.enter(0).is_none());
}

#[test]
fn stopping() {
    check(2, stopping_ends_every_wait, &[]);
}

/// Memory of a few pages: to release one is to write to it.
struct Cells {
    pages: Vec<UnsafeCell<u64>>,
    /// Number of releases that the host is still to refuse, after it has released the pages.
    refusals: AtomicUsize,
}

// SAFETY: loom runs one thread at a time, and reports accesses that are not ordered: that is the test.
unsafe impl Send for Cells {}
// SAFETY: as above.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            pages: (0..pages).map(UnsafeCell::new).collect(),
            refusals: AtomicUsize::new(0),
        })
    }

    fn write(&self, range: GpaRange) {
        for index in range.start() / PAGE_SIZE..range.end() / PAGE_SIZE {
            self.pages[index as usize].with_mut(|_| ());
        }
    }
}

impl ReleasePages for Cells {
    fn can_mark_free(&self) -> bool {
        true
    }

    fn max_batch(&self) -> usize {
        2
    }

    fn release(&self, ranges: &[GpaRange], _: Release) -> Released {
        ranges.iter().for_each(|&range| self.write(range));
        let left = self.refusals.load(Ordering::Relaxed);
        self.refusals
            .store(left.saturating_sub(1), Ordering::Relaxed);
        let bytes = |range: &GpaRange| if left > 0 { 0 } else { range.len() };
        Released {
            bytes: ranges.iter().map(bytes).collect(),
            calls: 1,
            ..Released::default()
        }
    }
}

/// A slice over all of `sweep`.
const fn all(sweep: Sweep, how: Release) -> SliceRequest {
    let limits = Limits {
        ranges: 8,
        bytes: u64::MAX,
        pause: Duration::MAX,
    };
    SliceRequest { sweep, how, limits }
}

/// A slice over all lazy ranges.
const fn every(how: Release) -> SliceRequest {
    all(Sweep::new(Pieces::Any, u64::MAX), how)
}

struct World {
    gate: Arc<Gate>,
    offer: OfferSlot<SliceRequest, SliceOutcome>,
    lazy: LazyMemory,
    cells: Arc<Cells>,
}

fn world(pages: u64) -> Arc<World> {
    machine(1, pages)
}

fn machine(vcpus: usize, pages: u64) -> Arc<World> {
    build(vcpus, pages, LazyMemory::new)
}

fn build(vcpus: usize, pages: u64, lazy: fn(Arc<VmGeneration>) -> LazyMemory) -> Arc<World> {
    let (generation, gate) = gate(vcpus);
    Arc::new(World {
        gate,
        offer: OfferSlot::default(),
        lazy: lazy(generation),
        cells: Cells::new(pages),
    })
}

impl World {
    fn with_slicer<T>(&self, run: impl FnOnce(&Slicer<'_>) -> T) -> T {
        run(&Slicer {
            lazy: &self.lazy,
            gate: &self.gate,
            pages: &*self.cells,
            cost: &AtomicU64::new(0),
        })
    }

    /// Runs a slice with the gate held.
    fn held(&self, mut request: SliceRequest) {
        self.with_slicer(|slicer| slicer.held(&mut request));
    }

    /// Runs a slice with the gate open.
    fn open(&self, mut request: SliceRequest) {
        self.with_slicer(|slicer| slicer.open(&mut request));
    }

    /// Offers a slice that discards everything.
    fn post(&self) {
        self.offer.post(every(Release::Discard));
    }

    /// What a vCPU thread does before it enters.
    fn run_offered_slice(&self) {
        if self.offer.is_open() {
            self.with_slicer(|slicer| self.offer.run(|request| slicer.held_if_empty(request)));
        }
    }

    /// Every freed byte is in one state, or was taken back.
    fn check_books(&self) {
        let stats = self.lazy.snapshot();
        let tracked = stats.lazy_bytes + stats.unmapped_bytes + stats.discarded_bytes;
        let freed = tracked + stats.reused_bytes_total;
        assert_eq!(stats.freed_bytes_total, freed, "{stats:?}");
        assert_eq!(stats.reclaiming_bytes, 0);
    }
}

/// A vCPU frees a page, takes it back and uses it, while two reclaimers run.
fn owned_data_is_never_discarded() {
    let world = world(2);
    world.lazy.free(&[page(0)]);
    let reclaimers = [false, true].map(|held| {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let request = every(Release::Discard);
            if held {
                world.held(request);
            } else {
                world.open(request);
            }
        })
    });
    world.lazy.reuse(&[page(0)]);
    let inside = world.gate.enter(0);
    world.cells.write(page(0));
    drop(inside);
    for reclaimer in reclaimers {
        reclaimer.join().unwrap();
    }
    world.check_books();
    assert_eq!(world.lazy.snapshot().ranges, 0);
}

#[test]
fn owned_data() {
    let faults = ["a reuse does not wait for the chunk"];
    check(3, owned_data_is_never_discarded, &faults);
}

/// Two reclaimers never release the same page at the same time.
fn one_reclaimer_a_range() {
    let world = world(2);
    world.lazy.free(&[page(0), page(1)]);
    let other = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.open(every(Release::MarkFree));
        })
    };
    world.open(every(Release::Discard));
    other.join().unwrap();
    world.check_books();
    let stats = world.lazy.snapshot();
    assert_eq!(stats.unmapped_bytes + stats.discarded_bytes, 2 * PAGE_SIZE);
}

#[test]
fn one_reclaimer() {
    check(
        4,
        one_reclaimer_a_range,
        &["the lock is released before the claim"],
    );
}

/// The guest takes page 0 back and writes to it, while another thread does what `reclaim` says.
fn reuse_while(world: &Arc<World>, reclaim: impl FnOnce(&World) + Send + 'static) {
    let reclaimer = {
        let world = Arc::clone(world);
        thread::spawn(move || reclaim(&world))
    };
    world.lazy.reuse(&[page(0)]);
    world.cells.write(page(0));
    reclaimer.join().unwrap();
    world.check_books();
}

/// A reuse of a part of a discarded block makes the rest lazy again, for the next reclaim. What was reused stays in use.
fn the_rest_of_a_block_comes_back() {
    let world = build(1, 2, LazyMemory::with_huge_pages);
    world.lazy.free(&[page(0), page(1)]);
    reuse_while(&world, |world| {
        for _ in 0..2 {
            world.open(every(Release::Discard));
        }
    });
    world.open(every(Release::Discard));
    assert_eq!(world.lazy.snapshot().discarded_bytes, PAGE_SIZE);
}

#[test]
fn rest_of_a_block() {
    let faults = [
        "a reuse does not wait for the chunk",
        "what was reused is lazy again, too",
    ];
    check(3, the_rest_of_a_block_comes_back, &faults);
}

/// Discarded memory that the host was seen to hold pages for is lazy again. What the guest reuses meanwhile stays in use.
fn what_came_back_is_discarded_again() {
    let world = world(2);
    world.lazy.free(&[page(0), page(1)]);
    world.open(every(Release::Discard));
    reuse_while(&world, |world| {
        let bytes: u64 = (0..2).map(|index| world.lazy.refilled(page(index))).sum();
        assert!(bytes >= PAGE_SIZE);
        world.open(every(Release::Discard));
    });
    assert_eq!(world.lazy.snapshot().discarded_bytes, PAGE_SIZE);
}

#[test]
fn what_came_back() {
    let faults = [
        "a reuse does not wait for the chunk",
        "what was reused is lazy again, too",
    ];
    check(3, what_came_back_is_discarded_again, &faults);
}

/// What the host refuses stays lazy. A second take of it meets a reuse just as the first one does.
fn a_refused_chunk_is_taken_again() {
    let world = world(1);
    world.lazy.free(&[page(0)]);
    world.cells.refusals.store(1, Ordering::Relaxed);
    reuse_while(&world, |world| {
        for _ in 0..2 {
            world.open(every(Release::Discard));
        }
    });
    let stats = world.lazy.snapshot();
    assert_eq!(stats.reused_bytes_total, PAGE_SIZE);
    assert!(stats.kept_bytes_total <= PAGE_SIZE);
}

#[test]
fn second_take() {
    let faults = ["a reuse does not wait for the chunk"];
    check(4, a_refused_chunk_is_taken_again, &faults);
}

/// Other threads have the lock between two ranges of a batch.
fn a_batch_is_done_in_steps() {
    let world = world(2);
    let batch = [page(0), page(1)];
    let reclaimer = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.open(every(Release::Discard)))
    };
    world.lazy.free(&batch);
    world.lazy.reuse(&batch);
    batch.iter().for_each(|&page| world.cells.write(page));
    reclaimer.join().unwrap();
    world.check_books();
    assert_eq!(world.lazy.snapshot().ranges, 0);
}

#[test]
fn batch() {
    let faults = ["a reuse does not wait for the chunk"];
    check(4, a_batch_is_done_in_steps, &faults);
}

/// Free, invalidate with the gate held, discard what is quiescent, while the vCPU goes in and out and takes half of
/// the memory back. No thread is stuck, and no page is lost.
fn the_whole_way() {
    let world = world(2);
    world.lazy.free(&[page(0), page(1)]);
    let vcpu = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            drop(world.gate.enter(0));
            world.lazy.reuse(&[page(1)]);
            let inside = world.gate.enter(0);
            world.cells.write(page(1));
            drop(inside);
        })
    };
    world.held(every(Release::MarkFree));
    let quiescent = world.gate.quiescent_generation();
    let unmapped = Sweep::unmapped(Pieces::Any, quiescent);
    world.open(all(unmapped, Release::Discard));
    vcpu.join().unwrap();
    world.check_books();
    let stats = world.lazy.snapshot();
    assert_eq!(stats.unmapped_bytes + stats.discarded_bytes, PAGE_SIZE);
}

#[test]
fn whole_way() {
    check(3, the_whole_way, &["a reuse does not wait for the chunk"]);
}

/// A slice is offered. One vCPU thread may run it before it enters, while another one goes in and out: no vCPU is
/// inside while the slice runs, and it runs once.
fn an_offer_disturbs_nobody_inside() {
    let world = machine(2, 1);
    world.lazy.free(&[page(0)]);
    let vcpus = [true, false].map(|helps| {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            if helps {
                world.run_offered_slice();
            }
            let inside = world.gate.enter(usize::from(helps));
            // It uses its translation.
            world.cells.pages[0].with(|_| ());
            drop(inside);
        })
    });
    world.post();
    let offered = world.offer.take_back().expect("it was posted");
    if offered.outcome.is_none() {
        world.held(offered.request);
    }
    for vcpu in vcpus {
        vcpu.join().unwrap();
    }
    world.check_books();
    let stats = world.lazy.snapshot();
    assert_eq!(stats.reclaimed_bytes_total, PAGE_SIZE);
    assert_eq!(world.gate.stats().closings_total, 1);
}

#[test]
fn offering() {
    check(
        2,
        an_offer_disturbs_nobody_inside,
        &["no second look at the vCPUs"],
    );
}

/// A thread that waits for an offered slice is woken when it was run.
fn an_offer_is_awaited() {
    let world = machine(1, 1);
    world.lazy.free(&[page(0)]);
    world.post();
    let vcpu = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            // One that finds the slot busy enters, and looks again.
            while world.offer.is_open() {
                world.run_offered_slice();
                drop(world.gate.enter(0));
                thread::yield_now();
            }
        })
    };
    world.offer.wait(Duration::MAX);
    let offered = world.offer.take_back().expect("it was posted");
    assert!(
        offered
            .outcome
            .is_some_and(|slice| slice.bytes == PAGE_SIZE)
    );
    vcpu.join().unwrap();
}

#[test]
fn awaiting_an_offer() {
    check(4, an_offer_is_awaited, &["running an offer wakes nobody"]);
}
