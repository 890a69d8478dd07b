//! Strict mode without a guest: the threads of the tests act as device threads. These tests need userfaultfd for faults of
//! the kernel, and fail without it.

use std::time::Instant;

use ebb_core::generation::VmGeneration;
use ebb_core::range::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::kvm::prepare_kicks;
use crate::memory::Backing;

const PAGES: u64 = 4096;

/// Strict mode over [`PAGES`] pages.
fn start() -> (Arc<Strict>, StrictThread, Arc<GuestMemoryMmap>) {
    let ram = Arc::new(GuestRam::allocate(Backing::default(), &[pages(0, PAGES)]).unwrap());
    let lazy = Arc::new(LazyMemory::new(Arc::new(VmGeneration::default())));
    let kicks = Arc::new(KickTable::new(1));
    let memory = ram.memory();
    let strict = Arc::new(Strict::new(lazy, Arc::clone(&ram), kicks, 1));
    match StrictThread::start(Arc::clone(&strict), ram) {
        Ok(thread) => (strict, thread, memory),
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            panic!("this test needs userfaultfd: {error}: {source:?}");
        }
    }
}

fn pages(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
}

fn write(memory: &GuestMemoryMmap, page: u64) {
    memory
        .write_obj(7_u64, GuestAddress(page * PAGE_SIZE))
        .unwrap();
}

fn read(memory: &GuestMemoryMmap, page: u64) -> u64 {
    memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()
}

#[test]
fn each_lazily_free_page_is_caught_once_until_it_is_freed_again() {
    let (strict, thread, memory) = start();
    let violations = || strict.snapshot().device_violations_total;
    let begin = Instant::now();
    (0..PAGES).for_each(|page| write(&memory, page));
    println!("{:?} a fault", begin.elapsed() / PAGES as u32);
    assert_eq!(strict.snapshot().faults_total, PAGES);
    for round in 1..4 {
        strict.free(&[pages(100, 200)]);
        assert!((50..250).all(|page| (read(&memory, page) == 0) == (100..200).contains(&page)));
        (100..200).for_each(|page| write(&memory, page));
        assert_eq!(violations(), round * 100);
    }
    strict.free(&[pages(100, 200)]);
    strict.lazy.reuse(&[pages(100, 150)]);
    (0..300).for_each(|page| write(&memory, page));
    assert_eq!(violations(), 350);
    assert_eq!(strict.faults.count(), 350);
    strict.lazy.reset();
    drop(thread);
    // No thread watches any more, and none waits.
    strict.free(&[pages(0, PAGES)]);
    assert_eq!(read(&memory, 0), 0);
    assert_eq!(violations(), 350);
}

#[test]
fn threads_that_touch_one_page_at_once_all_go_on_and_are_one_report() {
    let (strict, _thread, memory) = start();
    strict.free(&[pages(0, 500)]);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..500).for_each(|page| write(&memory, page)));
        }
    });
    assert_eq!(strict.snapshot().device_violations_total, 500);
}

/// The thread of the test acts as the vCPU's.
#[test]
fn what_a_vcpu_touches_is_told_at_its_exit() {
    let (strict, _thread, memory) = start();
    prepare_kicks().unwrap();
    let _registered = strict.kicks.register(0);
    strict.free(&[pages(0, 100)]);
    let inside = strict.in_guest(0);
    assert!(!strict.is_caught(0));
    write(&memory, 0);
    assert!(strict.is_caught(0));
    strict.tell(0, 0x1000);
    assert_eq!((strict.is_caught(0), strict.faults.count()), (false, 1));
    // In one exit, one more than are kept.
    let many = MAX_CAUGHT as u64 + 1;
    (1..=many).for_each(|page| write(&memory, page));
    strict.tell(0, 0x1000);
    assert_eq!(strict.faults.count(), many);
    // Outside it works for a device.
    drop(inside);
    write(&memory, 50);
    assert!(!strict.is_caught(0));
    let stats = strict.snapshot();
    let violations = (stats.vcpu_violations_total, stats.device_violations_total);
    assert_eq!(violations, (many + 1, 1));
}

#[test]
fn reads_are_told_from_writes() {
    let verbs = [true, false].map(|write| Access { page: 0, write }.verb());
    assert_eq!(verbs, ["writes to", "reads"]);
}
