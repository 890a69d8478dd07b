//! The descriptor of a page (`struct page`): where it is, and what it says about a free block.
//!
//! **Where.** Descriptors are found through the section of 128 MiB that the page belongs to (`mem_section`, Linux
//! `include/linux/mmzone.h`), as makedumpfile does: older kernels, 6.1 among them, do not name `vmemmap` in their note. A section
//! without memory, or one that is not online, has no free page for us. Linux marks a section online after it has initialised
//! its descriptors, so what hotplug has not yet filled in is not read.
//!
//! **Free.** The head of a free block of `2^order` pages has the type *buddy* in the word `_mapcount` (which is `page_type`
//! there), and `order` in `private`. The note's `NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)` is that word as it is in a free page:
//! it differs between kernels ([`BUDDY_WORDS`]). The other pages of the block say nothing. So a page is free if one of its
//! possible heads says so: the page itself, or one at a lower address that is a multiple of a larger block.
//!
//! **A vCPU that stands still anywhere.** The gate stops a vCPU between any two instructions, also in the middle of the
//! allocator. When a block becomes free, `__free_one_page` writes its order, then the mark, then links it into a free list.
//! The compiler may swap the first two, and does so in Debian's 6.1: one instruction long the mark stands beside an order
//! that the page's last user left. So a block counts only when it is linked. When a block is split (`expand`), the link comes
//! before the order; but the address of each new head is no multiple of more than its own order, and a larger one is not
//! believed. When a block is allocated, it is first unlinked, then the mark is removed.

use super::ReadGuest;
use super::note::Note;
use super::walk::{Tables, Walker};
use super::{BadNote, note};

/// `SECTION_SIZE_BITS` of x86-64: sections of 128 MiB.
pub(super) const SECTION_BITS: u64 = 27;
const PAGE_BITS: u32 = 12;
const PAGES_OF_SECTION_BITS: u32 = SECTION_BITS as u32 - PAGE_BITS;
/// Flags in `section_mem_map`, below the address: `SECTION_MARKED_PRESENT`, `SECTION_HAS_MEM_MAP`, `SECTION_IS_ONLINE`.
const SECTION_USABLE: u64 = 0b111;
/// Where flags of a section may be (`SECTION_MAP_MASK`): its map begins at a page.
const SECTION_FLAGS: u64 = 0xfff;
/// The word `_mapcount` of a free block's head, by kernel (`include/linux/page-flags.h`).
const BUDDY_WORDS: [u32; 3] = [
    // From 4.18: a type takes its bit away from 0xffff_ffff.
    !0x0000_0080,
    // 6.11: likewise, with another bit.
    !0x4000_0000,
    // From 6.12: the type is the top byte.
    0xf000_0000,
];

/// Layout of the guest kernel's descriptors, from the note.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Kernel address of the array of pointers to pages full of sections.
    sections: u64,
    /// Length of that array.
    roots: u64,
    /// Bytes of a `struct mem_section`.
    section_size: u64,
    section_mem_map: u64,
    /// Bytes of a `struct page`.
    page_size: u64,
    mapcount: u64,
    private: u64,
    lru: u64,
    /// What the word at `mapcount` is in a free block's head.
    buddy: u32,
    /// Order of the largest blocks.
    pub(super) max_order: u32,
}

impl Layout {
    pub(super) fn of(note: &Note) -> Result<Self, BadNote> {
        let page_size = note.checked("SIZE(page)", "is not a size of struct page", |size| {
            size % 8 == 0 && (32..=512).contains(&size)
        })?;
        let section_size = note.checked(
            "SIZE(mem_section)",
            "is not a size of struct mem_section",
            |size| size.is_power_of_two() && (8..=256).contains(&size),
        )?;
        let field = |key: &str, alignment: u64, size: u64| {
            let allowed = |offset: u64| {
                offset.is_multiple_of(alignment) && offset.saturating_add(alignment) <= size
            };
            note.checked(key, "is no place for this field", allowed)
        };
        note.checked("NUMBER(SECTION_SIZE_BITS)", "is not 27", |bits| {
            bits == SECTION_BITS
        })?;
        let address_bits = note.checked(
            "NUMBER(MAX_PHYSMEM_BITS)",
            "is not one of 46 and 52",
            |bits| [46, 52].contains(&bits),
        )?;
        // Two levels (CONFIG_SPARSEMEM_EXTREME): each root points to a page full of sections.
        let expected = (1 << (address_bits - SECTION_BITS)) / (4096 / section_size);
        let roots = note.checked(
            "LENGTH(mem_section)",
            "is not what the sections need",
            |roots| roots == expected,
        )?;
        let orders = note.checked(
            "LENGTH(zone.free_area)",
            "is not a number of block sizes",
            |orders| (1..=u64::from(PAGES_OF_SECTION_BITS) + 1).contains(&orders),
        )?;
        Ok(Self {
            sections: note.symbol("mem_section")?,
            roots,
            section_size,
            section_mem_map: field("OFFSET(mem_section.section_mem_map)", 8, section_size)?,
            page_size,
            mapcount: field("OFFSET(page._mapcount)", 4, page_size)?,
            private: field("OFFSET(page.private)", 8, page_size)?,
            // A `struct list_head`: two pointers.
            lru: field("OFFSET(page.lru)", 8, page_size - 8)?,
            buddy: buddy_word(note)?,
            max_order: orders as u32 - 1,
        })
    }
}

/// The kernel prints the word as a signed or as an unsigned number.
fn buddy_word(note: &Note) -> Result<u32, BadNote> {
    let key = "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)";
    let number = note.number(key)?;
    let word = BUDDY_WORDS
        .into_iter()
        .find(|&word| number == i64::from(word) || number == i64::from(word.cast_signed()));
    word.ok_or_else(|| {
        note::bad(
            key,
            &number.to_string(),
            "is not a known mark of free pages",
        )
    })
}

/// The descriptors of one section.
pub(super) struct Descriptors<'a> {
    walker: Walker<'a>,
    layout: Layout,
    /// Kernel address of page 0's descriptor if this section's map began there.
    map: u64,
}

impl<'a> Descriptors<'a> {
    /// The descriptors of the section of page `pfn`, or `None` if that section is not in use.
    pub(super) fn of_section(
        memory: &'a dyn ReadGuest,
        tables: Tables,
        layout: Layout,
        pfn: u64,
    ) -> Option<Self> {
        let mut walker = Walker::new(memory, tables);
        let section = pfn >> PAGES_OF_SECTION_BITS;
        let of_root = 4096 / layout.section_size;
        let root = section / of_root;
        if root >= layout.roots {
            return None;
        }
        let sections = walker.load(layout.sections.checked_add(root * 8)?)?;
        let at = section % of_root * layout.section_size + layout.section_mem_map;
        let word = walker.load(sections.checked_add(at)?)?;
        (word & SECTION_USABLE == SECTION_USABLE).then_some(Self {
            walker,
            layout,
            map: word & !SECTION_FLAGS,
        })
    }

    /// The word of page `pfn` that has its type. `None` if the descriptor is not there.
    pub(super) fn page_type(&mut self, pfn: u64) -> Option<u32> {
        let at = self.field(pfn, self.layout.mapcount);
        let word = self.walker.load(at & !7)?;
        Some((word >> (at % 8 * 8)) as u32)
    }

    /// The order of the free block whose head is page `pfn`, if there is one.
    pub(super) fn free_order(&mut self, pfn: u64) -> Option<u32> {
        if self.page_type(pfn)? != self.layout.buddy {
            return None;
        }
        let order = self.walker.load(self.field(pfn, self.layout.private))?;
        let order = u32::try_from(order).ok()?;
        (order <= self.layout.max_order && pfn.trailing_zeros() >= order).then_some(order)
    }

    /// Head and end of the free block that has all pages from `pfn` to `end`, which is more than `pfn`.
    pub(super) fn block_over(&mut self, pfn: u64, end: u64) -> Option<(u64, u64)> {
        let mut looked_at = None;
        (0..=self.layout.max_order).find_map(|order| {
            let head = pfn >> order << order;
            if looked_at.replace(head) == Some(head) {
                return None;
            }
            let block_end = head + (1 << self.free_order(head)?);
            (end <= block_end).then_some((head, block_end))
        })
    }

    /// Returns true if the head of a free block is on a list: the next entry points back to it.
    pub(super) fn is_listed(&mut self, head: u64) -> bool {
        let entry = self.field(head, self.layout.lru);
        let next = self.walker.load(entry);
        let prev = next.and_then(|next| self.walker.load(next.checked_add(8)?));
        prev == Some(entry)
    }

    /// As the kernel computes it. A sum that wraps is no address of the kernel, or the guest's own affair.
    fn field(&self, pfn: u64, offset: u64) -> u64 {
        let page = pfn.wrapping_mul(self.layout.page_size);
        self.map.wrapping_add(page).wrapping_add(offset)
    }
}
