//! Memory whose content is dead: what a snapshot leaves out.

use std::thread;
use std::time::Duration;

use ebb_core::lazy::{Pieces, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

use super::GuestMemory;
use crate::guest_kernel::{GuestKernel, Lost};
use crate::memory::GuestRam;

/// Most ranges smaller than a block that are told. A guest decides how many it makes; what is beyond is saved as if it were
/// in use.
const MAX_FRAGMENTS: usize = 1 << 20;

/// A chunk that reclaim has taken is back within about a millisecond.
const WAIT: Duration = Duration::from_millis(1);

impl GuestMemory {
    /// Lazily freed memory, in whatever state, ascending: all but what lies beyond a million fragments. The machine must be
    /// paused: then reclaim moves ranges from one state to another, and nothing else happens to them.
    #[must_use]
    pub fn lazily_free(&self) -> Vec<GpaRange> {
        let mut all = Vec::new();
        for block in self.blocks() {
            loop {
                let found = self.lazy_ranges(block);
                let totals = self.lazy.survey(block).totals;
                let tracked = totals.lazy + totals.unmapped + totals.discarded + totals.reclaiming;
                if found.iter().map(|range| range.len()).sum::<u64>() == tracked {
                    found.into_iter().for_each(|range| add(&mut all, range));
                    break;
                }
                // A part is in flight.
                thread::sleep(WAIT);
            }
        }
        merge(&mut all);
        all
    }

    fn lazy_ranges(&self, block: GpaRange) -> Vec<GpaRange> {
        let sweeps = [
            Sweep::new(Pieces::Any, u64::MAX),
            Sweep::unmapped(Pieces::Any, u64::MAX),
            Sweep::discarded(),
        ];
        let mut found = Vec::new();
        for sweep in sweeps {
            let mut sweep = sweep.within(block);
            while let Some(range) = self.lazy.next_range(&mut sweep, BLOCK_SIZE) {
                found.push(range);
            }
        }
        merge(&mut found);
        found
    }

    /// What is free in the arenas, ascending. The machine must be paused.
    #[must_use]
    pub fn free_in_arenas(&self) -> Vec<GpaRange> {
        self.arenas.iter().flat_map(|arena| arena.free()).collect()
    }

    /// What is free by the guest kernel's free lists, ascending, if they are read; all but what lies beyond a million
    /// fragments. The machine must be paused.
    #[must_use]
    pub fn free_in_lists(&self) -> Vec<GpaRange> {
        let Some(kernel) = self.kernel.current() else {
            return Vec::new();
        };
        let memory = &*self.ram;
        if !kernel.is_unchanged(memory) {
            self.kernel.forget(Lost::OtherKernel);
            return Vec::new();
        }
        let (mut candidates, mut free) = (Vec::new(), Vec::new());
        for region in self.ram.regions().iter().filter(|it| memory.is_ram(it.gpa)) {
            let mut rest = Some(region.gpa);
            while let Some(within) = rest {
                let end = kernel.find_free(memory, within, 0, &mut candidates);
                for range in candidates.drain(..) {
                    listed(&kernel, memory, range, &mut free);
                }
                rest = GpaRange::new(end, region.gpa.end());
            }
        }
        merge(&mut free);
        if let Some(first) = free.first().copied()
            && kernel.poisons(memory, first)
        {
            self.kernel.forget(Lost::Poisoned);
            return Vec::new();
        }
        free
    }

    fn blocks(&self) -> impl Iterator<Item = GpaRange> {
        let regions = self.ram.regions().iter().map(|region| region.gpa);
        regions.flat_map(|gpa| {
            let starts = (gpa.start()..gpa.end()).step_by(BLOCK_SIZE as usize);
            starts.filter_map(move |at| GpaRange::new(at, gpa.end().min(at + BLOCK_SIZE)))
        })
    }
}

/// Appends the parts of `range` that are on a free list, as the largest aligned pieces that are: a vCPU may rest in the middle
/// of the allocator.
fn listed(kernel: &GuestKernel, memory: &GuestRam, range: GpaRange, free: &mut Vec<GpaRange>) {
    let (mut at, mut reader) = (range.start(), kernel.reader(memory));
    while at < range.end() {
        let aligned = (at / PAGE_SIZE).trailing_zeros().min(10);
        let piece = (0..=aligned).rev().find_map(|order| {
            let piece = GpaRange::new(at, at + (PAGE_SIZE << order))?;
            let is_free = piece.end() <= range.end() && reader.is_free(piece);
            is_free.then_some(piece)
        });
        piece.into_iter().for_each(|piece| add(free, piece));
        at = piece.map_or(at + PAGE_SIZE, GpaRange::end);
    }
}

/// Adds `range` to the ranges before it, unless it is one fragment too many.
fn add(ranges: &mut Vec<GpaRange>, range: GpaRange) {
    let is_full = ranges.len() >= MAX_FRAGMENTS;
    match ranges.last_mut() {
        Some(last) if last.end() == range.start() => {
            *last = GpaRange::new(last.start(), range.end()).unwrap_or(*last);
        }
        _ if is_full && range.len() < BLOCK_SIZE => {}
        _ => ranges.push(range),
    }
}

/// Sorts `ranges` and merges those that touch or overlap.
pub fn merge(ranges: &mut Vec<GpaRange>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let grown = (next.start() <= last.end())
            .then(|| GpaRange::new(last.start(), last.end().max(next.end())))
            .flatten();
        grown.map(|grown| *last = grown).is_some()
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_make_the_list_longer_than_a_million_fragments() {
        let mut ranges = Vec::new();
        let page = |at: u64, pages: u64| GpaRange::new(at << 12, (at + pages) << 12).unwrap();
        for at in (0..4_000_000).step_by(2) {
            add(&mut ranges, page(at, 1));
        }
        assert_eq!(ranges.len(), MAX_FRAGMENTS);
        // Whole blocks, and what continues the last range, are told all the same.
        add(&mut ranges, page(4_000_256, 512));
        add(&mut ranges, page(4_000_768, 1));
        add(&mut ranges, page(4_000_770, 1));
        assert_eq!(ranges.len(), MAX_FRAGMENTS + 1);
        assert_eq!(ranges.last(), Some(&page(4_000_256, 513)));
    }
}
