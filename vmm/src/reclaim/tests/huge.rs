//! Transparent huge pages bring discarded memory back. Hosts without them have nothing to test here.

use std::sync::Arc;

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::LazyMemory;
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::ReleasePages;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{Backing, GuestRam};
use crate::reclaim::{ReclaimTuning, Reclaimer};

const BLOCKS: u64 = 32;

struct Scene {
    ram: Arc<GuestRam>,
    lazy: Arc<LazyMemory>,
    reclaimer: Reclaimer,
}

fn block(index: u64) -> GpaRange {
    GpaRange::new(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE).unwrap()
}

fn page(index: u64) -> GpaRange {
    GpaRange::new(index * BLOCK_SIZE, index * BLOCK_SIZE + PAGE_SIZE).unwrap()
}

/// All blocks are freed and discarded. `None` without transparent huge pages.
fn scene(lazy: impl FnOnce(Arc<VmGeneration>) -> LazyMemory) -> Option<Scene> {
    let all = GpaRange::new(0, BLOCKS * BLOCK_SIZE).unwrap();
    let backing = Backing {
        thp: true,
        ..Backing::default()
    };
    let ram = Arc::new(GuestRam::allocate(backing, &[all]).unwrap());
    let generation = Arc::new(VmGeneration::default());
    let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
    let lazy = Arc::new(lazy(generation));
    let pages = Arc::clone(&ram) as _;
    let reclaimer = Reclaimer::new(Arc::clone(&lazy), pages, gate, ReclaimTuning::default());
    let scene = Scene {
        ram,
        lazy,
        reclaimer,
    };
    (0..BLOCKS).for_each(|index| scene.write(index));
    // A host that is short of memory may have no huge page for some blocks.
    let huge = scene.ram.resident() > BLOCKS / 2 * BLOCK_SIZE;
    scene.lazy.free(&[all]);
    assert_eq!(scene.reclaimer.reclaim(u64::MAX).bytes, all.len());
    assert_eq!(scene.ram.resident(), 0);
    huge.then_some(scene)
}

impl Scene {
    /// The guest writes to the first page of a block.
    fn write(&self, index: u64) {
        let at = GuestAddress(index * BLOCK_SIZE);
        self.ram.memory().write_obj(index + 1, at).unwrap();
    }

    fn verify(&self) {
        for index in 0..BLOCKS {
            let at = GuestAddress(index * BLOCK_SIZE);
            let word: u64 = self.ram.memory().read_obj(at).unwrap();
            assert_eq!(word, index + 1);
        }
    }
}

#[test]
fn a_page_in_use_keeps_no_huge_page_resident() {
    let Some(scene) = scene(LazyMemory::with_huge_pages) else {
        return;
    };
    for index in 0..BLOCKS {
        scene.lazy.reuse(&[page(index)]);
        scene.write(index);
    }
    assert!(scene.ram.resident() > BLOCKS / 2 * BLOCK_SIZE);
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert!(outcome.bytes > 0, "{outcome:?}");
    assert_eq!(scene.ram.resident(), BLOCKS * PAGE_SIZE, "what is in use");
    scene.verify();
}

/// As khugepaged does it, which puts huge pages where only a few pages are there: nobody tells the tracker.
#[test]
fn what_the_host_refills_by_itself_is_found_and_discarded_again() {
    let Some(scene) = scene(LazyMemory::new) else {
        return;
    };
    for index in 0..BLOCKS {
        scene.lazy.reuse(&[page(index)]);
        scene.write(index);
    }
    let before = scene.ram.resident();
    assert!(before > BLOCKS / 2 * BLOCK_SIZE);
    assert_eq!(scene.lazy.snapshot().lazy_bytes, 0);
    scene.reclaimer.reclaim(u64::MAX);
    assert_eq!(scene.ram.resident(), BLOCKS * PAGE_SIZE, "what is in use");
    let stats = scene.reclaimer.snapshot();
    assert!(stats.refilled_bytes_total >= before - BLOCKS * PAGE_SIZE);
    scene.verify();
    let calls = scene.reclaimer.reclaim(u64::MAX).calls;
    assert_eq!(calls, 0, "what is gone is not discarded again");
}

#[test]
fn what_the_host_holds_nothing_of_is_discarded_without_a_call() {
    let Some(scene) = scene(LazyMemory::with_huge_pages) else {
        return;
    };
    // The guest has not touched the page yet, so nothing has come back.
    scene.lazy.reuse(&[page(5)]);
    assert_eq!(scene.lazy.snapshot().lazy_bytes, BLOCK_SIZE - PAGE_SIZE);
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    // An older kernel does not tell.
    let told = scene.ram.held(page(6)) == Some(0);
    assert_eq!(outcome.calls, u64::from(!told));
    assert_eq!(scene.lazy.snapshot().lazy_bytes, 0);
}

#[test]
fn a_whole_block_that_came_back_goes_as_one() {
    let Some(scene) = scene(LazyMemory::new) else {
        return;
    };
    // Nobody reuses it: as if the host had filled it.
    scene.write(3);
    assert!(scene.ram.held(block(3)) > Some(0));
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!((outcome.bytes, outcome.calls), (BLOCK_SIZE, 1));
    assert_eq!(scene.ram.resident(), 0);
    let stats = scene.lazy.snapshot();
    assert_eq!(stats.discarded_bytes, BLOCKS * BLOCK_SIZE);
}
