//! The tracker against a model that knows the state of every page.

use proptest::prelude::*;

use super::*;
use crate::lazy::Pieces;
use crate::range::{BLOCK_SIZE, PAGE_SIZE};

/// Pages in the model: three blocks.
const PAGES: u64 = 3 * BLOCK_SIZE / PAGE_SIZE;

/// What [`Tracker::take`] has taken.
#[derive(Debug, PartialEq, Eq)]
enum Took {
    Chunk(GpaRange),
    More,
    Done,
}

impl Tracker {
    /// Finds and claims the next chunk.
    fn take(&mut self, sweep: &mut Sweep, limit: u64) -> Took {
        match self.find(sweep, limit) {
            Step::Found(candidate) => Took::Chunk(self.claim(candidate)),
            Step::More => Took::More,
            Step::Done => Took::Done,
        }
    }

    /// The tracked ranges in ascending order, with generation and state.
    fn iter(&self) -> impl Iterator<Item = (GpaRange, u64, RangeState)> {
        self.spans.iter().filter_map(|(&start, span)| {
            let range = GpaRange::new(start, span.end())?;
            Some((range, span.generation, span.state()))
        })
    }
}

/// State of a page, `None` for in use, and the latest generation that may be on it.
type Page = Option<RangeState>;

fn pages(start: u64, end: u64) -> GpaRange {
    GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
}

fn index(range: GpaRange) -> std::ops::Range<usize> {
    let page = |address| usize::try_from(address / PAGE_SIZE).unwrap();
    page(range.start())..page(range.end())
}

/// What the tracker says of every page, after checking that its totals and its shape agree with that.
fn recount(tracker: &Tracker) -> Vec<Page> {
    let mut found = vec![None; usize::try_from(PAGES).unwrap()];
    let mut last: Option<(GpaRange, RangeState)> = None;
    for (range, _, state) in tracker.iter() {
        if let Some((before, previous)) = last {
            assert!(before.end() <= range.start());
            let merged = previous != state || state == RangeState::Reclaiming;
            assert!(
                before.end() < range.start() || merged,
                "{before:x?} and {range:x?}"
            );
        }
        found[index(range)].fill(Some(state));
        last = Some((range, state));
    }
    let bytes =
        |state| found.iter().filter(|&&page| page == Some(state)).count() as u64 * PAGE_SIZE;
    let totals = Totals {
        lazy: bytes(RangeState::Lazy),
        unmapped: bytes(RangeState::Unmapped),
        reclaiming: bytes(RangeState::Reclaiming),
        discarded: bytes(RangeState::Discarded),
        ranges: tracker.iter().count(),
    };
    assert_eq!(tracker.totals(), totals);
    found
}

#[derive(Clone, Debug)]
enum Op {
    Free(GpaRange),
    Reuse(GpaRange),
    Take(RangeState, Pieces, u64, u64),
    Finish(usize, Fate),
    Clear,
}

fn range() -> impl Strategy<Value = GpaRange> {
    let small = (0..PAGES, 1..9u64);
    let big = (0..PAGES, 1..PAGES);
    prop_oneof![3 => small, 1 => big]
        .prop_map(|(start, len)| pages(start, (start + len).min(PAGES)))
}

fn op() -> impl Strategy<Value = Op> {
    let pieces = prop_oneof![
        Just(Pieces::Blocks),
        Just(Pieces::Fragments),
        Just(Pieces::Any)
    ];
    let from = prop_oneof![Just(RangeState::Lazy), Just(RangeState::Unmapped)];
    let fate = prop_oneof![
        Just(Fate::Kept),
        Just(Fate::Unmapped(7)),
        Just(Fate::Discarded)
    ];
    prop_oneof![
        8 => range().prop_map(Op::Free),
        6 => range().prop_map(Op::Reuse),
        5 => (from, pieces, 0..PAGES, 1..600u64)
            .prop_map(|(from, pieces, at, limit)| Op::Take(from, pieces, at, limit)),
        5 => (any::<usize>(), fate).prop_map(|(chunk, fate)| Op::Finish(chunk, fate)),
        1 => Just(Op::Clear),
    ]
}

/// A tracker and its model.
struct Pair {
    tracker: Tracker,
    model: Vec<Page>,
    chunks: Vec<(GpaRange, RangeState)>,
    generation: u64,
    /// Bytes that the tracker may and does leave in use.
    untracked: u64,
    /// Bytes that the tracker may and does make lazy again.
    coalesced: u64,
    freed: u64,
    taken: u64,
    refused: u64,
}

impl Pair {
    fn new(max_ranges: usize) -> Self {
        Self {
            tracker: Tracker::new(max_ranges),
            model: vec![None; usize::try_from(PAGES).unwrap()],
            chunks: Vec::new(),
            generation: 0,
            untracked: 0,
            coalesced: 0,
            freed: 0,
            taken: 0,
            refused: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Free(range) => {
                self.generation += 1;
                let freed = self.tracker.free(range, self.generation);
                self.freed += freed.lazy;
                self.refused += freed.refused;
                for page in &mut self.model[index(range)] {
                    *page = page.or(Some(RangeState::Lazy));
                }
            }
            Op::Reuse(range) => {
                let reused = self.tracker.reuse(range);
                self.taken += reused.bytes();
                let reclaiming = |page: &Page| *page == Some(RangeState::Reclaiming);
                let part = &mut self.model[index(range)];
                assert_eq!(reused.busy, part.iter().any(reclaiming));
                let bytes = |state| {
                    part.iter().filter(|&&page| page == Some(state)).count() as u64 * PAGE_SIZE
                };
                assert_eq!(reused.lazy, bytes(RangeState::Lazy));
                assert_eq!(reused.unmapped, bytes(RangeState::Unmapped));
                assert_eq!(reused.discarded, bytes(RangeState::Discarded));
                for page in part.iter_mut().filter(|page| !reclaiming(page)) {
                    *page = None;
                }
            }
            Op::Take(from, pieces, at, limit) => {
                let mut sweep = Sweep::new(pieces, u64::MAX);
                sweep.from = from;
                sweep.at = at * PAGE_SIZE;
                if let Took::Chunk(chunk) = self.tracker.take(&mut sweep, limit * PAGE_SIZE) {
                    assert!(chunk.len() <= limit * PAGE_SIZE && chunk.start() >= at * PAGE_SIZE);
                    let part = &mut self.model[index(chunk)];
                    assert!(part.iter().all(|page| *page == Some(from)));
                    part.fill(Some(RangeState::Reclaiming));
                    self.chunks.push((chunk, from));
                }
            }
            Op::Finish(chunk, fate) => {
                if self.chunks.is_empty() {
                    return;
                }
                let (chunk, from) = self.chunks.swap_remove(chunk % self.chunks.len());
                self.tracker.finish(chunk, fate);
                let state = match fate {
                    Fate::Kept => from,
                    Fate::Unmapped(_) => RangeState::Unmapped,
                    Fate::Discarded => RangeState::Discarded,
                };
                self.model[index(chunk)].fill(Some(state));
            }
            Op::Clear => {
                self.taken += self.tracker.clear().bytes();
                for page in &mut self.model {
                    *page = page.filter(|state| *state == RangeState::Reclaiming);
                }
            }
        }
    }

    /// Every page is as in the model, or was left in use or made lazy for want of room and is counted.
    fn check(&mut self) {
        let found = recount(&self.tracker);
        for (page, model) in found.iter().zip(&mut self.model) {
            match (*page, *model) {
                (page, model) if page == model => continue,
                (None, Some(RangeState::Reclaiming)) => panic!("a chunk is never given up"),
                (None, _) => self.untracked += PAGE_SIZE,
                // Forgotten by the free that then met it as memory in use.
                (Some(RangeState::Lazy), Some(RangeState::Discarded)) => {
                    self.untracked += PAGE_SIZE;
                }
                (Some(RangeState::Lazy), Some(RangeState::Unmapped)) => self.coalesced += PAGE_SIZE,
                (page, model) => panic!("{page:?} instead of {model:?}"),
            }
            *model = *page;
        }
        let squeezed = self.tracker.squeezed();
        let untracked = self.refused + squeezed.given_up + squeezed.forgotten;
        // What is forgotten and then refused by one free counts twice there and is one page here.
        assert!(self.untracked <= untracked && untracked - self.untracked <= self.refused);
        let totals = self.tracker.totals();
        let tracked = totals.lazy + totals.unmapped + totals.reclaiming + totals.discarded;
        let gone = self.taken + squeezed.given_up + squeezed.forgotten;
        assert_eq!(self.freed, tracked + gone, "bytes are conserved");
        assert_eq!(self.coalesced, squeezed.coalesced);
        assert!(self.tracker.totals().ranges <= self.tracker.max_ranges);
    }
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn with_room_it_equals_the_model(ops in prop::collection::vec(op(), 1..120)) {
        let mut pair = Pair::new(10_000);
        for op in &ops {
            pair.apply(op);
            pair.check();
        }
        prop_assert_eq!((pair.untracked, pair.coalesced), (0, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes there")]
    fn without_room_it_falls_back_to_in_use(
        ops in prop::collection::vec(op(), 1..120),
        max_ranges in 1..20usize,
    ) {
        let mut pair = Pair::new(max_ranges);
        for op in &ops {
            pair.apply(op);
            pair.check();
        }
    }
}

#[test]
fn merged_ranges_carry_the_later_generation() {
    let mut tracker = Tracker::new(100);
    tracker.free(pages(0, 1), 1);
    tracker.free(pages(2, 3), 2);
    assert_eq!(tracker.free(pages(0, 4), 3).lazy, 2 * PAGE_SIZE);
    assert_eq!(
        tracker.iter().collect::<Vec<_>>(),
        [(pages(0, 4), 3, RangeState::Lazy)]
    );
    tracker.reuse(pages(1, 2));
    tracker.free(pages(1, 2), 2);
    assert_eq!(
        tracker.iter().next(),
        Some((pages(0, 4), 3, RangeState::Lazy))
    );
}

#[test]
fn a_sweep_leaves_younger_ranges() {
    let mut tracker = Tracker::new(100);
    tracker.free(pages(0, 1), 1);
    tracker.free(pages(2, 3), 5);
    tracker.free(pages(4, 5), 3);
    let mut sweep = Sweep::new(Pieces::Any, 3);
    assert_eq!(tracker.take(&mut sweep, u64::MAX), Took::Chunk(pages(0, 1)));
    assert_eq!(tracker.take(&mut sweep, u64::MAX), Took::Chunk(pages(4, 5)));
    assert_eq!(tracker.take(&mut sweep, u64::MAX), Took::Done);
}

#[test]
fn a_failed_chunk_is_not_met_again_by_its_sweep() {
    let mut tracker = Tracker::new(100);
    tracker.free(pages(0, 8), 1);
    let mut sweep = Sweep::new(Pieces::Any, 1);
    for start in [0, 4] {
        let chunk = pages(start, start + 4);
        assert_eq!(tracker.take(&mut sweep, 4 * PAGE_SIZE), Took::Chunk(chunk));
        tracker.finish(chunk, Fate::Kept);
    }
    assert_eq!(tracker.take(&mut sweep, 4 * PAGE_SIZE), Took::Done);
    assert_eq!(tracker.totals().lazy, 8 * PAGE_SIZE);
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes there")]
fn a_step_looks_at_a_bounded_number_of_ranges() {
    let mut tracker = Tracker::new(10_000);
    for page in 0..2000 {
        tracker.free(pages(2 * page, 2 * page + 1), 1);
    }
    let mut sweep = Sweep::new(Pieces::Blocks, 1);
    assert_eq!(tracker.take(&mut sweep, u64::MAX), Took::More);
    assert_eq!(tracker.take(&mut sweep, u64::MAX), Took::Done);
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes there")]
fn a_storm_of_fragments_does_not_grow_it() {
    let mut tracker = Tracker::new(64);
    let mut refused = 0;
    for page in 0..10_000 {
        refused += tracker.free(pages(2 * page, 2 * page + 1), page).refused;
    }
    assert_eq!(tracker.totals().ranges, 56);
    assert_eq!(refused, (10_000 - 56) * PAGE_SIZE);
    for page in 0..10_000 {
        tracker.reuse(pages(2 * page, 2 * page + 1));
    }
    assert_eq!(tracker.totals(), Totals::default());
}

/// Discards every other one of `count` ranges of a page, 2 pages apart.
fn discard_every_other(tracker: &mut Tracker, count: u64) {
    for page in 0..count {
        tracker.free(pages(2 * page, 2 * page + 1), 1);
    }
    let mut sweep = Sweep::new(Pieces::Any, 1);
    let mut turn = 0;
    while let Took::Chunk(chunk) = tracker.take(&mut sweep, u64::MAX) {
        turn += 1;
        let fate = [Fate::Kept, Fate::Discarded][turn % 2];
        tracker.finish(chunk, fate);
    }
}

#[test]
fn a_full_tracker_forgets_what_is_discarded_first() {
    let mut tracker = Tracker::new(64);
    discard_every_other(&mut tracker, 56);
    assert_eq!(tracker.totals().discarded, 28 * PAGE_SIZE);
    assert_eq!(tracker.free(pages(1000, 1001), 2).refused, 0);
    let totals = tracker.totals();
    assert_eq!((totals.discarded, totals.ranges), (0, 29));
    assert_eq!(tracker.squeezed().forgotten, 28 * PAGE_SIZE);
    assert_eq!(tracker.squeezed().given_up, 0);
}

#[test]
fn then_unmapped_ranges_become_one_with_their_neighbours() {
    let mut tracker = Tracker::new(64);
    for page in 0..28 {
        tracker.free(pages(4 * page, 4 * page + 2), 1);
    }
    let mut sweep = Sweep::new(Pieces::Any, 1);
    for page in 0..28 {
        let first = tracker.take(&mut sweep, PAGE_SIZE);
        assert_eq!(first, Took::Chunk(pages(4 * page, 4 * page + 1)));
        tracker.take(&mut sweep, PAGE_SIZE);
        tracker.finish(pages(4 * page, 4 * page + 1), Fate::Unmapped(2));
        tracker.finish(pages(4 * page + 1, 4 * page + 2), Fate::Kept);
    }
    assert_eq!(tracker.totals().ranges, 56);
    assert_eq!(tracker.free(pages(1000, 1001), 3).refused, 0);
    let totals = tracker.totals();
    assert_eq!((totals.unmapped, totals.ranges), (0, 29));
    assert_eq!(tracker.squeezed().coalesced, 28 * PAGE_SIZE);
    let (_, generation, state) = tracker.iter().next().unwrap();
    assert_eq!((generation, state), (2, RangeState::Lazy));
}

#[test]
fn a_failed_chunk_is_what_it_was_and_keeps_its_generation() {
    let mut tracker = Tracker::new(64);
    tracker.free(pages(0, 4), 1);
    let take = |tracker: &mut Tracker, sweep: Sweep| tracker.take(&mut { sweep }, u64::MAX);
    let chunk = Took::Chunk(pages(0, 4));
    assert_eq!(take(&mut tracker, Sweep::new(Pieces::Any, 1)), chunk);
    tracker.finish(pages(0, 4), Fate::Unmapped(5));
    let unmapped = |newest| Sweep::unmapped(Pieces::Any, newest);
    assert_eq!(take(&mut tracker, unmapped(4)), Took::Done);
    assert_eq!(take(&mut tracker, unmapped(5)), chunk);
    tracker.finish(pages(0, 4), Fate::Kept);
    let found = tracker.iter().next();
    assert_eq!(found, Some((pages(0, 4), 5, RangeState::Unmapped)));
    assert_eq!(take(&mut tracker, Sweep::new(Pieces::Any, 9)), Took::Done);
}

/// An entry's size and the least fill of a node of std's B-tree (5 of 11) bound the bookkeeping.
#[test]
fn the_default_bound_is_less_than_a_mebibyte() {
    let leaf = 11 * (size_of::<u64>() + size_of::<Span>()) + 16;
    let inner = leaf + 12 * size_of::<usize>();
    let leaves = DEFAULT_MAX_RANGES / 5;
    assert!(leaves * leaf + leaves / 5 * inner < 1 << 20);
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes there")]
fn a_survey_counts_what_lies_in_the_range_and_ends_in_bounded_time() {
    let mut tracker = Tracker::new(1 << 16);
    tracker.free(pages(2, 6), 1);
    let Took::Chunk(chunk) = tracker.take(&mut Sweep::new(Pieces::Any, 1), 2 * PAGE_SIZE) else {
        panic!("there is a chunk");
    };
    tracker.finish(chunk, Fate::Discarded);
    let survey = tracker.survey(pages(3, 20));
    let expected = Totals {
        lazy: 2 * PAGE_SIZE,
        discarded: PAGE_SIZE,
        ranges: 2,
        ..Totals::default()
    };
    assert_eq!((survey.totals, survey.end), (expected, 20 * PAGE_SIZE));
    for page in 0..2 * SCAN_LIMIT as u64 {
        tracker.free(pages(100 + 2 * page, 101 + 2 * page), 1);
    }
    let survey = tracker.survey(pages(99, 1 << 20));
    assert_eq!(survey.totals.ranges, SCAN_LIMIT);
    assert_eq!(survey.end, (100 + 2 * SCAN_LIMIT as u64 - 1) * PAGE_SIZE);
    let rest = tracker.survey(GpaRange::new(survey.end, PAGE_SIZE << 20).unwrap());
    assert_eq!(rest.totals.ranges, SCAN_LIMIT);
}
