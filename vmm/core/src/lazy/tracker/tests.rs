//! The tracker against a model that knows the state of every page.

use proptest::prelude::*;

use super::*;
use crate::lazy::Pieces;
use crate::lazy::map::BLOCK_PAGES;

/// Blocks in the model, two in each of two regions.
const BLOCKS: usize = 4;
const PAGES: usize = BLOCKS * BLOCK_PAGES;
/// The first page that is in the second region.
const SECOND: usize = PAGES / 2;
/// The address of the first page.
const FIRST: u64 = REGION_SIZE - SECOND as u64 * PAGE_SIZE;

use PageState::{Discarded, InUse, Lazy, Unmapped};

fn pages(start: usize, end: usize) -> GpaRange {
    let at = |page: usize| FIRST + page as u64 * PAGE_SIZE;
    GpaRange::new(at(start), at(end)).unwrap()
}

fn index(range: GpaRange) -> Range<usize> {
    let page = |at: u64| usize::try_from((at - FIRST) / PAGE_SIZE).unwrap();
    page(range.start())..page(range.end())
}

/// A tracker and the chunks in flight, used as [`super::super::LazyMemory`] does.
#[derive(Default)]
struct Rig {
    tracker: Tracker,
    flights: Flights,
}

impl Rig {
    fn new(rearm: bool) -> Self {
        Self {
            tracker: Tracker::new(rearm),
            ..Self::default()
        }
    }

    fn free(&mut self, range: GpaRange, generation: u64) -> u64 {
        let free = |part| self.tracker.free(part, generation);
        parts(range).map(free).sum()
    }

    /// Returns the pages that were taken back, by old state.
    fn reuse(&mut self, range: GpaRange, fresh: u64) -> Counts {
        let mut counts = Counts::default();
        for part in parts(range) {
            let mut rest = Some(part);
            while let Some(gap) = rest.and_then(|rest| self.flights.first_gap(rest)) {
                let found = self.tracker.reuse(gap, &mut || fresh);
                (0..4).for_each(|state| counts[state] += found[state]);
                rest = GpaRange::new(gap.end(), part.end());
            }
        }
        counts
    }

    fn next(&self, sweep: &mut Sweep, limit: u64) -> Option<GpaRange> {
        loop {
            match self.tracker.find(sweep, limit, &self.flights) {
                Step::Found(chunk) => return Some(chunk),
                Step::More => {}
                Step::Done => return None,
            }
        }
    }

    fn take(&mut self, sweep: &mut Sweep, limit: u64) -> Option<GpaRange> {
        let chunk = self.next(sweep, limit)?;
        self.flights.add(chunk, sweep.from);
        Some(chunk)
    }

    fn finish(&mut self, chunk: GpaRange, fate: Fate) {
        self.flights.remove(chunk);
        self.tracker.finish(chunk, fate);
    }

    fn all(&self, mut sweep: Sweep, limit: u64) -> Vec<Range<usize>> {
        std::iter::from_fn(|| self.next(&mut sweep, limit).map(index)).collect()
    }

    fn totals(&self) -> Totals {
        Totals::new(self.tracker.pages(), self.flights.pages())
    }
}

fn sweep(from: PageState, pieces: Pieces, newest: u64) -> Sweep {
    Sweep {
        from,
        ..Sweep::new(pieces, newest)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Free(GpaRange),
    Reuse(GpaRange),
    Take(PageState, Pieces, usize, u64),
    Finish(usize, usize),
    /// Every address, as a reset does it.
    Clear,
}

fn range() -> impl Strategy<Value = GpaRange> {
    let small = (0..PAGES, 1..9usize);
    let big = (0..PAGES, 1..PAGES);
    let block = (0..BLOCKS, 1..=BLOCKS).prop_map(|(at, len)| (at * BLOCK_PAGES, len * BLOCK_PAGES));
    prop_oneof![3 => small, 2 => big, 2 => block]
        .prop_map(|(start, len)| pages(start, (start + len).min(PAGES)))
}

fn pieces() -> impl Strategy<Value = Pieces> {
    prop::sample::select(&[Pieces::Blocks, Pieces::Fragments, Pieces::Any][..])
}

fn waiting() -> impl Strategy<Value = PageState> {
    prop::sample::select(&[Lazy, Unmapped][..])
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => range().prop_map(Op::Free),
        6 => range().prop_map(Op::Reuse),
        6 => (waiting(), pieces(), 0..PAGES, 1..1200u64)
            .prop_map(|(from, pieces, at, limit)| Op::Take(from, pieces, at, limit)),
        6 => (any::<usize>(), 0..3usize).prop_map(|(chunk, fate)| Op::Finish(chunk, fate)),
        1 => Just(Op::Clear),
    ]
}

/// A tracker and its model.
struct Pair {
    rig: Rig,
    pages: Vec<PageState>,
    busy: Vec<bool>,
    stamps: [u64; BLOCKS],
    chunks: Vec<(GpaRange, PageState)>,
    generation: u64,
    freed: u64,
    reused: u64,
}

impl Pair {
    fn new(rearm: bool) -> Self {
        Self {
            rig: Rig::new(rearm),
            pages: vec![InUse; PAGES],
            busy: vec![false; PAGES],
            stamps: [0; BLOCKS],
            chunks: Vec::new(),
            generation: 0,
            freed: 0,
            reused: 0,
        }
    }

    fn block(block: usize) -> Range<usize> {
        block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES
    }

    /// Pages become lazy, with the present generation.
    fn become_lazy(&mut self, range: Range<usize>, from: PageState) {
        for block in 0..BLOCKS {
            let waits = |page| matches!(self.pages[page], Lazy | Unmapped);
            let fresh = !Self::block(block).any(waits);
            let in_block = |page: &usize| page / BLOCK_PAGES == block;
            for page in range.clone().filter(in_block) {
                if fresh {
                    self.stamps[block] = self.generation;
                }
                if self.pages[page] == from {
                    self.pages[page] = Lazy;
                }
            }
        }
    }

    fn reuse(&mut self, range: GpaRange) {
        let counts = self.rig.reuse(range, self.generation);
        let mut expected = Counts::default();
        for part in parts(range).map(index) {
            // Each free gap is reused by itself.
            for gap in runs(part.clone(), |page| !self.busy[page]) {
                let mut discarded = false;
                for page in gap.clone() {
                    expected[self.pages[page] as usize] += 1;
                    discarded |= self.pages[page] == Discarded;
                    self.pages[page] = InUse;
                }
                if discarded && self.rig.tracker.rearm {
                    self.become_lazy(Self::block(gap.start / BLOCK_PAGES), Discarded);
                    self.become_lazy(Self::block((gap.end - 1) / BLOCK_PAGES), Discarded);
                }
            }
        }
        assert_eq!(counts, expected);
        self.reused += counts[1..].iter().sum::<u64>();
    }

    fn apply(&mut self, op: &Op) {
        self.generation += 1;
        match *op {
            Op::Free(range) => {
                self.freed += self.rig.free(range, self.generation) / PAGE_SIZE;
                self.become_lazy(index(range), InUse);
            }
            Op::Reuse(range) => self.reuse(range),
            Op::Clear => {
                let mut at = 0;
                while let Some(region) = self.rig.tracker.next_region(at) {
                    let part = region.intersection(pages(0, PAGES)).unwrap();
                    self.reuse(part);
                    at = region.end();
                }
                assert!((0..PAGES).all(|page| self.busy[page] || self.pages[page] == InUse));
            }
            Op::Take(from, pieces, at, limit) => {
                let mut sweep = sweep(from, pieces, u64::MAX);
                sweep.at = pages(at, at + 1).start();
                let limit = limit * PAGE_SIZE;
                if let Some(chunk) = self.rig.take(&mut sweep, limit) {
                    assert!(chunk.len() <= limit && index(chunk).start >= at);
                    for page in index(chunk) {
                        assert_eq!((self.pages[page], self.busy[page]), (from, false));
                        self.busy[page] = true;
                    }
                    self.chunks.push((chunk, from));
                }
            }
            Op::Finish(chunk, fate) => {
                if self.chunks.is_empty() {
                    return;
                }
                let (chunk, from) = self.chunks.swap_remove(chunk % self.chunks.len());
                let fates = [Fate::Kept, Fate::Unmapped(self.generation), Fate::Discarded];
                self.rig.finish(chunk, fates[fate]);
                for page in index(chunk) {
                    self.busy[page] = false;
                    self.pages[page] = [from, Unmapped, Discarded][fate];
                    if fate == 1 {
                        self.stamps[page / BLOCK_PAGES] = self.generation;
                    }
                }
            }
        }
    }

    /// The tracker knows the state of each page, and its totals agree with that.
    fn check(&self) {
        let Rig { tracker, flights } = &self.rig;
        let mut counts = Counts::default();
        let mut busy = 0;
        for page in 0..PAGES {
            let mut expected = Counts::default();
            expected[self.pages[page] as usize] = 1;
            let range = pages(page, page + 1);
            let found = tracker.survey(range);
            assert!(
                found == expected || found == [0; 4] && expected[0] == 1,
                "{page}"
            );
            let in_flight = flights.survey(range).iter().sum::<u64>();
            assert_eq!(in_flight, u64::from(self.busy[page]));
            busy += in_flight;
            (1..4).for_each(|state| counts[state] += expected[state]);
        }
        assert_eq!(tracker.pages(), counts);
        let tracked: u64 = counts.iter().sum();
        assert_eq!(self.freed, tracked + self.reused, "pages are conserved");
        let totals = self.rig.totals();
        assert_eq!(totals.tracked(), tracked * PAGE_SIZE);
        assert_eq!(totals.reclaiming, busy * PAGE_SIZE);
        let begins = |&page: &usize| {
            let same = page != SECOND && page > 0 && self.pages[page - 1] == self.pages[page];
            self.pages[page] != InUse && !same
        };
        assert_eq!(tracker.ranges(), (0..PAGES).filter(begins).count() as u64);
        assert_eq!(tracker.bytes() == 0, tracked == 0);
    }

    /// A sweep finds exactly what is in its state, free, and old enough.
    fn check_sweep(&self, from: PageState, newest: u64, limit: u64) {
        let eligible = |page: usize| {
            let old = self.stamps[page / BLOCK_PAGES] <= newest;
            self.pages[page] == from && !self.busy[page] && old
        };
        let [mut whole, mut rest] = [vec![false; PAGES], vec![false; PAGES]];
        for half in [0..SECOND, SECOND..PAGES] {
            for run in runs(half, eligible) {
                for page in run.clone() {
                    let block = Self::block(page / BLOCK_PAGES);
                    let is_whole = run.start <= block.start && block.end <= run.end;
                    whole[page] = is_whole;
                    rest[page] = !is_whole;
                }
            }
        }
        let found = |pieces, limit| {
            let mut found = vec![false; PAGES];
            for chunk in self.rig.all(sweep(from, pieces, newest), limit) {
                assert!(chunk.len() as u64 * PAGE_SIZE <= limit);
                found[chunk].iter_mut().for_each(|found| {
                    assert!(!*found, "found twice");
                    *found = true;
                });
            }
            found
        };
        assert_eq!(found(Pieces::Blocks, limit.max(BLOCK_SIZE)), whole);
        let all: Vec<bool> = (0..PAGES).map(|page| whole[page] || rest[page]).collect();
        assert_eq!(found(Pieces::Any, limit), all);
        assert_eq!(found(Pieces::Fragments, u64::MAX), rest);
    }
}

/// The runs of pages in `pages` for which `holds` is true.
fn runs(pages: Range<usize>, holds: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in pages.filter(|&page| holds(page)) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn it_equals_the_model(
        ops in prop::collection::vec((op(), waiting(), any::<prop::sample::Index>(), 1..2000u64), 1..80),
        rearm in any::<bool>(),
    ) {
        let mut pair = Pair::new(rearm);
        for (op, from, newest, limit) in &ops {
            pair.apply(op);
            pair.check();
            let newest = newest.index(pair.generation as usize + 1) as u64;
            pair.check_sweep(*from, newest, limit * PAGE_SIZE);
        }
    }
}

#[test]
fn a_page_freed_beside_an_old_range_leaves_it_old() {
    let mut rig = Rig::default();
    rig.free(pages(0, 3 * BLOCK_PAGES - 1), 1);
    rig.free(pages(3 * BLOCK_PAGES - 1, 4 * BLOCK_PAGES), 2);
    let old = || rig.all(sweep(Lazy, Pieces::Any, 1), u64::MAX);
    assert_eq!(old(), [0..SECOND, SECOND..3 * BLOCK_PAGES]);
    // A block that is freed anew is young.
    rig.reuse(pages(0, BLOCK_PAGES), 0);
    rig.free(pages(0, 1), 3);
    assert_eq!(
        rig.all(sweep(Lazy, Pieces::Any, 2), u64::MAX)[0].start,
        BLOCK_PAGES
    );
}

#[test]
fn an_unmapped_page_is_never_older_than_its_invalidation() {
    let mut rig = Rig::default();
    rig.free(pages(0, 4), 1);
    let mut lazy = sweep(Lazy, Pieces::Any, u64::MAX);
    let [first, second] = [(); 2].map(|()| rig.take(&mut lazy, PAGE_SIZE).unwrap());
    rig.finish(first, Fate::Unmapped(7));
    rig.free(pages(4, 5), 3);
    rig.finish(second, Fate::Unmapped(5));
    let unmapped = |rig: &Rig, newest| rig.all(sweep(Unmapped, Pieces::Any, newest), u64::MAX);
    assert!(unmapped(&rig, 6).is_empty());
    assert_eq!(unmapped(&rig, 7), vec![0..2; 1]);
    rig.reuse(pages(0, 1), 0);
    rig.free(pages(0, 1), 2);
    assert!(
        unmapped(&rig, 6).is_empty(),
        "a late free makes it no older"
    );
}

#[test]
fn the_rest_of_a_discarded_block_is_lazy_again() {
    for rearm in [true, false] {
        let mut rig = Rig::new(rearm);
        rig.free(pages(0, 4 * BLOCK_PAGES), 1);
        let mut all = sweep(Lazy, Pieces::Blocks, u64::MAX);
        while let Some(chunk) = rig.take(&mut all, u64::MAX) {
            rig.finish(chunk, Fate::Discarded);
        }
        rig.reuse(pages(7, 8), 2);
        rig.reuse(pages(BLOCK_PAGES + 9, 2 * BLOCK_PAGES), 3);
        let block = BLOCK_PAGES as u64;
        let lazy = if rearm { block - 1 + 9 } else { 0 };
        let totals = rig.totals();
        assert_eq!(totals.lazy, lazy * PAGE_SIZE);
        assert_eq!(totals.discarded, (3 * block + 8 - lazy) * PAGE_SIZE);
        let young = rig.all(sweep(Lazy, Pieces::Any, 1), u64::MAX);
        assert_eq!(young, [], "it is as young as its reuse");
        let found = rig.all(sweep(Lazy, Pieces::Any, 2), u64::MAX);
        assert_eq!(found.len(), if rearm { 2 } else { 0 });
    }
}

#[test]
fn what_stays_discarded_is_not_brought_back() {
    let mut rig = Rig::new(true);
    rig.free(pages(0, BLOCK_PAGES), 1);
    let mut lazy = sweep(Lazy, Pieces::Any, u64::MAX);
    let mut discard = |rig: &mut Rig, limit| {
        let chunk = rig.take(&mut lazy, limit).unwrap();
        rig.finish(chunk, Fate::Discarded);
    };
    let nothing: &mut dyn FnMut() -> u64 = &mut || unreachable!("nothing is brought back");
    // The host still has this page, so the guest's touch brings no other one.
    discard(&mut rig, 2 * PAGE_SIZE);
    rig.tracker.reuse(pages(2, 3), nothing);
    assert_eq!(rig.totals().discarded, 2 * PAGE_SIZE);
    // No page of the block is left.
    discard(&mut rig, u64::MAX);
    rig.tracker.reuse(pages(0, BLOCK_PAGES), nothing);
    assert_eq!(rig.totals().tracked(), 0);
}

#[test]
fn a_failed_chunk_is_not_met_again_by_its_sweep() {
    let mut rig = Rig::default();
    rig.free(pages(0, 8), 1);
    let mut sweep = Sweep::new(Pieces::Any, 1);
    for start in [0, 4] {
        let chunk = rig.take(&mut sweep, 4 * PAGE_SIZE).unwrap();
        assert_eq!(chunk, pages(start, start + 4));
        rig.finish(chunk, Fate::Kept);
    }
    assert_eq!(rig.take(&mut sweep, 4 * PAGE_SIZE), None);
    assert_eq!(rig.totals().lazy, 8 * PAGE_SIZE);
}

#[test]
fn a_step_looks_at_one_region() {
    let mut rig = Rig::default();
    rig.free(pages(0, PAGES), 5);
    let mut sweep = Sweep::new(Pieces::Any, 4);
    let mut step = || rig.tracker.find(&mut sweep, u64::MAX, &rig.flights);
    assert_eq!(
        [step(), step(), step()],
        [Step::More, Step::More, Step::Done]
    );
}

/// Every other page of many regions: none is refused, and the memory that it takes has a bound.
#[test]
#[cfg_attr(miri, ignore = "takes minutes there")]
fn a_storm_of_fragments_is_tracked_in_bounded_memory() {
    const REGIONS: u64 = 8;
    let mut tracker = Tracker::default();
    let page = |at: u64| GpaRange::new(at * PAGE_SIZE, (at + 1) * PAGE_SIZE).unwrap();
    let even = (0..REGIONS * REGION_PAGES as u64).step_by(2);
    for at in even.clone() {
        assert_eq!(tracker.free(page(at), at), PAGE_SIZE);
    }
    let pages = REGIONS * REGION_PAGES as u64;
    assert_eq!(
        (tracker.pages()[1], tracker.ranges()),
        (pages / 2, pages / 2)
    );
    assert!(
        tracker.bytes() * 14_000 < pages * PAGE_SIZE,
        "{}",
        tracker.bytes()
    );
    for at in even {
        tracker.reuse(page(at), &mut || 0);
    }
    assert_eq!(
        (tracker.pages(), tracker.ranges(), tracker.bytes()),
        ([0; 4], 0, 0)
    );
}

/// The maps of a region are there while one of its blocks is split.
#[test]
fn whole_blocks_take_no_maps() {
    let mut rig = Rig::default();
    rig.free(pages(0, SECOND), 1);
    let whole = rig.tracker.bytes();
    rig.reuse(pages(0, 1), 0);
    rig.reuse(pages(BLOCK_PAGES, BLOCK_PAGES + 1), 0);
    assert_eq!(rig.tracker.bytes(), whole + REGION_SIZE / PAGE_SIZE / 4);
    rig.free(pages(0, 1), 2);
    assert!(rig.tracker.bytes() > whole);
    rig.free(pages(BLOCK_PAGES, BLOCK_PAGES + 1), 2);
    assert_eq!(rig.tracker.bytes(), whole);
    rig.reuse(pages(5, 6), 0);
    rig.reuse(pages(0, BLOCK_PAGES), 0);
    assert_eq!(rig.tracker.bytes(), whole);
}
