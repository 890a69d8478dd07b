//! The tracker of lazily freed pages, beside a model that has a byte for each page.

use std::sync::Arc;

use ebb_core::generation::VmGeneration;
use ebb_core::lazy::{LazyMemory, Pieces, Sweep};
use ebb_core::range::{GpaRange, PAGE_SIZE};

use crate::Bytes;

/// Two blocks around the border of two of the tracker's regions of 128 MiB, and two more.
const FIRST: u64 = (128 << 20) - (2 << 20);
const PAGES: usize = 2048;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Page {
    InUse,
    Lazy,
    Unmapped,
    Discarded,
}

fn range(start: usize, count: usize) -> GpaRange {
    let at = |page: usize| FIRST + page as u64 * PAGE_SIZE;
    GpaRange::new(at(start), at(start + count)).expect("a range")
}

fn pages(range: GpaRange) -> std::ops::Range<usize> {
    let page = |address: u64| ((address - FIRST) / PAGE_SIZE) as usize;
    page(range.start())..page(range.end())
}

/// Some ranges, which may touch and overlap.
fn ranges(input: &mut Bytes<'_>) -> Vec<GpaRange> {
    let count = 1 + input.u8() % 4;
    let one = |_| {
        let start = usize::from(input.u16()) % PAGES;
        let count = 1 + usize::from(input.u16()) % (PAGES - start);
        range(start, count)
    };
    (0..count).map(one).collect()
}

pub fn run(input: &[u8]) {
    let mut input = Bytes::new(input);
    let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
    let mut model = vec![Page::InUse; PAGES];
    // The tracker has a lock for each of these: what takes minutes is not found sooner.
    for _ in 0..200 {
        if input.is_empty() {
            return;
        }
        step(&mut input, &lazy, &mut model);
        let bytes = |state| model.iter().filter(|page| **page == state).count() as u64 * PAGE_SIZE;
        let is = lazy.snapshot();
        assert_eq!(is.lazy_bytes, bytes(Page::Lazy));
        assert_eq!(is.unmapped_bytes, bytes(Page::Unmapped));
        assert_eq!(is.discarded_bytes, bytes(Page::Discarded));
    }
}

fn step(input: &mut Bytes<'_>, lazy: &LazyMemory, model: &mut [Page]) {
    match input.u8() % 6 {
        0 | 1 => {
            let ranges = ranges(input);
            let mut freed = 0;
            for page in ranges.iter().flat_map(|range| pages(*range)) {
                if model[page] == Page::InUse {
                    model[page] = Page::Lazy;
                    freed += PAGE_SIZE;
                }
            }
            assert_eq!(lazy.free(&ranges), freed);
        }
        2 => {
            let ranges = ranges(input);
            let last = lazy.reuse(&ranges).last;
            for page in ranges.iter().flat_map(|range| pages(*range)) {
                model[page] = Page::InUse;
            }
            assert_eq!(last, model.iter().all(|page| *page == Page::InUse));
        }
        3 => {
            lazy.reset();
            model.fill(Page::InUse);
        }
        4 => take(input, lazy, model),
        _ => {
            let range = ranges(input)[0];
            let found = lazy.survey(range).totals;
            let model = &model[pages(range)];
            let wanted = model.iter().filter(|page| **page != Page::InUse).count();
            assert_eq!(found.tracked(), wanted as u64 * PAGE_SIZE);
        }
    }
}

/// Takes chunks, and discards, invalidates or gives them back.
fn take(input: &mut Bytes<'_>, lazy: &LazyMemory, model: &mut [Page]) {
    let kind = input.u8();
    let pieces = [Pieces::Blocks, Pieces::Fragments, Pieces::Any][usize::from(kind % 3)];
    let newest = lazy.generation().saturating_sub(u64::from(kind >> 6));
    let (mut sweep, from) = match kind & 16 {
        0 => (Sweep::new(pieces, newest), Page::Lazy),
        _ => (Sweep::unmapped(pieces, newest), Page::Unmapped),
    };
    let least = if matches!(pieces, Pieces::Blocks) {
        2 << 20
    } else {
        PAGE_SIZE
    };
    let limit = least.max(u64::from(input.u16()) * PAGE_SIZE);
    for _ in 0..=input.u8() % 8 {
        let Some(chunk) = lazy.take_chunk(&mut sweep, limit) else {
            return;
        };
        let taken = pages(chunk.range());
        assert!(chunk.range().len() <= limit);
        assert!(model[taken.clone()].iter().all(|page| *page == from));
        match input.u8() % 3 {
            0 => drop(chunk),
            1 => {
                chunk.unmapped(lazy.begin_generation());
                model[taken].fill(Page::Unmapped);
            }
            _ => {
                chunk.discarded();
                model[taken].fill(Page::Discarded);
            }
        }
    }
}
