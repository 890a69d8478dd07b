//! The free lists of the guest's kernel: which pages it says are free, read from its own tables.
//!
//! Linux describes its data structures in the *vmcoreinfo note*, made for crash dumps (Linux,
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`). With it this module finds the descriptor of a page (`struct page`)
//! in guest memory. A page whose descriptor says *buddy*, at an order that covers it, is free: its content is dead, because
//! the kernel removes the mark before it hands the page out, and sets it after the last use.
//!
//! ```text
//! note.rs    the note's text            -> where the tables are, and the layout of what they hold
//! walk.rs    init_top_pgt               -> guest-physical address of a kernel address
//! pages.rs   mem_section -> struct page -> "page 0x1a2000 is the head of a free block of 2^9 pages"
//! known.rs   which kernel counts, or why none does
//! ```
//!
//! **When that holds:** only at a moment when every vCPU is out of the guest, and only for the kernel whose note was
//! accepted. Reading at other times gives candidates: [`GuestKernel::find_free`] while the guest runs,
//! [`GuestKernel::is_free`] once it stands still. A note says nothing about kernels that came later. The memory of a kernel
//! that kexec has left may look as it did, so [`GuestKernel::is_unchanged`] alone is no proof; [`KnownKernel::forget`] is
//! for that.
//!
//! **When a note can be there:** Linux writes it in an initcall (`crash_save_vmcoreinfo_init`). All descriptors are
//! initialised by then, deferred ones too (`page_alloc_init_late` runs before `do_basic_setup`). So no kernel has a note
//! while its descriptors still hold what was in memory before.
//!
//! **Trust:** nothing is written, and nothing read here is trusted. A guest that lies loses its own data. Every word is
//! loaded through [`ReadGuest`], which knows RAM from everything else, and each call loads a number of words that depends
//! on its arguments only: no loop goes on because of what the guest says. Nothing read is kept from one call to the next but
//! the note, and whether the kernel poisons free pages.
//!
//! **Kernels that look at free pages:** with `page_poison=1` Linux fills pages with a pattern when it frees them, and
//! complains if the pattern has changed when it allocates them; a page that was discarded reads zero. See
//! [`GuestKernel::poisons`]. `init_on_free=1` expects zeros, which is what a discarded page has. KASAN and KMSAN keep what
//! they know of a page in shadow memory, which is in use and never free; they do not read the content of free pages. The note
//! does not say which of these a kernel has.

mod known;
mod note;
mod pages;
mod ram;
#[cfg(test)]
pub(crate) mod tests;
mod walk;

use std::sync::OnceLock;

use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

pub use known::{FreePagesState, KernelState, KnownKernel, Lost, NoteSource};

use note::{Note, bad};
use pages::{Descriptors, Layout, SECTION_BITS};
use walk::{Tables, Walker};

/// One call of [`GuestKernel::find_free`] looks at one section of the kernel's at most.
const SECTION: u64 = 1 << SECTION_BITS;
/// Where x86-64 maps the kernel's image (`__START_KERNEL_map`).
const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;
/// `struct new_utsname`: strings of 65 bytes, the third is the release, the fourth the version (Linux,
/// `include/uapi/linux/utsname.h`).
const UTS_LEN: usize = 65;
const RELEASE: u64 = 2 * UTS_LEN as u64;
/// What page poisoning fills free pages with (`PAGE_POISON` in Linux, `include/linux/poison.h`), 8 bytes of it.
const POISON: u64 = 0xaaaa_aaaa_aaaa_aaaa;

/// Guest memory, as the guest kernel's tables are read: one aligned word at a time.
pub trait ReadGuest: Send + Sync {
    /// Loads the 8 bytes at `gpa` at once, little-endian. `None` if `gpa` is not a multiple of 8, or is not in RAM.
    fn load(&self, gpa: u64) -> Option<u64>;
}

/// A note that cannot be used. The message is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadNote(pub String);

/// A guest kernel whose note was accepted: where its page descriptors are, and how they are read.
#[derive(Debug)]
pub struct GuestKernel {
    release: String,
    tables: Tables,
    layout: Layout,
    /// Kernel address and guest-physical address of the kernel's release string.
    uts: (u64, u64),
    /// What was there when the note was accepted: release and version ("#1 SMP …").
    names: Vec<u8>,
    poisons: OnceLock<bool>,
}

impl GuestKernel {
    /// Reads and checks the note that begins `note`, and that the tables that it names are there.
    ///
    /// # Errors
    /// [`BadNote`] says what is missing or wrong.
    pub fn accept(memory: &dyn ReadGuest, note: GpaRange) -> Result<Self, BadNote> {
        let text = Note::read(memory, note)?;
        let kernel = Self::from_note(memory, &text)?;
        kernel.check_tables(memory, note.start() / PAGE_SIZE)?;
        Ok(kernel)
    }

    fn from_note(memory: &dyn ReadGuest, note: &Note) -> Result<Self, BadNote> {
        note.checked("PAGESIZE", "is not 4096", |size| size == PAGE_SIZE)?;
        let release = note.value("OSRELEASE")?;
        if !(1..UTS_LEN).contains(&release.len())
            || !release.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(bad("OSRELEASE", release, "is not a release"));
        }
        let image = Image::of(note)?;
        let name = note.checked("OFFSET(uts_namespace.name)", "is no offset", |offset| {
            offset < PAGE_SIZE
        })?;
        let uts = image.locate(note, "init_uts_ns")?;
        let uts = (
            uts.0.wrapping_add(name + RELEASE),
            uts.1.wrapping_add(name + RELEASE),
        );
        let names = note::copy(memory, uts.1, 2 * UTS_LEN)
            .ok_or_else(|| BadNote(format!("init_uts_ns would be at {:#x}, outside RAM", uts.1)))?;
        Ok(Self {
            release: release.to_owned(),
            tables: Tables {
                root: image.locate(note, "init_top_pgt")?.1,
                levels: 4 + note
                    .checked("NUMBER(pgtable_l5_enabled)", "is not 0 or 1", |on| on <= 1)?
                    as u32,
                encrypted: note.checked(
                    "NUMBER(sme_mask)",
                    "is not one bit above all RAM",
                    |mask| {
                        mask == 0 || mask.is_power_of_two() && (1 << 36..1 << 52).contains(&mask)
                    },
                )?,
            },
            layout: Layout::of(note)?,
            uts,
            names,
            poisons: OnceLock::new(),
        })
    }

    /// Checks the note against memory; `page` is the note's first one.
    fn check_tables(&self, memory: &dyn ReadGuest, page: u64) -> Result<(), BadNote> {
        let check = |holds: bool, otherwise: &str| match holds {
            true => Ok(()),
            false => Err(BadNote(otherwise.into())),
        };
        let is_page = self.tables.root.is_multiple_of(PAGE_SIZE);
        check(is_page, "init_top_pgt is not at the start of a page")?;
        let release = self.names.split(|&byte| byte == 0).next();
        let is_release = release == Some(self.release.as_bytes());
        check(is_release, "OSRELEASE is not the release in init_uts_ns")?;
        let is_mapped = self.is_unchanged(memory);
        check(
            is_mapped,
            "the tables at init_top_pgt do not map init_uts_ns",
        )?;
        let descriptors = self.descriptors(memory, page);
        let no_section = || BadNote("mem_section does not have the note's own section".into());
        let mut descriptors = descriptors.ok_or_else(no_section)?;
        let is_described = descriptors.page_type(page).is_some();
        check(is_described, "the note's own page has no descriptor in RAM")?;
        let is_in_use = descriptors.block_over(page, page + 1).is_none();
        check(is_in_use, "the note's own page is described as free")
    }

    /// The kernel's release, as `uname -r` prints it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Returns true if the kernel in memory still has the release and the version that it had when the note was accepted,
    /// and its page tables still lead there. A kernel that was left may pass: what it wrote stays until somebody overwrites it.
    #[must_use]
    pub fn is_unchanged(&self, memory: &dyn ReadGuest) -> bool {
        let (va, gpa) = self.uts;
        Walker::new(memory, self.tables).translate(va) == Some(gpa)
            && note::copy(memory, gpa, self.names.len()).as_ref() == Some(&self.names)
    }

    /// Returns true if all of `range` is free: it lies in one free block of the buddy allocator.
    #[must_use]
    pub fn is_free(&self, memory: &dyn ReadGuest, range: GpaRange) -> bool {
        self.reader(memory).is_free(range)
    }

    /// For many ranges while no vCPU changes the guest's tables: they are not walked for each range.
    #[must_use]
    pub const fn reader<'a>(&'a self, memory: &'a dyn ReadGuest) -> FreeReader<'a> {
        FreeReader {
            kernel: self,
            memory,
            section: None,
        }
    }

    /// Returns true if this kernel fills free pages with a pattern and checks it (`page_poison=1`); `free` is free. The first
    /// call decides: with poisoning every free page has the pattern from boot on, and poisoning is not switched on later.
    #[must_use]
    pub fn poisons(&self, memory: &dyn ReadGuest, free: GpaRange) -> bool {
        *self.poisons.get_or_init(|| is_poisoned(memory, free))
    }

    /// Looks for free memory in `within`, at most at 128 MiB of it: appends free pieces to `found`, ascending, each at least
    /// `2^order` pages long and aligned so. Neighbours are merged where a block of 2 MiB begins, so what a piece has of such a block is one free block or
    /// a part of one; none is longer than 128 MiB. Returns the address up to which it has looked; that is more than
    /// `within.start()`.
    ///
    /// It loads one descriptor, of which it needs one or two words, for each `2^order` pages, less where it finds something.
    pub fn find_free(
        &self,
        memory: &dyn ReadGuest,
        within: GpaRange,
        order: u32,
        found: &mut Vec<GpaRange>,
    ) -> u64 {
        let end = within
            .end()
            .min((within.start() | (SECTION - 1)).saturating_add(1));
        let first = within.start() / PAGE_SIZE;
        if order > self.layout.max_order {
            return end;
        }
        if let Some(descriptors) = self.descriptors(memory, first) {
            find_in_section(descriptors, first, end / PAGE_SIZE, order, found);
        }
        end
    }

    fn descriptors<'a>(&self, memory: &'a dyn ReadGuest, page: u64) -> Option<Descriptors<'a>> {
        Descriptors::of_section(memory, self.tables, self.layout, page)
    }
}

/// Tells which ranges are free, while every vCPU is out of the guest.
pub struct FreeReader<'a> {
    kernel: &'a GuestKernel,
    memory: &'a dyn ReadGuest,
    /// The section of the last range, by its number, and its descriptors, if it is in use.
    section: Option<(u64, Option<Descriptors<'a>>)>,
}

impl FreeReader<'_> {
    /// As [`GuestKernel::is_free`].
    pub fn is_free(&mut self, range: GpaRange) -> bool {
        let (first, end) = (range.start() / PAGE_SIZE, range.end() / PAGE_SIZE);
        let number = range.start() / SECTION;
        if self.section.as_ref().is_none_or(|(it, _)| *it != number) {
            self.section = Some((number, self.kernel.descriptors(self.memory, first)));
        }
        let Some((_, Some(descriptors))) = &mut self.section else {
            return false;
        };
        let block = descriptors.block_over(first, end);
        block.is_some_and(|(head, _)| descriptors.is_listed(head))
    }
}

/// As [`GuestKernel::find_free`], for the pages from `first` to `end`, all of one section.
fn find_in_section(
    mut descriptors: Descriptors<'_>,
    first: u64,
    end: u64,
    order: u32,
    found: &mut Vec<GpaRange>,
) {
    let step = 1 << order;
    let (start, end) = (first.next_multiple_of(step), end >> order << order);
    let mut page = start;
    let mut piece: Option<GpaRange> = None;
    while page < end {
        // The block that has the first page may begin before it. All others are met at their heads.
        let block_end = if page == start {
            let block = descriptors.block_over(page, page + step);
            block.map(|(_, end)| end)
        } else {
            let head = descriptors.free_order(page);
            head.filter(|&free| free >= order)
                .map(|free| page + (1 << free))
        };
        if let Some(block_end) = block_end {
            if !(page * PAGE_SIZE).is_multiple_of(BLOCK_SIZE) {
                found.extend(piece.take());
            }
            let from = piece.map_or(page * PAGE_SIZE, GpaRange::start);
            piece = GpaRange::new(from, block_end.min(end) * PAGE_SIZE);
            page = block_end;
        } else {
            found.extend(piece.take());
            page += step;
        }
    }
    found.extend(piece);
}

/// The kernel's image in memory.
struct Image {
    phys_base: u64,
    len: u64,
}

impl Image {
    fn of(note: &Note) -> Result<Self, BadNote> {
        Ok(Self {
            phys_base: note.number("NUMBER(phys_base)")?.cast_unsigned(),
            len: note.checked("NUMBER(KERNEL_IMAGE_SIZE)", "is more than 1 GiB", |len| {
                len <= 1 << 30
            })?,
        })
    }

    /// Kernel address and guest-physical address of `symbol`.
    fn locate(&self, note: &Note, symbol: &str) -> Result<(u64, u64), BadNote> {
        let va = note.symbol(symbol)?;
        let offset = va.wrapping_sub(KERNEL_IMAGE);
        if offset >= self.len {
            let (key, value) = (format!("SYMBOL({symbol})"), format!("{va:x}"));
            return Err(bad(&key, &value, "is not in the kernel's image"));
        }
        Ok((va, offset.wrapping_add(self.phys_base)))
    }
}

/// Returns true if a free `block` holds the pattern of Linux's page poisoning (`mm/page_poison.c`): in the first and the
/// last word of its first and of its last page. With poisoning all free pages do, so one that does not is proof that
/// there is none. The reverse is no proof: a program may have left the same bytes there.
fn is_poisoned(memory: &dyn ReadGuest, block: GpaRange) -> bool {
    let (first, last) = (block.start(), block.end() - PAGE_SIZE);
    let words = [first, first + PAGE_SIZE - 8, last, last + PAGE_SIZE - 8];
    words.iter().all(|&gpa| memory.load(gpa) == Some(POISON))
}
