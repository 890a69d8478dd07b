//! What is read of a guest's kernel: real notes, tables made by hand.

mod hostile;
mod known;
mod layouts;
pub mod machine;
mod notes;

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use machine::{Leaf, Machine, Memory, NOTE_6_1, NOTE_6_12, PAGE, RAM, pages, range};

/// Pages of a block of 2 MiB.
const BLOCK: u64 = 512;

fn accept(machine: &Machine) -> GuestKernel {
    GuestKernel::accept(&machine.memory, machine.note()).unwrap()
}

/// All that is free in `within`, at `order`.
fn find(kernel: &GuestKernel, memory: &Memory, within: GpaRange, order: u32) -> Vec<GpaRange> {
    let (mut found, mut at) = (Vec::new(), within.start());
    while let Some(rest) = GpaRange::new(at, within.end()) {
        let end = kernel.find_free(memory, rest, order, &mut found);
        assert!(at < end && end <= within.end());
        at = end;
    }
    found
}

#[test]
fn real_notes_are_accepted() {
    for (text, release) in [
        (NOTE_6_1, "6.1.0-53-cloud-amd64"),
        (NOTE_6_12, "6.12.117+deb12-cloud-amd64"),
    ] {
        let machine = Machine::new(text, Leaf::Mib2);
        let kernel = accept(&machine);
        assert_eq!(kernel.release(), release);
        assert!(kernel.is_unchanged(&machine.memory));
    }
}

#[test]
fn free_blocks_are_found_at_their_order() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    machine.free(4 * BLOCK, 9);
    machine.free(6 * BLOCK, 10);
    machine.free(8 * BLOCK + 16, 4);
    machine.free(9 * BLOCK, 8);
    machine.free(40 * BLOCK, 10);
    let all = range(0, RAM);
    let blocks = [
        pages(4 * BLOCK, BLOCK),
        pages(6 * BLOCK, 2 * BLOCK),
        pages(40 * BLOCK, 2 * BLOCK),
    ];
    assert_eq!(find(&kernel, &machine.memory, all, 9), blocks);
    assert_eq!(find(&kernel, &machine.memory, all, 10), blocks[1..]);
    assert_eq!(find(&kernel, &machine.memory, all, 11), []);
    let pieces = find(&kernel, &machine.memory, all, 4);
    let small = [pages(8 * BLOCK + 16, 16), pages(9 * BLOCK, 256)];
    assert_eq!(
        pieces,
        [blocks[0], blocks[1], small[0], small[1], blocks[2]]
    );
    for piece in pieces {
        assert!(kernel.is_free(&machine.memory, piece), "{piece:?}");
    }
}

#[test]
fn a_range_is_free_only_if_one_block_has_all_of_it() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    machine.free(4 * BLOCK, 10);
    let is_free =
        |machine: &Machine, first, count| kernel.is_free(&machine.memory, pages(first, count));
    for (first, count) in [
        (4 * BLOCK, 1),
        (4 * BLOCK, 1024),
        (5 * BLOCK, BLOCK),
        (5 * BLOCK + 511, 1),
        (4 * BLOCK + 7, 900),
    ] {
        assert!(is_free(&machine, first, count), "{first}, {count}");
    }
    // Beyond its end; before its head; both.
    for (first, count) in [
        (5 * BLOCK, BLOCK + 1),
        (6 * BLOCK, 1),
        (4 * BLOCK - 1, 1),
        (4 * BLOCK - 1, 1026),
    ] {
        assert!(!is_free(&machine, first, count), "{first}, {count}");
    }
    // The head is handed out at a lower order: the kernel marks what is left.
    machine.allocate(4 * BLOCK);
    machine.free(4 * BLOCK + 16, 4);
    machine.free(5 * BLOCK, 9);
    assert!(!is_free(&machine, 4 * BLOCK, BLOCK));
    assert!(!is_free(&machine, 4 * BLOCK + 16, 32));
    assert!(is_free(&machine, 4 * BLOCK + 16, 16));
    assert!(is_free(&machine, 5 * BLOCK, BLOCK));
}

/// Sections have 64 blocks. One is not in use, whatever its descriptors say.
#[test]
fn one_reader_tells_of_all_sections_and_walks_the_tables_once() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    for block in [4, 5, 70, 140] {
        machine.free(block * BLOCK, 9);
    }
    machine.set_section(1, 0);
    let mut reader = kernel.reader(&machine.memory);
    machine.memory.loads();
    let mut look = |block: u64| {
        let is_free = reader.is_free(pages(block * BLOCK, BLOCK));
        (is_free, machine.memory.loads())
    };
    let (is_free, first) = look(4);
    assert!(is_free);
    let (is_free, second) = look(5);
    // Its type, its order, and both directions of its link.
    assert!(
        is_free && second == 4 && second < first,
        "{first}, {second}"
    );
    for (block, is_free) in [(70, false), (140, true), (70, false), (4, true), (6, false)] {
        assert_eq!(look(block).0, is_free, "block {block}");
    }
}

#[test]
fn a_block_counts_once_it_is_on_a_list() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    // A vCPU stands between mark and order: the mark of a page beside the order that its last user left.
    machine.free(4 * BLOCK, 9);
    machine.allocate(4 * BLOCK);
    machine.describe(4 * BLOCK, 0xf000_0000, 9);
    let block = pages(4 * BLOCK, BLOCK);
    assert_eq!(
        find(&kernel, &machine.memory, range(0, RAM), 9),
        [block],
        "a candidate"
    );
    assert!(!kernel.is_free(&machine.memory, block));
    // The neighbours on the list are other blocks; one does not point back.
    let entry = |page: u64| 0xffff_f385_c000_0000 + page * 64 + 8;
    machine.link(4 * BLOCK, entry(6 * BLOCK), entry(8 * BLOCK));
    for (prev, is_free) in [
        (entry(4 * BLOCK), true),
        (entry(4 * BLOCK) - 8, false),
        (0, false),
    ] {
        machine.link(6 * BLOCK, 0, prev);
        assert_eq!(kernel.is_free(&machine.memory, block), is_free);
    }
    // A list that leads out of all memory.
    for next in [0, u64::MAX, u64::MAX - 7, entry(6 * BLOCK) + 4] {
        machine.link(4 * BLOCK, next, next);
        assert!(!kernel.is_free(&machine.memory, block));
    }
}

#[test]
fn a_head_that_contradicts_itself_is_not_free() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    // Larger than the largest block; not a multiple of its size; sizes whose shift overflows.
    for (page, order) in [
        (0, 11),
        (5 * BLOCK, 10),
        (8 * BLOCK, 64),
        (16 * BLOCK, u64::MAX),
        (32 * BLOCK, 1 << 32 | 9),
    ] {
        machine.free(page, order);
        assert!(
            !kernel.is_free(&machine.memory, pages(page, 1)),
            "{page}, {order}"
        );
    }
    assert_eq!(find(&kernel, &machine.memory, range(0, RAM), 9), []);
}

#[test]
fn what_is_found_begins_and_ends_in_the_range() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    for head in (0..64).step_by(2) {
        machine.free(head * BLOCK, 10);
    }
    let cut = find(&kernel, &machine.memory, pages(3 * BLOCK + 1, 5 * BLOCK), 9);
    assert_eq!(
        cut,
        [pages(4 * BLOCK, 4 * BLOCK)],
        "a head before the range counts"
    );
    let cut = find(
        &kernel,
        &machine.memory,
        pages(3 * BLOCK + 1, 2 * BLOCK + 32),
        5,
    );
    assert_eq!(cut, [pages(3 * BLOCK + 32, 2 * BLOCK)]);
    assert_eq!(find(&kernel, &machine.memory, pages(3, 1), 9), []);
    // 128 MiB are one call's work, and the longest piece.
    machine.free(64 * BLOCK, 10);
    let found = find(&kernel, &machine.memory, range(0, RAM), 9);
    assert_eq!(found, [range(0, 128 << 20), range(128 << 20, 4 << 20)]);
}

#[test]
fn all_sizes_of_tables_and_marks_are_read() {
    let five = NOTE_6_12.replace("pgtable_l5_enabled)=0", "pgtable_l5_enabled)=1");
    let five = five.replace("MAX_PHYSMEM_BITS)=46", "MAX_PHYSMEM_BITS)=52");
    let five = five.replace("LENGTH(mem_section)=2048", "LENGTH(mem_section)=131072");
    let encrypted = NOTE_6_12.replace("sme_mask)=0", &format!("sme_mask)={}", 1u64 << 47));
    let mark = |word: &str| {
        NOTE_6_12.replace(
            "BUDDY_MAPCOUNT_VALUE)=-268435456",
            &format!("BUDDY_MAPCOUNT_VALUE)={word}"),
        )
    };
    let texts = [
        NOTE_6_1.into(),
        NOTE_6_12.into(),
        five,
        encrypted,
        mark("3221225471"),
        mark("-1073741825"),
        mark("4026531840"),
    ];
    for (text, leaf) in texts
        .iter()
        .flat_map(|text| [Leaf::Kib4, Leaf::Mib2, Leaf::Gib1].map(|leaf| (text, leaf)))
    {
        let mut machine = Machine::new(text, leaf);
        let kernel = accept(&machine);
        machine.free(7 * BLOCK, 9);
        machine.free(RAM / PAGE - BLOCK, 9);
        let found = find(&kernel, &machine.memory, range(0, RAM), 9);
        assert_eq!(
            found,
            [pages(7 * BLOCK, BLOCK), pages(RAM / PAGE - BLOCK, BLOCK)],
            "{leaf:?}"
        );
    }
}

#[test]
fn other_types_of_pages_are_not_free() {
    for text in [NOTE_6_1, NOTE_6_12] {
        let mut machine = Machine::new(text, Leaf::Mib2);
        let kernel = accept(&machine);
        // Mapped once; slab, offline and page tables of both encodings; a type with something in its lower half.
        for word in [
            0,
            0xffff_efff,
            0xffff_feff,
            0xffff_fdff,
            0xf500_0000,
            0xf100_0000,
            0xf200_0000,
            0x0000_00f0,
            0xf0ff_ffff,
        ] {
            machine.describe(7 * BLOCK, word, 9);
            assert!(
                !kernel.is_free(&machine.memory, pages(7 * BLOCK, 1)),
                "{word:#x}"
            );
        }
    }
}

#[test]
fn sections_that_are_not_there_have_no_free_pages() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    let page = 3 << 15;
    machine.free(page, 10);
    assert!(kernel.is_free(&machine.memory, pages(page, 1024)));
    // Without a memory map; not present; offline; a map in user space, and where nothing is mapped.
    let map = 0xffff_f385_c000_0000u64;
    for word in [
        map | 0b1101,
        map | 0b1110,
        map | 0b1011,
        0,
        0b111,
        0x7000_0000_0111,
        0xffff_ffff_ffff_f007,
    ] {
        machine.set_section(3, word);
        assert!(
            !kernel.is_free(&machine.memory, pages(page, 1)),
            "{word:#x}"
        );
        assert_eq!(find(&kernel, &machine.memory, range(0, RAM), 9), []);
    }
    // No root has this section; nor does arithmetic overflow at the end of the address space.
    for gpa in [1 << 46, 1 << 62, u64::MAX - 0x1fff] {
        assert!(!kernel.is_free(&machine.memory, range(gpa, PAGE)));
        assert_eq!(
            kernel.find_free(&machine.memory, range(gpa, PAGE), 0, &mut Vec::new()),
            gpa + PAGE
        );
    }
}

#[test]
fn descriptors_that_are_not_mapped_are_not_free() {
    for leaf in [Leaf::Kib4, Leaf::Mib2] {
        let mut machine = Machine::new(NOTE_6_12, leaf);
        let kernel = accept(&machine);
        machine.free(7 * BLOCK, 9);
        let entry = machine.descriptor_entry(7 * BLOCK, leaf);
        let word = machine.memory.words[&entry];
        // Not present; outside RAM; at the end of physical memory.
        for bad in [word & !1, word | 1 << 40, word | 0x000f_ffff_ffe0_0000] {
            machine.memory.set(entry, bad);
            assert!(
                !kernel.is_free(&machine.memory, pages(7 * BLOCK, 1)),
                "{bad:#x}"
            );
        }
        machine.memory.set(entry, word);
        assert!(kernel.is_free(&machine.memory, pages(7 * BLOCK, 1)));
    }
}

#[test]
fn another_kernel_is_noticed() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    let uts = machine.image("init_uts_ns");
    let entry = machine.entry(0xffff_ffff_a4c0_0000, Leaf::Mib2);
    // Of the release, of the version, of the entry that maps both.
    for gpa in [uts + 136, uts + 200, entry] {
        let word = machine.memory.words[&gpa];
        machine.memory.set(gpa, word ^ 1 << 21);
        assert!(!kernel.is_unchanged(&machine.memory), "{gpa:#x}");
        machine.memory.set(gpa, word);
        assert!(kernel.is_unchanged(&machine.memory));
    }
    // The host's name may change.
    machine.memory.set(uts + 72, 0);
    assert!(kernel.is_unchanged(&machine.memory));
}

#[test]
fn a_page_with_the_pattern_is_poisoned() {
    let mut machine = Machine::stock();
    for gpa in [0x20_0000, 0x20_0ff8, 0x3f_f000, 0x3f_fff8] {
        assert!(!is_poisoned(&machine.memory, range(0x20_0000, 0x20_0000)));
        machine.memory.set(gpa, 0xaaaa_aaaa_aaaa_aaaa);
    }
    assert!(is_poisoned(&machine.memory, range(0x20_0000, 0x20_0000)));
}

#[test]
fn the_first_free_block_says_whether_the_kernel_poisons() {
    let mut machine = Machine::stock();
    let block = pages(512, 512);
    let (kernel, poisoning) = (accept(&machine), accept(&machine));
    assert!(!kernel.poisons(&machine.memory, block));
    for gpa in [0x20_0000, 0x20_0ff8, 0x3f_f000, 0x3f_fff8] {
        machine.memory.set(gpa, 0xaaaa_aaaa_aaaa_aaaa);
    }
    assert!(!kernel.poisons(&machine.memory, block), "a program's data");
    assert!(poisoning.poisons(&machine.memory, block));
}

#[test]
fn candidates_of_a_guest_cost_few_loads() {
    let mut machine = Machine::stock();
    let kernel = accept(&machine);
    // Every second block of 2 MiB is free: the most that there is to look at.
    for block in (0..512).step_by(2) {
        machine.free(block * BLOCK, 9);
    }
    machine.memory.loads();
    assert_eq!(
        find(&kernel, &machine.memory, range(0, 1 << 30), 9).len(),
        256
    );
    // A word for each block, and the order for each free one; for 128 MiB the section (two walks and words) and a walk.
    assert!(machine.memory.loads() <= 512 + 256 + 8 * (3 * 4 + 2));
    assert!(kernel.is_free(&machine.memory, pages(2 * BLOCK, BLOCK)));
    assert!(machine.memory.loads() <= 3 * 4 + 2 + 2 + 2);
}
