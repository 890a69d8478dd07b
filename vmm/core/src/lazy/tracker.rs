//! The tracker: the state of each page of guest memory, with totals. For one thread; no system calls.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use super::flights::Flights;
use super::map::{Change, Counts, PageState};
use super::region::{REGION_PAGES, REGION_SIZE, Region, Stamp};
use super::sweep::Sweep;
use crate::fault::fault_point;
use crate::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

/// How the work on a chunk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing has happened, or nothing that is certain: it is what it was.
    Kept,
    /// It is unmapped, and this generation began after that.
    Unmapped(u64),
    /// It is discarded.
    Discarded,
}

/// Bytes by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Lazy.
    pub lazy: u64,
    /// Unmapped.
    pub unmapped: u64,
    /// In a chunk that is being invalidated or discarded.
    pub reclaiming: u64,
    /// Discarded.
    pub discarded: u64,
}

impl Totals {
    /// Bytes that are not in use.
    #[must_use]
    pub const fn tracked(&self) -> u64 {
        self.lazy + self.unmapped + self.reclaiming + self.discarded
    }

    /// `pages` by state, of which those of `flights` are in chunks.
    pub(super) fn new(pages: Counts, flights: Counts) -> Self {
        let bytes = |state: PageState| {
            let state = state as usize;
            (pages[state] - flights[state]) * PAGE_SIZE
        };
        Self {
            lazy: bytes(PageState::Lazy),
            unmapped: bytes(PageState::Unmapped),
            reclaiming: flights.iter().sum::<u64>() * PAGE_SIZE,
            discarded: bytes(PageState::Discarded),
        }
    }
}

/// What one step of a [`Sweep`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A chunk.
    Found(GpaRange),
    /// Nothing yet, after as much as one step may look at.
    More,
    /// The end of the sweep.
    Done,
}

/// The state of each page of guest memory.
///
/// It is kept by regions of 128 MiB, each of which has an entry for each block: one state for all its pages, or a map of
/// 2 bits a page. A region that is wholly in use is left out. So it takes 5 MiB a TiB, and 64 MiB a TiB more when each
/// block is split: there is room for whatever the guest says. An operation on n pages takes O(n / 32), and O(n / 512)
/// where blocks are whole.
///
/// A block has one stamp for all its lazy and unmapped pages: the generation of the *first* of them. So a page that is
/// freed beside old ones leaves them old, and counts as old itself. An invalidation raises it to its own generation: an
/// unmapped page must never seem to have been invalidated earlier than it was, because then a vCPU might still have a
/// translation of it. The lazy pages of that block are younger for it.
///
/// The pages of chunks in flight keep their state until the chunk ends; the caller leaves them out ([`Flights`]).
#[derive(Debug, Default)]
pub struct Tracker {
    regions: BTreeMap<u64, Box<Region>>,
    /// Pages by state. Those in use are not counted.
    pages: Counts,
    ranges: u64,
    bytes: u64,
    /// See [`Tracker::reuse`].
    rearm: bool,
}

impl Tracker {
    /// An empty tracker. `rearm` is true if the host may put a huge page behind a block.
    #[must_use]
    pub fn new(rearm: bool) -> Self {
        Self {
            rearm,
            ..Self::default()
        }
    }

    /// Pages by state; 0 for those in use.
    pub const fn pages(&self) -> Counts {
        self.pages
    }

    /// Number of ranges: neighbouring pages in one state. A range ends where a region does.
    pub const fn ranges(&self) -> u64 {
        self.ranges
    }

    /// Bytes of memory that its regions take.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages of `part`, which lies in one region, by state.
    pub fn survey(&self, part: GpaRange) -> Counts {
        let (number, pages) = place(part);
        let region = self.regions.get(&number);
        region.map_or([0; 4], |region| region.count(pages))
    }

    /// Makes what is in use in `part` lazy, with `generation`. What is not in use stays as it is. Returns the number of
    /// bytes that are lazy now and were in use. `part` lies in one region.
    pub fn free(&mut self, part: GpaRange, generation: u64) -> u64 {
        let [in_use, lazy, unmapped, discarded] = PageState::ALL;
        let change = [lazy, lazy, unmapped, discarded];
        self.change(part, change, Stamp::First(generation))[in_use as usize] * PAGE_SIZE
    }

    /// Makes `part`, which lies in one region and in no chunk, in use. Returns the numbers of its pages by old state.
    ///
    /// If discarded pages were among them and the host uses huge pages, the discarded rest of the blocks at its ends
    /// becomes lazy again, with the generation that `fresh` returns: when the guest touches a page of such a block, the
    /// host puts a huge page there, and with it the rest is back.
    pub fn reuse(&mut self, part: GpaRange, fresh: &mut dyn FnMut() -> u64) -> Counts {
        let counts = self.change(part, [PageState::InUse; 4], Stamp::Keep);
        if self.rearm && counts[PageState::Discarded as usize] > 0 {
            self.rearm(part, fresh);
        }
        counts
    }

    fn rearm(&mut self, part: GpaRange, fresh: &mut dyn FnMut() -> u64) {
        for page in [part.start(), part.end() - PAGE_SIZE] {
            let start = page / BLOCK_SIZE * BLOCK_SIZE;
            if let Some(block) = GpaRange::new(start, start.saturating_add(BLOCK_SIZE))
                && self.survey(block)[PageState::Discarded as usize] > 0
            {
                self.refilled(block, fresh());
            }
        }
    }

    /// Makes what is discarded in `part` lazy, with `generation`, as the host has pages for it again. `part` lies in one
    /// region. Returns the number of bytes.
    pub fn refilled(&mut self, part: GpaRange, generation: u64) -> u64 {
        let [in_use, lazy, unmapped, discarded] = PageState::ALL;
        let used = if fault_point!("what was reused is lazy again, too") {
            lazy
        } else {
            in_use
        };
        let change = [used, lazy, unmapped, lazy];
        self.change(part, change, Stamp::First(generation))[discarded as usize] * PAGE_SIZE
    }

    /// Ends the work on a chunk, which lies in one region.
    pub fn finish(&mut self, chunk: GpaRange, fate: Fate) {
        match fate {
            Fate::Kept => {}
            Fate::Unmapped(generation) => {
                let stamp = Stamp::AtLeast(generation);
                self.change(chunk, [PageState::Unmapped; 4], stamp);
            }
            Fate::Discarded => {
                self.change(chunk, [PageState::Discarded; 4], Stamp::Keep);
            }
        }
    }

    /// Looks for the next chunk of at most `limit` bytes for `sweep`, outside of `flights`.
    pub fn find(&self, sweep: &mut Sweep, limit: u64, flights: &Flights) -> Step {
        if limit < sweep.pieces.unit() {
            return Step::Done;
        }
        let Some((&number, region)) = self.regions.range(sweep.at / REGION_SIZE..).next() else {
            return Step::Done;
        };
        let first = number * REGION_SIZE;
        sweep.at = sweep.at.max(first);
        let end = first.saturating_add(REGION_SIZE).min(sweep.end);
        while let Some(rest) = GpaRange::new(sweep.at, end) {
            let Some(run) = region.run(sweep.look(), place(rest).1) else {
                break;
            };
            let at = |page: usize| first + page as u64 * PAGE_SIZE;
            let run = GpaRange::new(at(run.start), at(run.end));
            let Some(free) = run.and_then(|run| flights.first_gap(run)) else {
                sweep.at = run.map_or(end, GpaRange::end);
                continue;
            };
            sweep.at = free.end();
            if let Some(chunk) = sweep.pieces.pick(free, limit) {
                sweep.at = chunk.end();
                return Step::Found(chunk);
            }
        }
        sweep.at = end;
        if end == sweep.end {
            Step::Done
        } else {
            Step::More
        }
    }

    /// The first region at `at` or after it that is not wholly in use.
    pub fn next_region(&self, at: u64) -> Option<GpaRange> {
        let (number, _) = self.regions.range(at.div_ceil(REGION_SIZE)..).next()?;
        let start = number * REGION_SIZE;
        GpaRange::new(start, start.saturating_add(REGION_SIZE))
    }

    fn change(&mut self, part: GpaRange, change: Change, stamp: Stamp) -> Counts {
        let (number, pages) = place(part);
        let len = pages.len() as u64;
        let region = match self.regions.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if change[0] == PageState::InUse => return [len, 0, 0, 0],
            Entry::Vacant(entry) => {
                let region = entry.insert(Box::new(Region::new()));
                self.bytes += region.bytes();
                region
            }
        };
        let before = (region.ranges(), region.bytes());
        let counts = region.change(pages, change, stamp);
        self.ranges = self.ranges + region.ranges() - before.0;
        self.bytes = self.bytes + region.bytes() - before.1;
        for (state, count) in counts.into_iter().enumerate() {
            self.pages[change[state] as usize] += count;
            self.pages[state] = self.pages[state].wrapping_sub(count);
        }
        self.pages[PageState::InUse as usize] = 0;
        if region.tracked() == 0 {
            self.bytes -= region.bytes();
            self.regions.remove(&number);
        }
        counts
    }
}

/// The parts of `range` that lie in one region each.
pub fn parts(range: GpaRange) -> impl Iterator<Item = GpaRange> {
    (range.start() / REGION_SIZE..range.end().div_ceil(REGION_SIZE)).filter_map(move |number| {
        let start = number * REGION_SIZE;
        let end = start.saturating_add(REGION_SIZE);
        GpaRange::new(range.start().max(start), range.end().min(end))
    })
}

/// The region that `part` lies in, and its pages there.
fn place(part: GpaRange) -> (u64, Range<usize>) {
    let number = part.start() / REGION_SIZE;
    let page = |at: u64| ((at - number * REGION_SIZE) / PAGE_SIZE) as usize;
    (
        number,
        page(part.start())..page(part.end()).min(REGION_PAGES),
    )
}

#[cfg(test)]
mod tests;
