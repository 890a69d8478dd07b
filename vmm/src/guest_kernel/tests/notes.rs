//! Notes that are wrong, or that memory contradicts.

use super::*;
use crate::guest_kernel::note::text_len;

/// The kernel with `text` for its note, in the memory of the stock machine.
fn offer(text: &str) -> Result<GuestKernel, String> {
    let mut machine = Machine::stock();
    machine.text = text.into();
    machine.write_note();
    GuestKernel::accept(&machine.memory, machine.note()).map_err(|BadNote(message)| message)
}

#[test]
fn each_mistake_is_named_with_key_and_value() {
    for (key, value) in [
        ("OSRELEASE", "6.12\u{7f}"),
        ("OSRELEASE", ""),
        ("PAGESIZE", "16384"),
        ("SYMBOL(init_uts_ns)", "ffffffff7fffffff"),
        ("SYMBOL(init_uts_ns)", "-1"),
        ("SYMBOL(init_top_pgt)", "ffffffffc0000000"),
        ("SYMBOL(init_top_pgt)", "xyz"),
        ("OFFSET(uts_namespace.name)", "-8"),
        ("NUMBER(phys_base)", "seven"),
        ("NUMBER(phys_base)", "9223372036854775808"),
        ("NUMBER(KERNEL_IMAGE_SIZE)", "2147483648"),
        ("NUMBER(pgtable_l5_enabled)", "2"),
        ("NUMBER(sme_mask)", "4096"),
        ("NUMBER(sme_mask)", "0x3000000000000"),
        ("SYMBOL(mem_section)", ""),
        ("LENGTH(mem_section)", "2049"),
        ("SIZE(mem_section)", "24"),
        ("OFFSET(mem_section.section_mem_map)", "16"),
        ("NUMBER(SECTION_SIZE_BITS)", "30"),
        ("NUMBER(MAX_PHYSMEM_BITS)", "64"),
        ("SIZE(page)", "60"),
        ("SIZE(page)", "9223372036854775800"),
        ("OFFSET(page._mapcount)", "62"),
        ("OFFSET(page._mapcount)", "9223372036854775804"),
        ("OFFSET(page.private)", "44"),
        ("OFFSET(page.lru)", "56"),
        ("LENGTH(zone.free_area)", "0"),
        ("LENGTH(zone.free_area)", "17"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "-1"),
    ] {
        let is_it = |line: &&str| line.starts_with(&format!("{key}="));
        let line = NOTE_6_12.lines().find(is_it).unwrap();
        let error = offer(&NOTE_6_12.replace(line, &format!("{key}={value}"))).unwrap_err();
        let named = format!("{key}={} is", value.escape_debug());
        assert!(error.starts_with(&named), "{named}: {error}");
        let error = offer(&NOTE_6_12.replace(line, "")).unwrap_err();
        assert_eq!(error, format!("{key} is missing"));
    }
}

#[test]
fn a_message_shows_little_of_a_long_value() {
    let text = NOTE_6_12.replace(
        "PAGESIZE=4096",
        &format!("PAGESIZE=\x1b{}", "9".repeat(9000)),
    );
    let mut machine = Machine::stock();
    machine.text = text;
    machine.write_note();
    let note = range(machine.note().start(), 16 * PAGE);
    let BadNote(error) = GuestKernel::accept(&machine.memory, note).unwrap_err();
    assert_eq!(
        error,
        format!("PAGESIZE=\\u{{1b}}{} is not a number", "9".repeat(39))
    );
}

#[test]
fn what_is_no_note_is_refused() {
    let mut machine = Machine::stock();
    let start = machine.note().start();
    let accept = |machine: &Machine, pages| {
        let note = range(start, pages * PAGE);
        GuestKernel::accept(&machine.memory, note).map_err(|BadNote(message)| message)
    };
    assert!(text_len(&machine.memory, start).is_some() && accept(&machine, 1).is_ok());
    let sizes = machine.memory.words[&start];
    // Another length of the name; no text; a text larger than the range; one larger than any.
    for (word, is) in [
        (sizes - 1, false),
        (11, false),
        (11 | 4073 << 32, true),
        (11 | 65537 << 32, false),
    ] {
        machine.memory.set(start, word);
        assert_eq!(text_len(&machine.memory, start).is_some(), is, "{word:#x}");
        assert!(accept(&machine, 1).is_err());
    }
    machine.memory.set(start, sizes);
    machine.memory.set(start + 16, 0);
    assert!(text_len(&machine.memory, start).is_none() && accept(&machine, 1).is_err());
    // At the end of RAM, and of all addresses.
    for gpa in [RAM - PAGE, RAM, u64::MAX - 0xfff, u64::MAX - 7, 12] {
        assert!(text_len(&machine.memory, gpa).is_none());
    }
}

#[test]
fn a_note_that_memory_contradicts_is_refused() {
    let refused = |change: &dyn Fn(&mut Machine)| {
        let mut machine = Machine::stock();
        change(&mut machine);
        GuestKernel::accept(&machine.memory, machine.note())
            .unwrap_err()
            .0
    };
    let page = Machine::stock().note().start() / PAGE;
    let error = refused(&|machine| machine.memory.set(machine.root() + 511 * 8, 0));
    assert!(error.contains("do not map init_uts_ns"), "{error}");
    let error = refused(&|machine| machine.memory.set(machine.image("init_uts_ns") + 136, 0));
    assert!(error.contains("OSRELEASE is not"), "{error}");
    let error = refused(&|machine| machine.set_section(0, 0));
    assert!(error.contains("section"), "{error}");
    let entry = |machine: &mut Machine| machine.descriptor_entry(page, Leaf::Mib2);
    let error = refused(&|machine| {
        let entry = entry(machine);
        machine.memory.set(entry, 0);
    });
    assert!(error.contains("no descriptor"), "{error}");
    for (head, order) in [(page, 0), (page - page % 512, 9)] {
        let error = refused(&|machine| machine.free(head, order));
        assert!(error.contains("described as free"), "{error}");
    }
}
