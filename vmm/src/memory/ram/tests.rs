use ebb_core::range::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::memory::backing::{FILE, MAX_FILES};

const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start, end).unwrap()
}

const SHARED: Backing = Backing {
    shared: true,
    thp: false,
    hugepages: false,
};

fn two_regions() -> GuestRam {
    two_regions_of(Backing::default())
}

fn two_regions_of(backing: Backing) -> GuestRam {
    let layout = [range(0, 4 * MIB), range(8 * MIB, 14 * MIB)];
    GuestRam::allocate(backing, &layout).unwrap()
}

fn fill(ram: &GuestRam) {
    for region in ram.regions() {
        let page = [0xa5u8; PAGE_SIZE as usize];
        for gpa in (region.gpa.start()..region.gpa.end()).step_by(page.len()) {
            ram.memory().write_slice(&page, GuestAddress(gpa)).unwrap();
        }
    }
}

fn byte(ram: &GuestRam, gpa: u64) -> u8 {
    ram.memory().read_obj(GuestAddress(gpa)).unwrap()
}

#[test]
fn regions_are_where_the_guest_sees_them_and_congruent() {
    let ram = two_regions();
    assert_eq!(ram.len(), 10 * MIB);
    for region in ram.regions() {
        assert_eq!(
            region.host as u64 % BLOCK_SIZE,
            region.gpa.start() % BLOCK_SIZE
        );
        let found = ram
            .memory()
            .get_host_address(GuestAddress(region.gpa.start()));
        assert_eq!(found.unwrap() as usize, region.host);
    }
    let odd = GuestRam::allocate(Backing::default(), &[range(0xa0000, 0x200000)]).unwrap();
    assert_eq!(odd.regions()[0].host as u64 % BLOCK_SIZE, 0xa0000);
}

#[test]
fn ram_is_what_lies_in_regions() {
    let ram = two_regions();
    for (start, end, want) in [
        (0, 4, true),
        (3, 4, true),
        (0, 5, false),
        (4, 8, false),
        (7, 9, false),
        (8, 14, true),
        (13, 15, false),
        (0, 14, false),
        (20, 21, false),
    ] {
        assert_eq!(
            ram.is_ram(range(start * MIB, end * MIB)),
            want,
            "{start}..{end}"
        );
    }
    let adjacent = [range(0, 4096), range(4096, 12288)];
    let ram = GuestRam::allocate(Backing::default(), &adjacent).unwrap();
    assert!(ram.is_ram(range(0, 12288)));
    assert_eq!(
        ram.release_range(range(0, 8192), Release::Discard).unwrap(),
        8192
    );
}

#[test]
fn a_discard_drops_exactly_its_pages() {
    for backing in [Backing::default(), SHARED] {
        discard_drops_exactly_its_pages(backing);
    }
}

fn discard_drops_exactly_its_pages(backing: Backing) {
    let ram = two_regions_of(backing);
    fill(&ram);
    assert_eq!(ram.resident(), 10 * MIB);
    let gone = range(9 * MIB, 10 * MIB + PAGE_SIZE);
    assert_eq!(
        ram.release_range(gone, Release::Discard).unwrap(),
        gone.len()
    );
    assert_eq!(ram.resident(), 10 * MIB - gone.len());
    let held = |start, end| ram.held(range(start, end));
    assert_eq!(held(9 * MIB, 11 * MIB), Some(MIB - PAGE_SIZE));
    assert_eq!(
        held(10 * MIB - PAGE_SIZE, 10 * MIB + 3 * PAGE_SIZE),
        Some(2 * PAGE_SIZE)
    );
    assert_eq!(
        held(MIB, 9 * MIB),
        Some(4 * MIB),
        "what is not RAM is not held"
    );
    let page = |page: u64| range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    let first = 10 * MIB / PAGE_SIZE;
    let some = [
        page(first - 1),
        page(first),
        page(first + 1),
        page(first + 3),
    ];
    assert_eq!(ram.held_of(&some), 2 * PAGE_SIZE);
    let apart = [range(MIB, 5 * MIB), page(first), page(first + 9)];
    assert_eq!(ram.held_of(&apart), 3 * MIB + PAGE_SIZE);
    assert_eq!(ram.held_of(&[]), 0);
    for (gpa, want) in [
        (gone.start() - 1, 0xa5),
        (gone.start(), 0),
        (gone.end() - 1, 0),
        (gone.end(), 0xa5),
    ] {
        assert_eq!(byte(&ram, gpa), want, "{gpa:#x}");
    }
    assert!(matches!(
        ram.release_range(range(3 * MIB, 5 * MIB), Release::Discard),
        Err(MemoryError::NotRam { .. })
    ));
    assert_eq!(byte(&ram, 3 * MIB), 0xa5, "a refused discard drops nothing");
}

/// Returns true if the kernel takes process_madvise(2) with advice that releases pages (Linux 6.13).
fn takes_vectors() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_str().unwrap();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 13)
}

#[test]
fn a_release_of_many_ranges_drops_exactly_their_pages() {
    let (private, shared) = (two_regions(), two_regions_of(SHARED));
    assert!(private.can_mark_free() && !shared.can_mark_free());
    for (ram, how) in [
        (&private, Release::MarkFree),
        (&private, Release::Discard),
        (&shared, Release::Discard),
    ] {
        fill(ram);
        let even = |page: u64| range(page * 2 * PAGE_SIZE, (page * 2 + 1) * PAGE_SIZE);
        let mut ranges: Vec<_> = (0..512).map(even).collect();
        ranges.push(range(5 * MIB, 6 * MIB));
        ranges.push(range(9 * MIB, 10 * MIB));
        let released = ram.release(&ranges, how);
        assert_eq!((released.failures, released.error), (1, None));
        assert_eq!(released.bytes[..512], [PAGE_SIZE; 512]);
        assert_eq!(released.bytes[512..], [0, MIB], "no RAM, nothing done");
        if takes_vectors() {
            assert_eq!((released.calls, ram.max_batch()), (2, usize::MAX));
        } else {
            assert!(released.calls >= 513 && ram.max_batch() == 1);
        }
        for page in 0..512 {
            assert_eq!(byte(ram, (page * 2 + 1) * PAGE_SIZE), 0xa5);
        }
        let gone = if how == Release::Discard { 3 * MIB } else { 0 };
        assert_eq!(ram.resident(), 10 * MIB - gone);
    }
}

#[test]
fn what_is_marked_free_is_kept_once_written_to() {
    let ram = two_regions();
    fill(&ram);
    let marked = range(9 * MIB, 11 * MIB);
    assert_eq!(
        ram.release_range(marked, Release::MarkFree).unwrap(),
        marked.len()
    );
    ram.memory()
        .write_obj(0x5a_u8, GuestAddress(marked.start()))
        .unwrap();
    assert_eq!(byte(&ram, marked.start()), 0x5a);
    assert_eq!(byte(&ram, marked.start() - 1), 0xa5);
    assert_eq!(byte(&ram, marked.end()), 0xa5);
    assert!(matches!(
        ram.release_range(range(3 * MIB, 5 * MIB), Release::MarkFree),
        Err(MemoryError::NotRam { .. })
    ));
}

#[test]
fn prefault_populates_and_keeps_zeroes() {
    for backing in [Backing::default(), SHARED] {
        let layout = [range(0, 4 * MIB), range(8 * MIB, 48 * MIB)];
        let ram = GuestRam::allocate(backing, &layout).unwrap();
        assert!(ram.populate_unless(|_| false).unwrap());
        assert_eq!(ram.resident(), 44 * MIB);
        assert_eq!(byte(&ram, 4 * MIB - 1), 0);
    }
}

#[test]
fn a_prefault_stops_when_it_is_told_to() {
    let ram = GuestRam::allocate(Backing::default(), &[range(0, 256 * MIB)]).unwrap();
    let asked = AtomicUsize::new(0);
    let stop_at_third = |_| asked.fetch_add(1, Ordering::Relaxed) >= 2;
    assert!(!ram.populate_unless(stop_at_third).unwrap());
    // Others are at work at that moment, each at a step.
    assert!(ram.resident() < 256 * MIB, "{}", ram.resident());
    assert!(!ram.populate_unless(|_| true).unwrap());
    // Asked before each of 16 steps; before the last one at least those are done that no other thread is at.
    let told = AtomicU64::new(0);
    let note = |populated| told.fetch_max(populated, Ordering::Relaxed) > 256 * MIB;
    assert!(ram.populate_unless(note).unwrap());
    let threads = std::thread::available_parallelism().unwrap().get() as u64;
    let least = 256u64.saturating_sub(16 * threads) * MIB;
    let told = told.into_inner();
    assert!((least..256 * MIB).contains(&told), "{told} of {least}");
}

/// Flags of the mapping at `address` (`VmFlags` in proc_pid_smaps(5)).
fn flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some(number(start)?..number(end)?)
    };
    let mut lines = smaps.lines();
    lines
        .find(|line| start(line).is_some_and(|range| range.contains(&address)))
        .expect("the mapping exists");
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    flags
        .unwrap()
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

#[test]
fn transparent_huge_pages_are_turned_on_and_off_as_asked_for() {
    let supported = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
    for thp in [false, true] {
        for shared in [false, true] {
            let backing = Backing {
                thp,
                shared,
                ..Backing::default()
            };
            let (ram, arena) = (range(0, 4 * MIB), range(8 * MIB, 12 * MIB));
            let ram = GuestRam::with_arenas(backing, &[ram], &[arena]).unwrap();
            for region in ram.regions() {
                let flags = flags(region.host);
                let has = |flag: &str| flags.iter().any(|it| it == flag);
                let want = (supported && thp, supported && !thp);
                assert_eq!((has("hg"), has("nh")), want, "{backing:?} {flags:?}");
                assert!(has("dd"), "not in core dumps: {flags:?}");
            }
        }
    }
}

#[test]
fn shared_memory_is_in_files_that_end_where_batches_do() {
    let (ram, arena) = (range(MIB, 700 * MIB), range(1024 * MIB, 1028 * MIB));
    let ram = GuestRam::with_arenas(SHARED, &[ram], &[arena]).unwrap();
    let [shared, private] = ram.regions() else {
        panic!("two regions");
    };
    assert_eq!((shared.file, private.file), (Some(FILE), None));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let files = maps
        .lines()
        .filter(|line| line.contains("/memfd:ebb-guest"))
        .filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let gpa = |text| {
                let address = usize::from_str_radix(text, 16).ok()?;
                Some((address.checked_sub(shared.host)? as u64 + MIB) / MIB)
            };
            Some((gpa(start)?, gpa(end)?))
        })
        .filter(|(start, _)| *start < 700);
    let files: Vec<_> = files.collect();
    assert_eq!(files, [(1, 256), (256, 512), (512, 700)]);
}

#[test]
fn huge_memory_has_bigger_files_and_not_more() {
    for (bytes, size) in [
        (2 * MIB, FILE),
        (1 << 40, FILE),
        ((1 << 40) + 4096, 2 * FILE),
        (64 << 40, 64 * FILE),
        (u64::MAX, 1 << 52),
    ] {
        assert_eq!(file_size(bytes), size, "{bytes:#x}");
        assert!(bytes / size <= MAX_FILES);
    }
}

#[test]
fn handles_that_are_left_keep_the_addresses_but_not_the_pages() {
    let ram = two_regions();
    fill(&ram);
    let (memory, region) = (ram.memory(), ram.regions()[0]);
    let part = memory.iter().next().unwrap().get_mmap();
    drop(ram);
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(0)).unwrap(),
        0,
        "its pages are gone"
    );
    drop(memory);
    assert_eq!(part.size() as u64, region.gpa.len());
}

#[test]
fn a_part_of_a_handle_is_noticed_too() {
    let mut ram = two_regions();
    assert!(ram.release_handle());
    ram = two_regions();
    let collection = GuestMemoryMmap::clone(&ram.memory());
    assert!(!ram.release_handle());
    drop(collection);
    let mut ram = two_regions();
    let region = ram.memory().iter().next().unwrap().get_mmap();
    assert!(!ram.release_handle());
    drop(region);
}

#[test]
fn what_cannot_be_had_is_named_with_a_remedy() {
    let allocate =
        |backing, layout: &[GpaRange]| GuestRam::allocate(backing, layout).unwrap_err().to_string();
    let huge = Backing {
        hugepages: true,
        ..Backing::default()
    };
    let terabytes = range(0, 64 << 40);
    let message = allocate(huge, &[terabytes]);
    assert!(message.contains("33554432 free ones"), "{message}");
    assert!(message.contains("nr_hugepages"), "{message}");
    assert!(allocate(huge, &[range(0, 3 * MIB)]).contains("multiples of 2 MiB"));
    let message = allocate(Backing::default(), &[range(0, 1 << 60)]);
    assert!(message.contains("1152921504606846976 bytes"), "{message}");
    for layout in [
        &[][..],
        &[range(8192, 12288), range(0, 4096)],
        &[range(0, 8192); 2],
    ] {
        assert!(allocate(Backing::default(), layout).contains("disjoint"));
    }
}

#[test]
fn who_waits_for_a_page_server_is_woken_when_it_has_nothing_to_give_any_more() {
    let mut ram = two_regions();
    let runs = [range(2 * MIB, 4 * MIB), range(8 * MIB, 10 * MIB)];
    ram.serve(&runs).unwrap();
    let [low, high] = [0, 1].map(|index: usize| ram.regions()[index].host);
    let served = |address, file_offset| Served {
        address,
        len: 2 * MIB as usize,
        file_offset,
    };
    assert_eq!(
        ram.served(&runs),
        [
            served(low + 2 * MIB as usize, 2 * MIB),
            served(high, 4 * MIB)
        ]
    );
    assert_eq!((byte(&ram, 0), byte(&ram, 12 * MIB)), (0, 0), "not served");
    assert!(!ram.can_mark_free());
    // What was not given yet is content that the host does not hold.
    let first = range(2 * MIB, 2 * MIB + PAGE_SIZE);
    assert_eq!(
        (ram.held(first), ram.held(range(13 * MIB, 14 * MIB))),
        (None, Some(0))
    );
    let (ram, faults) = (&ram, ram.page_faults().unwrap());
    let woken_by = |gpa, act: &dyn Fn()| {
        std::thread::scope(|scope| {
            let waiter = scope.spawn(move || byte(ram, gpa));
            poll(&mut [PollFd::from_borrowed_fd(faults, PollFlags::IN)], None).unwrap();
            act();
            waiter.join().unwrap()
        })
    };
    let release = || {
        ram.release_range(first, Release::Discard).unwrap();
    };
    assert_eq!(woken_by(2 * MIB, &release), 0);
    assert_eq!(woken_by(9 * MIB, &|| ram.stop_serving()), 0);
    assert_eq!(byte(ram, 3 * MIB), 0, "nobody is asked");
}
