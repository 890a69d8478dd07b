use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;

const GRANULE: u64 = 2 << 20;
const SIZE: u64 = 32 * GRANULE;

/// An arena in a file.
fn device() -> tempfile::NamedTempFile {
    device_of(SIZE)
}

fn device_of(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let layout = Layout::new(size, GRANULE).unwrap();
    write(file.as_file(), &Header::new(layout, 0, 4 << 30, "test"));
    file.as_file().set_len(size).unwrap();
    file
}

fn write(file: &File, header: &Header) {
    let bytes: Vec<u8> = header
        .to_words()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    file.write_all_at(&bytes, 0).unwrap();
}

/// Discards all lazy granules, as the monitor does, until `done`. Returns how many.
fn monitor(arena: &Arena, done: &AtomicBool) -> u64 {
    let mut taken = 0;
    while !done.load(Ordering::Relaxed) {
        for index in arena.indices() {
            let word = Word::from_raw(arena.state_word(index).load(Ordering::Acquire));
            let Some(reclaiming) = word.take() else {
                continue;
            };
            if shared_word::swap(arena.state_word(index), word, reclaiming) {
                let size = arena.granule_size();
                arena.mapping.bytes(index * size, size).fill(0);
                let discarded = reclaiming.finish(true).unwrap();
                assert!(shared_word::swap(
                    arena.state_word(index),
                    reclaiming,
                    discarded
                ));
                taken += 1;
            }
        }
        thread::yield_now();
    }
    taken
}

#[test]
fn granules_are_claimed_once_and_released_on_drop() {
    let device = device();
    let arena = Arena::open(device.path()).unwrap();
    assert_eq!((arena.name(), arena.size()), ("test", SIZE));
    let all: Vec<_> = std::iter::from_fn(|| arena.claim()).collect();
    let distinct: HashSet<_> = all.iter().map(|granule| granule.index).collect();
    assert_eq!((all.len(), distinct.len()), (31, 31));
    assert_eq!(arena.counts().owned, 31);
    drop(all);
    let counts = arena.counts();
    assert_eq!((counts.owned, counts.lazy), (0, 31));
}

#[test]
fn a_granule_has_one_owner_when_several_claim_it() {
    const ROUNDS: usize = 800;
    const THREADS: usize = 4;
    const GRANULES: usize = 8191;
    let device = device_of((GRANULES as u64 + 1) * GRANULE);
    // Half of the threads use a second slot, as another process would.
    let arenas = [(); 2].map(|()| Arena::open(device.path()).unwrap());
    let together = std::sync::Barrier::new(THREADS);
    let owned = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let (arena, together) = (&arenas[number % 2], &together);
                scope.spawn(move || {
                    let mut owned = 0;
                    for _ in 0..ROUNDS {
                        together.wait();
                        let all = arena.indices();
                        owned += all.clone().filter(|index| arena.try_own(*index)).count();
                        together.wait();
                        all.for_each(|index| arena.owner_word(index).store(0, Ordering::Release));
                    }
                    owned
                })
            })
            .collect();
        let owned = threads.into_iter().map(|thread| thread.join().unwrap());
        owned.sum::<usize>()
    });
    assert_eq!(owned, ROUNDS * GRANULES);
}

#[test]
fn a_claimed_granule_is_zero_and_a_reused_one_keeps_its_content() {
    let device = device();
    let arena = Arena::open(device.path()).unwrap();
    let mut granule = arena.claim().unwrap();
    let index = granule.index;
    granule.bytes()[12345] = 7;
    let (mut granule, zeroed) = granule.lazy_free().reuse();
    assert_eq!((granule.bytes()[12345], zeroed), (7, false));
    drop(granule);
    arena
        .search_from
        .store(index - arena.first(), Ordering::Relaxed);
    let mut again = arena.claim().unwrap();
    assert_eq!((again.index, again.bytes()[12345]), (index, 0));
}

#[test]
fn granules_of_dead_processes_only_are_recovered() {
    let device = device();
    let living = Arena::open(device.path()).unwrap();
    let dead = Arena::open(device.path()).unwrap();
    assert_ne!(living.slot.index(), dead.slot.index());
    let mut kept = living.claim().unwrap();
    kept.bytes().fill(9);
    // A granule in each state in which a process can leave it.
    std::mem::forget(dead.claim().unwrap());
    std::mem::forget(dead.claim().unwrap().lazy_free());
    dead.owner_word(20)
        .store(dead.slot.owner().raw(), Ordering::Relaxed);
    assert_eq!(living.recover().unwrap(), 0, "its process is alive");
    let dead = std::mem::ManuallyDrop::new(dead);
    // Like a kill: only the mapping goes.
    // SAFETY: the value is never used or dropped again.
    drop(unsafe { std::ptr::read(&raw const dead.mapping) });
    assert_eq!(living.recover().unwrap(), 3);
    let counts = living.counts();
    assert_eq!((counts.owned, counts.in_use - 1), (1, counts.granules - 4));
    assert!(kept.bytes().iter().all(|byte| *byte == 9));
}

#[test]
fn a_claim_that_finds_nothing_recovers_first() {
    let device = device();
    let dead = Arena::open(device.path()).unwrap();
    std::iter::from_fn(|| dead.claim()).for_each(std::mem::forget);
    let living = Arena::open(device.path()).unwrap();
    assert!(living.claim().is_none());
    // SAFETY: the value is never used or dropped again.
    drop(unsafe { std::ptr::read(&raw const std::mem::ManuallyDrop::new(dead).mapping) });
    let _one = living.claim().unwrap();
    assert_eq!(living.counts().owned, 1);
}

#[test]
fn the_next_process_in_a_slot_releases_the_granules_of_the_last() {
    let device = device();
    let first = Arena::open(device.path()).unwrap();
    let (slot, owner) = (first.slot.index(), first.slot.owner());
    std::iter::from_fn(|| first.claim()).for_each(std::mem::forget);
    // SAFETY: the value is never used or dropped again.
    drop(unsafe { std::ptr::read(&raw const std::mem::ManuallyDrop::new(first).mapping) });
    let second = Arena::open(device.path()).unwrap();
    assert_eq!((second.slot.index(), second.counts().owned), (slot, 0));
    assert_ne!(second.slot.owner(), owner);
}

#[test]
fn used_granules_keep_their_content_while_a_monitor_discards_lazy_ones() {
    let device = device();
    let arena = Arena::open(device.path()).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let monitor = scope.spawn(|| monitor(&arena, &done));
        let workers: Vec<_> = (0..3_u64)
            .map(|seed| {
                let arena = &arena;
                scope.spawn(move || {
                    for round in 0..200 {
                        let mut granule = arena.claim().expect("there are enough");
                        assert_eq!(granule.bytes()[4096], 0);
                        let stamp = (seed << 32 | round).wrapping_mul(0x9e37_79b9).to_le_bytes();
                        granule.bytes()[4096..4104].copy_from_slice(&stamp);
                        let (mut granule, zeroed) = granule.lazy_free().reuse();
                        let expected = if zeroed { [0; 8] } else { stamp };
                        assert_eq!(granule.bytes()[4096..4104], expected);
                        granule.bytes()[4096..4104].copy_from_slice(&stamp);
                        thread::yield_now();
                        assert_eq!(granule.bytes()[4096..4104], stamp);
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
        done.store(true, Ordering::Relaxed);
        assert!(monitor.join().unwrap() > 0);
    });
    assert_eq!(arena.counts().owned, 0);
}

#[test]
fn files_without_a_valid_header_are_refused_with_a_remedy() {
    let message = |path: &Path| match Arena::open(path) {
        Ok(_) => panic!("{} was taken for an arena", path.display()),
        Err(error) => error.to_string(),
    };
    assert!(message(Path::new("/dev/dax99.99")).contains("run `ebb-guest setup` as root"));
    let file = device();
    let layout = Layout::new(SIZE, GRANULE).unwrap();
    let good = Header::new(layout, 0, 0, "");
    for (header, part) in [
        (Header { magic: 1, ..good }, "no arena: it begins with"),
        (
            Header {
                version: 5 << 16,
                ..good
            },
            "version 5.0, but 1.x is needed",
        ),
        (
            Header {
                granule: 4096,
                ..good
            },
            "does not fit",
        ),
        (
            Header {
                size: 2 * SIZE,
                granules: 64,
                ..good
            },
            "does not fit",
        ),
    ] {
        write(file.as_file(), &header);
        assert!(
            message(file.path()).contains(part),
            "{part}: {}",
            message(file.path())
        );
    }
    write(file.as_file(), &good);
    file.as_file().set_len(GRANULE).unwrap();
    assert!(message(file.path()).contains("does not fit"));
    file.as_file().set_len(8).unwrap();
    assert!(message(file.path()).contains("mmap failed"));
}

#[test]
fn a_device_without_permission_is_refused_with_a_remedy() {
    const NOBODY: u32 = 65534;
    let file = device();
    let nothing = std::os::unix::fs::PermissionsExt::from_mode(0o0);
    file.as_file().set_permissions(nothing).unwrap();
    let path = file.path();
    let said = std::thread::scope(|scope| {
        let as_nobody = || {
            // Changes this thread only.
            if rustix::process::geteuid().is_root() {
                rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).unwrap();
            }
            Arena::open(path).err().map(|error| error.to_string())
        };
        scope.spawn(as_nobody).join().unwrap()
    });
    let said = said.expect("it was opened");
    assert!(
        said.contains("permission denied; join the group of the device"),
        "{said}"
    );
}
