//! A guest's memory made by hand: page tables, sections and descriptors, for the note of a real kernel.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_core::range::GpaRange;

use crate::guest_kernel::ReadGuest;

/// The notes of Debian's cloud kernels: of 6.1 (with KASLR, the kernel moved down: `phys_base` is negative), and of 6.12.
pub const NOTE_6_1: &str = include_str!("note-6.1.txt");
pub const NOTE_6_12: &str = include_str!("note-6.12.txt");

pub const PAGE: u64 = 4096;
pub const RAM: u64 = 2 << 30;
/// Where the note is.
pub const NOTE: u64 = 0x11f_8000;
const ROOTS: u64 = 0x100_0000;
const SECTIONS: u64 = 0x100_1000;
const TABLES: u64 = 0x101_0000;
/// Descriptors of all RAM: 32 MiB, at 1 GiB.
const DESCRIPTORS: u64 = 1 << 30;
const VMEMMAP: u64 = 0xffff_f385_c000_0000;
const SECTIONS_VA: u64 = 0xffff_8a7f_9000_1000;

/// Size of what an entry of the page tables maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaf {
    Kib4,
    Mib2,
    Gib1,
}

impl Leaf {
    fn level(self) -> u32 {
        self as u32
    }

    fn len(self) -> u64 {
        PAGE << (9 * self.level())
    }
}

/// RAM of 2 GiB. What was not written reads 0.
#[derive(Default)]
pub struct Memory {
    pub words: HashMap<u64, u64>,
    pub loads: AtomicU64,
}

impl Memory {
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        assert_eq!(gpa % 8, 0);
        for (index, bytes) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.words
                .insert(gpa + 8 * index as u64, u64::from_le_bytes(word));
        }
    }

    pub fn set(&mut self, gpa: u64, word: u64) {
        self.write(gpa, &word.to_le_bytes());
    }

    /// The loads since the last call.
    pub fn loads(&self) -> u64 {
        self.loads.swap(0, Ordering::Relaxed)
    }
}

impl ReadGuest for Memory {
    fn load(&self, gpa: u64) -> Option<u64> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        let is_there = gpa < RAM && gpa.is_multiple_of(8);
        is_there.then(|| self.words.get(&gpa).copied().unwrap_or(untouched(gpa)))
    }
}

/// A word that nobody has written: 0, but a page that is in use and not mapped has the type -1, and one user.
fn untouched(gpa: u64) -> u64 {
    let is_type = gpa >= DESCRIPTORS && gpa % 64 == 48;
    if is_type { 0x1_ffff_ffff } else { 0 }
}

/// A machine whose kernel has written a note.
pub struct Machine {
    pub memory: Memory,
    pub text: String,
    root: u64,
    levels: u32,
    encrypted: u64,
    next_table: u64,
}

impl Machine {
    /// All RAM is there and in use. Descriptors are mapped by entries of size `leaf`.
    pub fn new(text: &str, leaf: Leaf) -> Self {
        let mut machine = Self {
            memory: Memory::default(),
            text: text.into(),
            root: 0,
            levels: 4,
            encrypted: 0,
            next_table: TABLES,
        };
        machine.root = machine.image("init_top_pgt");
        machine.levels += machine.number("NUMBER(pgtable_l5_enabled)") as u32;
        machine.encrypted = machine.number("NUMBER(sme_mask)") as u64;
        machine.write_note();
        machine.write_names();
        machine.map_all(leaf);
        machine
    }

    /// The 6.12 kernel with 2 MiB entries.
    pub fn stock() -> Self {
        Self::new(NOTE_6_12, Leaf::Mib2)
    }

    pub fn note(&self) -> GpaRange {
        range(NOTE, 2 * PAGE)
    }

    fn value(&self, key: &str) -> &str {
        let line = self.text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().strip_prefix('=').unwrap()
    }

    fn number(&self, key: &str) -> i64 {
        self.value(key).parse().unwrap()
    }

    fn symbol(&self, name: &str) -> u64 {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})")), 16).unwrap()
    }

    /// Guest-physical address of a symbol of the kernel's image.
    pub fn image(&self, name: &str) -> u64 {
        let offset = self.symbol(name) - 0xffff_ffff_8000_0000;
        offset.wrapping_add_signed(self.number("NUMBER(phys_base)"))
    }

    pub fn root(&self) -> u64 {
        self.root
    }

    pub fn write_note(&mut self) {
        let mut note = Vec::new();
        for word in [11, self.text.len() as u32, 0] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"VMCOREINFO\0\0");
        note.extend(self.text.bytes());
        self.memory.write(NOTE, &note);
    }

    fn write_names(&mut self) {
        let mut names = vec![0; 6 * 65 + 8];
        let release = self.value("OSRELEASE").to_owned();
        for (index, name) in [
            "Linux",
            "debian",
            &release,
            "#1 SMP Debian",
            "x86_64",
            "(none)",
        ]
        .into_iter()
        .enumerate()
        {
            names[65 * index..][..name.len()].copy_from_slice(name.as_bytes());
        }
        let at = self.image("init_uts_ns");
        self.memory.write(at, &names);
    }

    fn map_all(&mut self, leaf: Leaf) {
        let (uts_va, uts) = (self.symbol("init_uts_ns"), self.image("init_uts_ns"));
        self.map(uts_va & !0x1f_ffff, uts & !0x1f_ffff, Leaf::Mib2);
        let roots_va = self.symbol("mem_section");
        self.map(roots_va & !0xfff, ROOTS, Leaf::Kib4);
        self.map(SECTIONS_VA, SECTIONS, Leaf::Kib4);
        self.memory.set(ROOTS + roots_va % PAGE, SECTIONS_VA);
        for section in 0..RAM >> 27 {
            self.set_section(section, VMEMMAP | 0b1111);
        }
        let all = DESCRIPTORS..DESCRIPTORS + (RAM / PAGE * 64).max(leaf.len());
        for gpa in all.step_by(leaf.len() as usize) {
            self.map(VMEMMAP + (gpa - DESCRIPTORS), gpa, leaf);
        }
    }

    /// The word `section_mem_map` of a section.
    pub fn set_section(&mut self, section: u64, word: u64) {
        self.memory.set(SECTIONS + section * 16, word);
    }

    /// Guest-physical address of the entry that maps `va` by a leaf, making the tables above it.
    pub fn entry(&mut self, va: u64, leaf: Leaf) -> u64 {
        let mut table = self.root();
        for level in (0..self.levels).rev() {
            let at = table + (va >> (12 + 9 * level)) % 512 * 8;
            if level == leaf.level() {
                return at;
            }
            let entry = self.memory.words.get(&at).copied().unwrap_or(0);
            table = entry & 0x000f_ffff_ffff_f000 & !self.encrypted;
            if entry == 0 {
                table = self.next_table;
                self.next_table += PAGE;
                self.memory.set(at, table | self.encrypted | 0x63);
            }
        }
        unreachable!("a leaf has a level");
    }

    /// Maps one leaf. Its entry has bits that are no address: no-execute, dirty, accessed, global.
    pub fn map(&mut self, va: u64, gpa: u64, leaf: Leaf) {
        let large = if leaf == Leaf::Kib4 { 0 } else { 0x80 };
        let at = self.entry(va, leaf);
        self.memory
            .set(at, gpa | self.encrypted | 1 << 63 | 0x163 | large);
    }

    /// The entry that maps the descriptor of `page`.
    pub fn descriptor_entry(&mut self, page: u64, leaf: Leaf) -> u64 {
        self.entry(VMEMMAP + page * 64, leaf)
    }

    /// Makes `page` the head of a free block, the only one on its list.
    pub fn free(&mut self, page: u64, order: u64) {
        let word = self.number("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)") as u32;
        let entry = VMEMMAP + page * 64 + 8;
        self.link(page, entry, entry);
        self.describe(page, word, order);
    }

    /// `page` is in use again. The order is left there.
    pub fn allocate(&mut self, page: u64) {
        let order = self.memory.words[&(DESCRIPTORS + page * 64 + 40)];
        self.link(page, 0xdead_0000_0000_0100, 0xdead_0000_0000_0122);
        self.describe(page, u32::MAX, order);
    }

    /// The next and the previous entry in the list that `page` is on.
    pub fn link(&mut self, page: u64, next: u64, prev: u64) {
        let at = DESCRIPTORS + page * 64 + 8;
        self.memory.set(at, next);
        self.memory.set(at + 8, prev);
    }

    pub fn describe(&mut self, page: u64, page_type: u32, private: u64) {
        let at = DESCRIPTORS + page * 64;
        self.memory.set(at + 48, u64::from(page_type));
        self.memory.set(at + 40, private);
    }
}

pub fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(start, start + len).unwrap()
}

/// `count` pages from page `first` on.
pub fn pages(first: u64, count: u64) -> GpaRange {
    range(first * PAGE, count * PAGE)
}
