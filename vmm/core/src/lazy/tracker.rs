//! The range tracker: an interval map with totals. For one thread; no system calls.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::Sweep;
use crate::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

/// Default maximum number of ranges. An entry takes 24 bytes, in nodes of 11 entries that are at least 5/11 full:
/// less than 1 MiB, whatever a hostile guest does.
pub const DEFAULT_MAX_RANGES: usize = 12 << 10;

/// Maximum number of ranges that one step of a sweep looks at, so that the caller can release its lock in between.
const SCAN_LIMIT: usize = 1024;

/// The state of a range that the guest has freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeState {
    /// The guest has promised not to touch it before a reuse. Its pages are still there.
    Lazy,
    /// No vCPU that has seen its generation has a translation of it, and the host may take its pages.
    Unmapped,
    /// A chunk that is being invalidated or discarded.
    Reclaiming,
    /// Its pages are returned to the host.
    Discarded,
}

/// How the work on a chunk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing has happened, or nothing that is certain: it is what it was.
    Kept,
    /// It is [`RangeState::Unmapped`], and this generation began after that.
    Unmapped(u64),
    /// It is [`RangeState::Discarded`].
    Discarded,
}

/// A range without its start, which is its key. The state is in the low bits of the end, which is a multiple of the
/// page size: this saves a third of the tracker's memory.
#[derive(Clone, Copy, Debug)]
struct Span {
    end_and_state: u64,
    generation: u64,
}

const STATE_MASK: u64 = 3;
/// The bit of a chunk that was taken from [`RangeState::Unmapped`]; without it, from [`RangeState::Lazy`].
const WAS_UNMAPPED: u64 = 4;
const _: () = assert!((STATE_MASK | WAS_UNMAPPED) & !(PAGE_SIZE - 1) == 0);

impl Span {
    const fn new(end: u64, generation: u64, state: RangeState) -> Self {
        Self {
            end_and_state: end | state as u64,
            generation,
        }
    }

    /// The range `start..end` as a chunk, taken out of this one.
    const fn chunk(self, end: u64) -> Self {
        let was = if matches!(self.state(), RangeState::Unmapped) {
            WAS_UNMAPPED
        } else {
            0
        };
        let mut chunk = Self::new(end, self.generation, RangeState::Reclaiming);
        chunk.end_and_state |= was;
        chunk
    }

    const fn end(self) -> u64 {
        self.end_and_state & !(PAGE_SIZE - 1)
    }

    const fn state(self) -> RangeState {
        match self.end_and_state & STATE_MASK {
            0 => RangeState::Lazy,
            1 => RangeState::Unmapped,
            2 => RangeState::Reclaiming,
            _ => RangeState::Discarded,
        }
    }

    /// The state that a chunk was taken from.
    const fn origin(self) -> RangeState {
        if self.end_and_state & WAS_UNMAPPED == 0 {
            RangeState::Lazy
        } else {
            RangeState::Unmapped
        }
    }
}

/// Bytes by state, and the number of ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes in `RangeState::Lazy`.
    pub lazy: u64,
    /// Bytes in `RangeState::Unmapped`.
    pub unmapped: u64,
    /// Bytes in `RangeState::Reclaiming`.
    pub reclaiming: u64,
    /// Bytes in `RangeState::Discarded`.
    pub discarded: u64,
    /// Ranges in any state.
    pub ranges: usize,
}

/// What the maximum number of ranges has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Squeezed {
    /// Bytes that are in use again because a split had no room for both parts.
    pub given_up: u64,
    /// Discarded bytes that were forgotten: in use again, with their pages gone, as memory that was never touched.
    pub forgotten: u64,
    /// Unmapped bytes that became lazy again, to be one range with a neighbour.
    pub coalesced: u64,
}

/// What a free did, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Were in use and are lazy now.
    pub lazy: u64,
    /// Stay in use because the tracker is full.
    pub refused: u64,
}

/// What a reuse did: bytes that are in use now, by their states before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reused {
    /// Were lazy.
    pub lazy: u64,
    /// Were unmapped.
    pub unmapped: u64,
    /// Were discarded.
    pub discarded: u64,
    /// Some bytes are in a chunk, and stay as they were.
    pub busy: bool,
}

impl Reused {
    /// All these bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.lazy + self.unmapped + self.discarded
    }
}

/// The states in a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Surveyed {
    /// Bytes by state, and the number of ranges.
    pub totals: Totals,
    /// First address that was not looked at.
    pub end: u64,
}

/// What one step of a [`Sweep`] has found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// A chunk, for [`Tracker::claim`].
    Found(Candidate),
    /// Nothing yet, after as many ranges as one step may look at.
    More,
    /// The end of the sweep.
    Done,
}

/// A chunk that [`Tracker::find`] has found, for [`Tracker::claim`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    start: u64,
    span: Span,
    chunk: GpaRange,
}

/// Which ranges of the guest's memory are not in use, and in which state.
///
/// Adjacent ranges in one state are one range with the later generation; chunks are never merged. An operation that
/// meets k of n ranges takes O((k + 1) log n).
///
/// The number of ranges has a maximum. Frees may use 7/8 of it; the rest is for the splits that reuses and chunks
/// make. A tracker without room, in this order:
/// 1. forgets discarded ranges, small ones first: for the guest they are like memory that was never touched;
/// 2. joins unmapped ranges with their lazy neighbours;
/// 3. refuses frees, and gives up the smaller part of a split. That memory is in use then, which is always legal: the
///    host need not use what a lazy free offers.
///
/// Steps 1 and 2 walk all ranges, so they are tried once for every `max_ranges / 8` frees that need room.
#[derive(Debug)]
pub struct Tracker {
    spans: BTreeMap<u64, Span>,
    totals: Totals,
    max_ranges: usize,
    squeezed: Squeezed,
    /// Number of frees that need room until all ranges are walked again.
    until_walk: usize,
}

impl Tracker {
    /// An empty tracker for at most `max_ranges` ranges, at least 1.
    #[must_use]
    pub fn new(max_ranges: usize) -> Self {
        Self {
            spans: BTreeMap::new(),
            totals: Totals::default(),
            max_ranges: max_ranges.max(1),
            squeezed: Squeezed::default(),
            until_walk: 0,
        }
    }

    /// Bytes by state.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            ranges: self.spans.len(),
            ..self.totals
        }
    }

    /// What the maximum number of ranges has cost so far.
    #[must_use]
    pub const fn squeezed(&self) -> Squeezed {
        self.squeezed
    }

    /// Adds up the states in `range`, from its start on. Looks at a limited number of ranges and says where it
    /// stopped.
    #[must_use]
    pub fn survey(&self, range: GpaRange) -> Surveyed {
        let mut found = Self::new(1);
        let mut at = range.start();
        for _ in 0..SCAN_LIMIT {
            let part = self.first_from(at).and_then(|(start, span)| {
                let part = GpaRange::new(start.max(at), span.end().min(range.end()))?;
                Some((part, span.state()))
            });
            let Some((part, state)) = part else {
                at = range.end();
                break;
            };
            *found.total(state) += part.len();
            found.totals.ranges += 1;
            at = part.end();
        }
        Surveyed {
            totals: found.totals,
            end: at,
        }
    }

    /// Makes what is in use in `range` lazy, with `generation`. What is not in use stays as it is.
    pub fn free(&mut self, range: GpaRange, generation: u64) -> Freed {
        let mut freed = Freed::default();
        let mut at = range.start();
        while at < range.end() {
            let next = self.first_from(at);
            if let Some((start, span)) = next
                && start <= at
            {
                at = span.end();
                continue;
            }
            let end = next.map_or(range.end(), |(start, _)| start.min(range.end()));
            let Some(gap) = GpaRange::new(at, end) else {
                break;
            };
            if self.has_room() || self.touches_lazy(gap) || self.squeeze() {
                freed.lazy += gap.len();
                self.put(gap, generation, RangeState::Lazy);
            } else {
                freed.refused += gap.len();
            }
            at = end;
        }
        freed
    }

    /// Makes `range` in use, except for chunks.
    pub fn reuse(&mut self, range: GpaRange) -> Reused {
        let mut reused = Reused::default();
        let mut at = range.start();
        while let Some((start, span)) = self.first_from(at) {
            let Some(part) = GpaRange::new(start.max(at), span.end().min(range.end())) else {
                break;
            };
            at = part.end();
            let bytes = match span.state() {
                RangeState::Lazy => &mut reused.lazy,
                RangeState::Unmapped => &mut reused.unmapped,
                RangeState::Discarded => &mut reused.discarded,
                RangeState::Reclaiming => {
                    reused.busy = true;
                    continue;
                }
            };
            *bytes += part.len();
            self.cut(start, part, 0);
        }
        reused
    }

    /// Looks for the next chunk of at most `limit` bytes for `sweep`.
    pub(super) fn find(&self, sweep: &mut Sweep, limit: u64) -> Step {
        for _ in 0..SCAN_LIMIT {
            let Some((start, span)) = self.first_from(sweep.at) else {
                return Step::Done;
            };
            if start >= sweep.end {
                return Step::Done;
            }
            let ahead = GpaRange::new(start.max(sweep.at), span.end().min(sweep.end));
            sweep.at = span.end();
            if span.state() != sweep.from || span.generation > sweep.newest {
                continue;
            }
            if let Some(chunk) = ahead.and_then(|ahead| sweep.pieces.pick(ahead, limit)) {
                sweep.at = chunk.end();
                return Step::Found(Candidate { start, span, chunk });
            }
        }
        Step::More
    }

    /// Takes the chunk that was found. Nothing may have changed since.
    pub(super) fn claim(&mut self, candidate: Candidate) -> GpaRange {
        let Candidate { start, span, chunk } = candidate;
        self.cut(start, chunk, 1);
        self.totals.reclaiming += chunk.len();
        self.spans.insert(chunk.start(), span.chunk(chunk.end()));
        chunk
    }

    /// Ends the work on a chunk that [`Tracker::claim`] has returned.
    pub fn finish(&mut self, chunk: GpaRange, fate: Fate) {
        let span = self.spans.get(&chunk.start()).copied();
        debug_assert!(
            span.is_some_and(
                |span| span.end() == chunk.end() && span.state() == RangeState::Reclaiming
            ),
            "{chunk:x?} is no chunk"
        );
        if let Some(span) = span {
            self.remove(chunk.start());
            let (generation, state) = match fate {
                Fate::Kept => (span.generation, span.origin()),
                Fate::Unmapped(generation) => (generation, RangeState::Unmapped),
                Fate::Discarded => (span.generation, RangeState::Discarded),
            };
            self.put(chunk, generation, state);
        }
    }

    /// Makes everything in use, except for chunks.
    pub fn clear(&mut self) -> Reused {
        let Totals {
            lazy,
            unmapped,
            discarded,
            reclaiming,
            ..
        } = self.totals;
        self.spans
            .retain(|_, span| span.state() == RangeState::Reclaiming);
        self.totals = Totals {
            reclaiming,
            ..Totals::default()
        };
        Reused {
            lazy,
            unmapped,
            discarded,
            busy: reclaiming > 0,
        }
    }

    const fn room(&self) -> usize {
        self.max_ranges - self.max_ranges / 8
    }

    fn has_room(&self) -> bool {
        self.spans.len() < self.room()
    }

    /// Makes room for a range if it is time to try, see [`Tracker`]. Returns true if there is room now.
    fn squeeze(&mut self) -> bool {
        if self.until_walk > 0 {
            self.until_walk -= 1;
            return false;
        }
        self.until_walk = self.max_ranges / 8;
        let enough = self.room() - self.max_ranges / 8;
        for size in [BLOCK_SIZE, u64::MAX] {
            if self.spans.len() > enough {
                self.forget_discarded(size);
            }
        }
        if self.spans.len() > enough {
            self.coalesce();
        }
        self.has_room()
    }

    /// Forgets discarded ranges that are smaller than `size`.
    fn forget_discarded(&mut self, size: u64) {
        let mut forgotten = 0;
        self.spans.retain(|&start, span| {
            let len = span.end() - start;
            let forget = span.state() == RangeState::Discarded && len < size;
            forgotten += if forget { len } else { 0 };
            !forget
        });
        self.totals.discarded -= forgotten;
        self.squeezed.forgotten += forgotten;
    }

    /// Makes unmapped ranges lazy that have a lazy neighbour.
    fn coalesce(&mut self) {
        let mut before: Option<(u64, RangeState)> = None;
        let mut found = Vec::new();
        for (&start, span) in &self.spans {
            let state = span.state();
            if let Some((end, previous)) = before
                && end == start
            {
                match (previous, state) {
                    (RangeState::Lazy, RangeState::Unmapped) => found.push(start),
                    (RangeState::Unmapped, RangeState::Lazy) => found.push(end - 1),
                    _ => {}
                }
            }
            before = Some((span.end(), state));
        }
        for address in found {
            let holds = |&(start, span): &(u64, Span)| {
                start <= address && span.state() == RangeState::Unmapped
            };
            let Some((start, span)) = self.first_from(address).filter(holds) else {
                continue;
            };
            let Some(range) = GpaRange::new(start, span.end()) else {
                continue;
            };
            self.remove(start);
            self.squeezed.coalesced += range.len();
            self.put(range, span.generation, RangeState::Lazy);
        }
    }

    /// The range that holds `at`, or the first one after it.
    fn first_from(&self, at: u64) -> Option<(u64, Span)> {
        let holds = |(_, span): &(&u64, &Span)| span.end() > at;
        let here = self.spans.range(..=at).next_back().filter(holds);
        let found = here.or_else(|| self.spans.range(at..).next());
        found.map(|(&start, &span)| (start, span))
    }

    /// Returns true if a lazy range is right before or right after `gap`.
    fn touches_lazy(&self, gap: GpaRange) -> bool {
        self.neighbours(gap, RangeState::Lazy)
            .iter()
            .any(Option::is_some)
    }

    /// The ranges in `state` right before and right after `range`.
    fn neighbours(&self, range: GpaRange, state: RangeState) -> [Option<u64>; 2] {
        let before = self.spans.range(..range.start()).next_back();
        let before = before.filter(|(_, span)| span.end() == range.start());
        let after = self.spans.get_key_value(&range.end());
        [before, after].map(|span| {
            let (&start, _) = span.filter(|(_, span)| span.state() == state)?;
            Some(start)
        })
    }

    /// Adds a range that is no chunk, and merges it with its neighbours.
    fn put(&mut self, range: GpaRange, mut generation: u64, state: RangeState) {
        let (mut start, mut end) = (range.start(), range.end());
        for neighbour in self.neighbours(range, state).into_iter().flatten() {
            let Some(span) = self.remove(neighbour) else {
                continue;
            };
            start = start.min(neighbour);
            end = end.max(span.end());
            generation = generation.max(span.generation);
        }
        *self.total(state) += end - start;
        self.spans.insert(start, Span::new(end, generation, state));
    }

    /// Takes `part` out of the range that begins at `start`. Keeps what is left on both sides, the bigger one first,
    /// if there is room for it and for `extra` ranges that the caller will add.
    fn cut(&mut self, start: u64, part: GpaRange, extra: usize) {
        let Some(span) = self.remove(start) else {
            return;
        };
        let mut rest = [
            GpaRange::new(start, part.start()),
            GpaRange::new(part.end(), span.end()),
        ];
        rest.sort_by_key(|range| Reverse(range.map_or(0, GpaRange::len)));
        for range in rest.into_iter().flatten() {
            if self.spans.len() + extra < self.max_ranges {
                self.put(range, span.generation, span.state());
            } else {
                self.squeezed.given_up += range.len();
            }
        }
    }

    fn remove(&mut self, start: u64) -> Option<Span> {
        let span = self.spans.remove(&start)?;
        *self.total(span.state()) -= span.end() - start;
        Some(span)
    }

    const fn total(&mut self, state: RangeState) -> &mut u64 {
        match state {
            RangeState::Lazy => &mut self.totals.lazy,
            RangeState::Unmapped => &mut self.totals.unmapped,
            RangeState::Reclaiming => &mut self.totals.reclaiming,
            RangeState::Discarded => &mut self.totals.discarded,
        }
    }
}

#[cfg(test)]
mod tests;
