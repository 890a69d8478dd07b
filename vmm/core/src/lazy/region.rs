//! The states of the pages of 128 MiB of guest memory.

use std::ops::Range;

use super::map::{BLOCK_PAGES, Change, Counts, Map, PageState};
use crate::range::{BLOCK_SIZE, PAGE_SIZE};

/// Blocks of a region.
const BLOCKS: usize = 64;

/// Pages of a region.
pub const REGION_PAGES: usize = BLOCKS * BLOCK_PAGES;

/// Bytes of a region. An operation on all of it takes some microseconds at most, so this is how much one step of a long
/// operation does under the tracker's lock.
pub const REGION_SIZE: u64 = BLOCKS as u64 * BLOCK_SIZE;
const _: () = assert!(REGION_SIZE == REGION_PAGES as u64 * PAGE_SIZE);

/// Bits of a block's entry that hold the state of its pages; its stamp is above them.
const KIND_BITS: u32 = 3;
/// The value of these bits for a block whose pages are in more than one state: they are in its map.
const SPLIT: u64 = PageState::ALL.len() as u64;

/// What is known of a block: the state of its pages, if they have one, and its stamp.
#[derive(Clone, Copy, Debug, Default)]
struct Block(u64);

impl Block {
    const fn stamp(self) -> u64 {
        self.0 >> KIND_BITS
    }

    /// The state of its pages; `None` if there is more than one.
    fn state(self) -> Option<PageState> {
        let kind = self.0 & ((1 << KIND_BITS) - 1);
        PageState::ALL.get(kind as usize).copied()
    }

    fn set_state(&mut self, state: Option<PageState>) {
        let kind = state.map_or(SPLIT, |state| state as u64);
        self.0 = self.stamp() << KIND_BITS | kind;
    }

    fn set_stamp(&mut self, stamp: u64) {
        self.0 ^= (self.stamp() ^ stamp) << KIND_BITS;
    }
}

/// What a change does with the stamps of the blocks that it touches.
#[derive(Clone, Copy, Debug)]
pub enum Stamp {
    /// Nothing.
    Keep,
    /// This becomes the stamp of a block that has no lazy or unmapped page yet.
    First(u64),
    /// The stamp is this at least.
    AtLeast(u64),
}

/// Which pages a sweep looks for.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Their state.
    pub state: PageState,
    /// The latest stamp of their blocks.
    pub newest: u64,
    /// Also pages of blocks whose other pages are in another state.
    pub split: bool,
}

/// The states of the pages of a region, and the stamps of its blocks.
#[derive(Debug)]
pub struct Region {
    blocks: [Block; BLOCKS],
    /// The maps of the blocks that are split. There while there is such a block.
    maps: Option<Box<[Map; BLOCKS]>>,
    split: u32,
    /// Pages that are not in use.
    tracked: u32,
    ranges: u32,
}

impl Region {
    /// A region that is in use.
    pub const fn new() -> Self {
        Self {
            blocks: [Block(0); BLOCKS],
            maps: None,
            split: 0,
            tracked: 0,
            ranges: 0,
        }
    }

    /// Number of pages that are not in use.
    pub const fn tracked(&self) -> u64 {
        self.tracked as u64
    }

    /// Number of ranges: neighbouring pages in one state other than in use.
    pub const fn ranges(&self) -> u64 {
        self.ranges as u64
    }

    /// Bytes of memory that it takes.
    pub const fn bytes(&self) -> u64 {
        let maps = if self.maps.is_some() {
            size_of::<[Map; BLOCKS]>()
        } else {
            0
        };
        (size_of::<Self>() + maps) as u64
    }

    /// Changes the states of `pages`. Returns their numbers by old state.
    pub fn change(&mut self, pages: Range<usize>, change: Change, stamp: Stamp) -> Counts {
        let touched = pages.start..REGION_PAGES.min(pages.end + 1);
        self.ranges -= self.starts(touched.clone());
        let mut counts = Counts::default();
        for (block, part) in parts(pages) {
            self.stamp(block, stamp);
            let found = self.change_block(block, part, change);
            for state in PageState::ALL {
                counts[state as usize] += found[state as usize];
            }
        }
        self.ranges += self.starts(touched);
        for state in PageState::ALL {
            let count = counts[state as usize] as u32;
            let is_tracked = |state| state != PageState::InUse;
            self.tracked += count * u32::from(is_tracked(change[state as usize]));
            self.tracked -= count * u32::from(is_tracked(state));
        }
        counts
    }

    /// Numbers of `pages` by state.
    pub fn count(&self, pages: Range<usize>) -> Counts {
        let mut counts = Counts::default();
        for (block, part) in parts(pages) {
            match self.blocks[block].state() {
                Some(state) => counts[state as usize] += part.len() as u64,
                None => {
                    let found = self.map(block).count(part);
                    (0..counts.len()).for_each(|state| counts[state] += found[state]);
                }
            }
        }
        counts
    }

    /// Returns true if a page of the block that holds `page` is in one of `states`.
    pub fn block_has(&self, page: usize, states: &[PageState]) -> bool {
        let block = page / BLOCK_PAGES;
        match self.blocks[block].state() {
            Some(state) => states.contains(&state),
            None => self.map(block).has(states),
        }
    }

    /// The first run of pages in `within` that `look` is for.
    pub fn run(&self, look: Look, within: Range<usize>) -> Option<Range<usize>> {
        let start = self.first(look, within.clone(), true);
        let end = self.first(look, start..within.end, false);
        (start < end).then_some(start..end)
    }

    /// The first page in `within` that `look` is for if `wanted` is true, or is not for if it is false; its end if there
    /// is none.
    fn first(&self, look: Look, within: Range<usize>, wanted: bool) -> usize {
        let found = parts(within.clone()).find_map(|(block, part)| {
            let entry = self.blocks[block];
            let all = match entry.state() {
                _ if entry.stamp() > look.newest => false,
                Some(state) => state == look.state,
                None if !look.split => false,
                None => {
                    let page = self.map(block).first(part.start, look.state, wanted)?;
                    return Some(block * BLOCK_PAGES + page);
                }
            };
            (all == wanted).then(|| block * BLOCK_PAGES + part.start)
        });
        found.map_or(within.end, |page| page.min(within.end))
    }

    /// Number of `pages` at which a range begins.
    fn starts(&self, pages: Range<usize>) -> u32 {
        let before = pages.start.checked_sub(1);
        let mut before = before.map_or(PageState::InUse, |page| self.get(page));
        let mut starts = 0;
        for (block, part) in parts(pages) {
            if let Some(state) = self.blocks[block].state() {
                starts += u32::from(state != PageState::InUse && state != before);
                before = state;
            } else {
                let map = self.map(block);
                starts += map.starts(part.clone(), before) as u32;
                before = map.get(part.end - 1);
            }
        }
        starts
    }

    fn get(&self, page: usize) -> PageState {
        let block = page / BLOCK_PAGES;
        let state = self.blocks[block].state();
        state.unwrap_or_else(|| self.map(block).get(page % BLOCK_PAGES))
    }

    fn stamp(&mut self, block: usize, stamp: Stamp) {
        let waiting = [PageState::Lazy, PageState::Unmapped];
        match stamp {
            Stamp::First(stamp) if !self.block_has(block * BLOCK_PAGES, &waiting) => {
                self.blocks[block].set_stamp(stamp);
            }
            Stamp::AtLeast(stamp) if self.blocks[block].stamp() < stamp => {
                self.blocks[block].set_stamp(stamp);
            }
            _ => {}
        }
    }

    fn change_block(&mut self, block: usize, pages: Range<usize>, change: Change) -> Counts {
        let mut counts = Counts::default();
        let Some(old) = self.blocks[block].state() else {
            let map = self.map_mut(block);
            counts = map.change(pages, change);
            if let Some(new) = map.uniform() {
                self.blocks[block].set_state(Some(new));
                self.split -= 1;
                if self.split == 0 {
                    self.maps = None;
                }
            }
            return counts;
        };
        counts[old as usize] = pages.len() as u64;
        let new = change[old as usize];
        if pages.len() == BLOCK_PAGES {
            self.blocks[block].set_state(Some(new));
        } else if new != old {
            let map = self.map_mut(block);
            *map = Map::filled(old);
            map.change(pages, change);
            self.blocks[block].set_state(None);
            self.split += 1;
        }
        counts
    }

    /// The map of a block that is split.
    fn map(&self, block: usize) -> &Map {
        const IN_USE: Map = Map::filled(PageState::InUse);
        self.maps.as_ref().map_or(&IN_USE, |maps| &maps[block])
    }

    fn map_mut(&mut self, block: usize) -> &mut Map {
        let maps = self.maps.get_or_insert_with(|| {
            let in_use = Map::filled(PageState::InUse);
            Box::new([in_use; BLOCKS])
        });
        &mut maps[block]
    }
}

/// The parts of `pages` by block: the block's number, and page numbers in it.
fn parts(pages: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    (pages.start / BLOCK_PAGES..pages.end.div_ceil(BLOCK_PAGES)).map(move |block| {
        let first = block * BLOCK_PAGES;
        let inside = |page: usize| page.saturating_sub(first).min(BLOCK_PAGES);
        (block, inside(pages.start)..inside(pages.end))
    })
}
