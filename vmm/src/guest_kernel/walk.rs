//! The guest kernel's page tables (Intel SDM volume 3, chapter 5 "Paging"), read from guest memory.
//!
//! The walk begins at `init_top_pgt`, the kernel's own top table, and not at a vCPU's CR3. It maps all of kernel space at
//! any time, whichever process runs. With page-table isolation (PTI) it is the kernel's half of a pair of pages; the other
//! half, which lacks what is looked for here, belongs to user mode, and the kernel has no symbol for it.

use super::ReadGuest;

const PRESENT: u64 = 1;
/// In a table of 1 GiB or 2 MiB entries: the entry maps memory, and is no table.
const LARGE: u64 = 1 << 7;
/// Where an entry has its address, as far as the architecture goes.
const ADDRESS: u64 = (1 << 52) - (1 << 12);
/// Levels of tables whose entries map memory: of 4 KiB, 2 MiB and 1 GiB.
const LEAF_LEVELS: u32 = 3;

/// The kernel's page tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    /// Guest-physical address of the top table.
    pub(super) root: u64,
    /// 4 or 5.
    pub(super) levels: u32,
    /// The bit that marks encrypted memory in an entry (AMD SME), or 0.
    pub(super) encrypted: u64,
}

impl Tables {
    /// Returns true if `va` is an address of the kernel: in the upper half, and canonical.
    pub(super) fn is_kernel(&self, va: u64) -> bool {
        va >= u64::MAX << (11 + 9 * self.levels)
    }
}

/// Memory that one entry maps.
#[derive(Clone, Copy)]
struct Leaf {
    va: u64,
    gpa: u64,
    len: u64,
}

/// A free page's descriptor, those of its neighbours in the list, and the list's head are mapped by so many entries.
const RECENT: usize = 4;

/// Reads at kernel addresses. It remembers the last entries that mapped something, so it lives for one call or one pause only:
/// the guest changes its tables.
pub(super) struct Walker<'a> {
    memory: &'a dyn ReadGuest,
    tables: Tables,
    recent: [Option<Leaf>; RECENT],
    /// The one of `recent` that the next entry replaces.
    oldest: usize,
}

impl<'a> Walker<'a> {
    pub(super) fn new(memory: &'a dyn ReadGuest, tables: Tables) -> Self {
        Self {
            memory,
            tables,
            recent: [None; RECENT],
            oldest: 0,
        }
    }

    /// The guest-physical address of `va`, or `None` if `va` is not mapped in the kernel's half. It need not be in RAM.
    pub(super) fn translate(&mut self, va: u64) -> Option<u64> {
        let mut recent = self.recent.iter().flatten();
        let known = recent.find(|leaf| va.wrapping_sub(leaf.va) < leaf.len);
        let leaf = if let Some(leaf) = known {
            *leaf
        } else {
            let leaf = self.walk(va)?;
            self.recent[self.oldest] = Some(leaf);
            self.oldest = (self.oldest + 1) % RECENT;
            leaf
        };
        Some(leaf.gpa + (va - leaf.va))
    }

    /// The 8 bytes at `va`, a multiple of 8.
    pub(super) fn load(&mut self, va: u64) -> Option<u64> {
        let gpa = self.translate(va)?;
        self.memory.load(gpa)
    }

    /// At most one load for each level, whatever the tables say.
    fn walk(&self, va: u64) -> Option<Leaf> {
        if !self.tables.is_kernel(va) {
            return None;
        }
        let mut table = self.tables.root;
        for level in (0..self.tables.levels).rev() {
            let shift = 12 + 9 * level;
            let entry = self.memory.load(table + (va >> shift) % 512 * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let gpa = entry & ADDRESS & !self.tables.encrypted;
            if level == 0 || entry & LARGE != 0 {
                let len = 1 << shift;
                let leaf = Leaf {
                    va: va & !(len - 1),
                    gpa: gpa & !(len - 1),
                    len,
                };
                return (level < LEAF_LEVELS).then_some(leaf);
            }
            table = gpa;
        }
        None
    }
}
