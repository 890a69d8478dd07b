//! Blocks of guest memory, for what does not fit into registers. A call names the address of its block and the number
//! of pages. All numbers are little-endian. The monitor reads a block once, at the start of the call, and writes its
//! answer at the end.

use core::mem::{offset_of, size_of};

use crate::PAGE_SIZE;

/// Maximum number of pages of a batch block.
pub const BATCH_MAX_PAGES: u64 = 4;

/// Maximum number of descriptors of a batch: as many as fit in [`BATCH_MAX_PAGES`].
pub const BATCH_MAX: u32 = batch_capacity(BATCH_MAX_PAGES);

/// The head of a batch block. The descriptors follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct BatchHeader {
    /// Number of descriptors, at least 1.
    pub count: u32,
    /// The monitor's answer: the number of descriptors that it has processed; with [`crate::Error::Invalid`], the
    /// index of the bad one.
    pub done: u32,
    /// 0.
    pub reserved: u64,
}

/// A range in a batch block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical address, a multiple of [`PAGE_SIZE`].
    pub gpa: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

/// Number of descriptors that fit into a batch block of `pages` pages.
#[must_use]
pub const fn batch_capacity(pages: u64) -> u32 {
    let pages = if pages < BATCH_MAX_PAGES {
        pages
    } else {
        BATCH_MAX_PAGES
    };
    let room = (pages * PAGE_SIZE).saturating_sub(size_of::<BatchHeader>() as u64);
    (room / size_of::<Descriptor>() as u64) as u32
}

/// A query block: the beginning of one page. The guest writes the first two numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Query {
    /// Guest-physical address of the range to describe.
    pub gpa: u64,
    /// Its number of pages; 0: describe only the machine.
    pub pages: u64,
    /// Number of these pages that the answer covers, from the first on: only a part of a very fragmented range.
    pub examined: u64,
    /// Pages of that part that are lazily free and still have the guest's content.
    pub lazy: u64,
    /// Pages of that part whose content the host may drop at any time.
    pub unmapped: u64,
    /// Pages of that part that the host has taken.
    pub discarded: u64,
    /// [`Query::lazy`] for all memory of the machine.
    pub machine_lazy: u64,
    /// [`Query::unmapped`] for all memory of the machine.
    pub machine_unmapped: u64,
    /// [`Query::discarded`] for all memory of the machine.
    pub machine_discarded: u64,
    /// Number of ranges in the monitor's tracker.
    pub ranges: u64,
    /// The machine's generation.
    pub generation: u64,
    /// 0.
    pub reserved: u64,
}

const _: () = assert!(size_of::<BatchHeader>() == 16 && offset_of!(BatchHeader, done) == 4);
const _: () = assert!(size_of::<Descriptor>() == 16 && offset_of!(Descriptor, pages) == 8);
const _: () = assert!(size_of::<Query>() == 96 && offset_of!(Query, machine_lazy) == 48);
const _: () = assert!(offset_of!(Query, generation) == 80);
const _: () = assert!(BATCH_MAX == 1023 && batch_capacity(1) == 255 && batch_capacity(0) == 0);

impl BatchHeader {
    /// From memory.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        Self {
            count: u32::from_le_bytes([a, b, c, d]),
            done: u32::from_le_bytes([e, f, g, h]),
            reserved: u64::from_le_bytes(rest),
        }
    }
}

impl Descriptor {
    /// From memory.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let all = u128::from_le_bytes(bytes);
        Self {
            gpa: all as u64,
            pages: (all >> 64) as u64,
        }
    }

    /// To memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        (u128::from(self.pages) << 64 | u128::from(self.gpa)).to_le_bytes()
    }
}

impl Query {
    /// The fields in their order.
    #[must_use]
    pub const fn to_words(self) -> [u64; 12] {
        [
            self.gpa,
            self.pages,
            self.examined,
            self.lazy,
            self.unmapped,
            self.discarded,
            self.machine_lazy,
            self.machine_unmapped,
            self.machine_discarded,
            self.ranges,
            self.generation,
            self.reserved,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_little_endian_and_in_order() {
        let bytes: [u8; 16] = core::array::from_fn(|i| i as u8);
        let header = BatchHeader::from_bytes(bytes);
        assert_eq!((header.count, header.done), (0x0302_0100, 0x0706_0504));
        assert_eq!(header.reserved, 0x0f0e_0d0c_0b0a_0908);
        let descriptor = Descriptor::from_bytes(bytes);
        assert_eq!(descriptor.gpa, 0x0706_0504_0302_0100);
        assert_eq!(descriptor.pages, header.reserved);
        assert_eq!(descriptor.to_bytes(), bytes);
    }

    #[test]
    fn more_pages_than_a_block_may_have_hold_no_more() {
        assert_eq!(batch_capacity(u64::MAX), BATCH_MAX);
    }
}
