//! The kernel really refuses releases: nothing that the guest uses is lost, the counts stay right, and reclaim goes on.

use std::sync::Arc;

use ebb_core::generation::{Gate, VmGeneration};
use ebb_core::lazy::{LazyMemory, LazyStats};
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::ReleasePages;
use vm_memory::{Bytes, GuestAddress};

use super::order;
use crate::memory::{Backing, GuestRam};
use crate::reclaim::{Reach, ReclaimTuning, Reclaimer};

const MIB: u64 = 1 << 20;
const RAM: u64 = 48 * MIB;
/// The range that the guest has freed.
const FREED: (u64, u64) = (4 * MIB, 36 * MIB);
/// The page that the kernel does not release.
const BAD: u64 = 13 * MIB + PAGE_SIZE;
/// The block of that page.
const BAD_BLOCK: u64 = 12 * MIB;

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).unwrap()
}

fn bad() -> GpaRange {
    range(BAD, BAD + PAGE_SIZE)
}

struct Scene {
    ram: Arc<GuestRam>,
    lazy: Arc<LazyMemory>,
    reclaimer: Reclaimer,
}

impl Scene {
    /// All memory is in use, and each page holds its address.
    fn new() -> Self {
        let ram = GuestRam::allocate(Backing::default(), &[range(0, RAM)]).unwrap();
        let ram = Arc::new(ram);
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
        let lazy = Arc::new(LazyMemory::new(generation));
        let tuning = ReclaimTuning::default();
        let reclaimer = Reclaimer::new(Arc::clone(&lazy), ram.clone(), gate, tuning);
        let scene = Self {
            ram,
            lazy,
            reclaimer,
        };
        scene.write(range(0, RAM));
        scene
    }

    fn write(&self, range: GpaRange) {
        for page in pages(range) {
            let stamp = page | 1;
            self.ram
                .memory()
                .write_obj(stamp, GuestAddress(page))
                .unwrap();
        }
    }

    fn read(&self, page: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(page)).unwrap()
    }

    /// Checks that `range` is as [`Scene::write`] has left it.
    fn verify(&self, range: GpaRange) {
        for page in pages(range) {
            assert_eq!(self.read(page), page | 1, "{page:#x}");
        }
    }

    fn stats(&self) -> LazyStats {
        let stats = self.lazy.snapshot();
        let all = stats.lazy_bytes
            + stats.unmapped_bytes
            + stats.reclaiming_bytes
            + stats.discarded_bytes
            + stats.reused_bytes_total;
        assert_eq!(stats.freed_bytes_total, all, "{stats:?}");
        stats
    }
}

fn pages(range: GpaRange) -> impl Iterator<Item = u64> {
    (range.start()..range.end()).step_by(PAGE_SIZE as usize)
}

/// `EINVAL`: the kernel has released what comes before the locked page, and not what comes after it.
#[test]
fn a_locked_page_keeps_its_block_and_no_other() {
    let scene = Scene::new();
    scene.ram.lock(bad());
    scene.lazy.free(&[range(FREED.0, FREED.1)]);
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!(outcome.bytes, FREED.1 - FREED.0 - BLOCK_SIZE);
    assert!(outcome.failures > 0);
    let stats = scene.stats();
    assert_eq!(
        (stats.lazy_bytes, stats.discarded_bytes),
        (BLOCK_SIZE, outcome.bytes)
    );
    scene.verify(range(0, FREED.0));
    scene.verify(range(FREED.1, RAM));
    scene.verify(bad());
    let gone = pages(range(FREED.0, FREED.1)).filter(|&page| scene.read(page) == 0);
    assert!(gone.count() as u64 >= outcome.bytes / PAGE_SIZE);

    // Later the block is released like any other, and the guest can reuse a part of it.
    scene.lazy.reuse(&[range(BAD_BLOCK, BAD_BLOCK + MIB)]);
    scene.write(range(BAD_BLOCK, BAD_BLOCK + MIB));
    scene.ram.unlock(bad());
    let rest = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!((rest.bytes, rest.failures), (MIB, 0));
    scene.verify(range(BAD_BLOCK, BAD_BLOCK + MIB));
    assert_eq!(scene.stats().lazy_bytes, 0);
}

/// `ENOMEM`: the kernel has released both sides of the hole. The monitor does not know that, so the block stays lazy.
#[test]
fn a_hole_keeps_its_block_lazy_though_both_sides_are_gone() {
    let scene = Scene::new();
    scene.ram.unmap(bad());
    scene.lazy.free(&[range(FREED.0, FREED.1)]);
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!(outcome.bytes, FREED.1 - FREED.0 - BLOCK_SIZE);
    assert!(outcome.failures > 0);
    let stats = scene.stats();
    assert_eq!(
        (stats.lazy_bytes, stats.discarded_bytes),
        (BLOCK_SIZE, outcome.bytes)
    );
    for page in pages(range(FREED.0, FREED.1)).filter(|&page| page != BAD) {
        assert_eq!(scene.read(page), 0, "{page:#x}");
    }
    scene.verify(range(0, FREED.0));
    scene.verify(range(FREED.1, RAM));
    let sides = [
        range(BAD_BLOCK, BAD),
        range(BAD + PAGE_SIZE, BAD_BLOCK + BLOCK_SIZE),
    ];
    scene.lazy.reuse(&sides);
    for side in sides {
        scene.write(side);
    }
    // Of the hole, newer kernels say that nothing is there.
    let told = scene.ram.held(bad()).map_or(0, |_| PAGE_SIZE);
    assert_eq!(scene.reclaimer.reclaim(u64::MAX).bytes, told);
    sides.into_iter().for_each(|side| scene.verify(side));
    assert_eq!(scene.stats().lazy_bytes, PAGE_SIZE - told);
}

#[test]
fn a_locked_page_is_not_left_to_the_host_but_its_neighbours_are() {
    let scene = Scene::new();
    scene.ram.lock(bad());
    scene.lazy.free(&[range(FREED.0, FREED.1)]);
    let outcome = scene
        .reclaimer
        .invalidate(order(u64::MAX, Reach::Fragments));
    assert_eq!(outcome.bytes, FREED.1 - FREED.0 - BLOCK_SIZE);
    let stats = scene.stats();
    assert_eq!(
        (stats.lazy_bytes, stats.unmapped_bytes),
        (BLOCK_SIZE, outcome.bytes)
    );
    scene.verify(bad());
    assert_eq!(
        scene.reclaimer.snapshot().invalidate_failures_total,
        outcome.failures
    );
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!(outcome.bytes, FREED.1 - FREED.0 - BLOCK_SIZE);
}

#[test]
fn in_a_slice_only_the_fragment_that_is_refused_stays() {
    let scene = Scene::new();
    scene.ram.lock(bad());
    // Every other page is in use; the locked one is not among them.
    let is_in_use = |page: u64| (page / PAGE_SIZE).is_multiple_of(2);
    let fragments: Vec<_> = pages(range(12 * MIB, 14 * MIB))
        .filter(|&page| !is_in_use(page))
        .map(|page| range(page, page + PAGE_SIZE))
        .collect();
    scene.lazy.free(&fragments);
    let outcome = scene.reclaimer.reclaim(u64::MAX);
    assert_eq!(outcome.bytes, MIB - PAGE_SIZE);
    assert_eq!(outcome.failures, 1);
    assert_eq!(scene.stats().lazy_bytes, PAGE_SIZE);
    let in_use = pages(range(12 * MIB, 14 * MIB)).filter(|&page| is_in_use(page));
    in_use.for_each(|page| scene.verify(range(page, page + PAGE_SIZE)));
}
