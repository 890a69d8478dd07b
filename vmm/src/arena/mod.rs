//! The arena: guest memory apart from its RAM, in which the guest frees and reuses granules by changing a word in a
//! shared table. The monitor looks at the table when the host needs memory, and at no other time.
//!
//! The layout is that of [`ebb_hypercall_abi::arena`]. The header is written once and never read; the table is read with
//! suspicion, see [`ebb_core::table`].

mod words;

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Instant;

use ebb_hypercall_abi::arena::{GENERATION, Header, Layout, REUSE_MAX_GRANULES};
use ebb_hypercall_abi::granule::{State, Word};
use vm_memory::GuestMemoryMmap;

use ebb_core::range::GpaRange;
use ebb_core::table::{Table, Taken, Words};
use words::GuestWords;

/// The arenas of a machine, by their numbers.
pub type Arenas = Arc<[Arc<Arena>]>;

/// Where an arena is, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub id: String,
    /// Its addresses.
    pub gpa: GpaRange,
    /// What lies where in it.
    pub layout: Layout,
}

/// An arena cannot be made.
#[derive(Debug, thiserror::Error)]
#[error(
    "the arena at {start:#x}..{end:#x} with granules of {granule} bytes is not guest memory, or too small"
)]
pub struct BadArena {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Bytes of a granule.
    pub granule: u64,
}

ebb_core::metrics! {
    /// What an arena holds, and what has happened to it. The gauges are counted in the arena's table when they are asked
    /// for; what the guest does meanwhile may or may not be included.
    pub struct ArenaStats from struct Counters {
        /// Memory that the guest has freed and that still has the guest's pages.
        lazy_bytes: Gauge of Bytes,
        /// Memory that the monitor has returned to the host and the guest has not taken back.
        discarded_bytes: Gauge of Bytes,
        /// Memory that the monitor has returned to the host.
        reclaimed_bytes_total: Counter of Bytes,
        /// Returned memory that the guest was seen to have taken back.
        reused_bytes_total: Counter of Bytes,
        /// Granules that calls have taken back.
        reuse_calls_total: Counter,
        /// The part of these calls that waited, because the granule was being discarded.
        reuse_waits_total: Counter,
        /// Times that the table was counted.
        scans_total: Counter,
        /// Time that this count took.
        scan_us: Gauge of Microseconds,
    }
}

/// One arena of a machine.
pub struct Arena {
    place: Place,
    memory: Arc<GuestMemoryMmap>,
    table: Table<GuestWords>,
    counters: Counters,
}

impl Arena {
    /// Arena number `index` at `gpa`, which is memory that nobody has touched: writes its header.
    ///
    /// # Errors
    /// [`BadArena`].
    pub fn new(
        index: u32,
        id: String,
        gpa: GpaRange,
        granule: u64,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<Self, BadArena> {
        let (start, end) = (gpa.start(), gpa.end());
        let bad = || BadArena {
            start,
            end,
            granule,
        };
        let layout = Layout::new(gpa.len(), granule).ok_or_else(bad)?;
        let number = |value: u64| usize::try_from(value).map_err(|_| bad());
        let first = number(layout.first())?;
        let words = words_at(&memory, gpa, layout).ok_or_else(bad)?;
        let table = Table::new(words, first);
        let header = Header::new(layout, index, start, &id);
        if !words::write(&memory, start, &header.to_words()) {
            return Err(bad());
        }
        Ok(Self {
            place: Place { id, gpa, layout },
            memory,
            table,
            counters: Counters::default(),
        })
    }

    /// Where it is.
    #[must_use]
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// Tells the guest with which generation it frees from now on.
    pub fn publish(&self, generation: u64) {
        words::store(
            &self.memory,
            self.place.gpa.start() + GENERATION,
            generation,
        );
    }

    /// Whether a call may reuse `range`: it lies behind the head and meets no more granules than a call may name.
    #[must_use]
    pub fn may_reuse(&self, range: GpaRange) -> bool {
        let granule = self.place.layout.granule();
        let head = self.place.gpa.start() + self.place.layout.first() * granule;
        let inside = range.start() >= head && range.end() <= self.place.gpa.end();
        inside && self.granules(range).len() as u64 <= REUSE_MAX_GRANULES
    }

    /// The granules that `range`, which lies in this arena, meets.
    fn granules(&self, range: GpaRange) -> Range<usize> {
        let (start, granule) = (self.place.gpa.start(), self.place.layout.granule());
        let number = |address: u64| usize::try_from(address / granule).unwrap_or(usize::MAX);
        number(range.start() - start)..number((range.end() - start).next_multiple_of(granule))
    }

    /// Makes every granule that `range` meets in use; waits for those that are being discarded. What is not
    /// [`Arena::may_reuse`] is left alone.
    pub fn reuse(&self, range: GpaRange) {
        if !self.may_reuse(range) {
            return;
        }
        for index in self.granules(range) {
            let waited = self.table.reuse(index);
            self.counters.reuse_calls_total.increment();
            self.counters.reuse_waits_total.add(u64::from(waited));
        }
    }

    /// Whether a call waits for one of the granules that `range` meets.
    #[cfg(test)]
    pub fn is_wanted(&self, range: GpaRange) -> bool {
        self.granules(range)
            .any(|index| self.table.is_wanted(index))
    }

    /// Makes all granules in use.
    pub fn reset(&self) {
        self.table.reset();
    }

    /// Takes up to `bytes` of what the guest has freed at `newest` or before. `cursor` is 0 for the first of several
    /// takes. `None`: there is no more, or `bytes` is less than a granule.
    pub fn take(&self, cursor: &mut usize, newest: u64, bytes: u64) -> Option<Granules<'_>> {
        self.take_of(cursor, &(0..=newest), bytes)
    }

    /// As [`Arena::take`], of what was freed in one of `generations`.
    pub fn take_of(
        &self,
        cursor: &mut usize,
        generations: &RangeInclusive<u64>,
        bytes: u64,
    ) -> Option<Granules<'_>> {
        let granule = self.place.layout.granule();
        let most = usize::try_from(bytes / granule).unwrap_or(usize::MAX);
        let taken = self.table.take_of(cursor, generations, most)?;
        let at = |index: usize| self.place.gpa.start() + index as u64 * granule;
        let ranges = taken
            .runs()
            .iter()
            .filter_map(|run| GpaRange::new(at(run.start), at(run.end)));
        Some(Granules {
            arena: self,
            ranges: ranges.collect(),
            taken,
        })
    }

    /// What is free by the words of the table, in whatever state, ascending. The machine must be paused: then reclaim moves
    /// granules from one of these states to another, and nothing else happens to them.
    pub fn free(&self) -> Vec<GpaRange> {
        let granule = self.place.layout.granule();
        let mut free: Vec<GpaRange> = Vec::new();
        self.each_free(|index, _, _| {
            let at = self.place.gpa.start() + index as u64 * granule;
            free.extend(GpaRange::new(at, at + granule));
        });
        free
    }

    /// Takes up the words of a restored machine, which has not run yet. What was free in whatever state is discarded: the host
    /// has nothing there.
    pub fn restore(&self) {
        self.each_free(|index, word, words| {
            words.swap(index, word, Word::new(State::Lazy, 0));
        });
        let mut cursor = 0;
        while let Some(taken) = self.table.take(&mut cursor, 0, usize::MAX) {
            let gone = vec![true; taken.runs().len()];
            taken.finish(&gone);
        }
    }

    /// Shows the words of what is free, with their numbers.
    fn each_free(&self, mut look: impl FnMut(usize, Word, &GuestWords)) {
        let layout = self.place.layout;
        let Some(words) = words_at(&self.memory, self.place.gpa, layout) else {
            return;
        };
        for index in (layout.first()..layout.granules()).map(|index| index as usize) {
            let word = words.load(index);
            if let Some(State::Lazy | State::Reclaiming | State::Discarded) = word.state() {
                look(index, word, &words);
            }
        }
    }

    /// Counts what the guest offers, in bytes.
    pub fn lazy_bytes(&self) -> u64 {
        self.stats().lazy_bytes
    }

    /// Counts the table and returns all metrics.
    pub fn stats(&self) -> ArenaStats {
        let start = Instant::now();
        let count = self.table.count();
        let scan_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let granule = self.place.layout.granule();
        self.counters.scans_total.increment();
        self.counters.reused_bytes_total.add(count.reused * granule);
        ArenaStats {
            lazy_bytes: count.lazy * granule,
            discarded_bytes: count.discarded * granule,
            scan_us,
            ..self.counters.snapshot()
        }
    }
}

/// The words of the table of an arena at `gpa`; `None` if they are not guest memory.
fn words_at(memory: &Arc<GuestMemoryMmap>, gpa: GpaRange, layout: Layout) -> Option<GuestWords> {
    let len = usize::try_from(layout.granules()).ok()?;
    GuestWords::new(Arc::clone(memory), gpa.start() + layout.table(), len)
}

/// Granules that the monitor may discard, until this is finished; lazy again when dropped before.
pub struct Granules<'a> {
    arena: &'a Arena,
    ranges: Vec<GpaRange>,
    taken: Taken<'a, GuestWords>,
}

impl Granules<'_> {
    /// Which they are, neighbours as one range.
    #[must_use]
    pub fn ranges(&self) -> &[GpaRange] {
        &self.ranges
    }

    /// Whether a call that takes one of them back waits.
    #[must_use]
    pub fn are_wanted(&self) -> bool {
        self.taken.is_wanted()
    }

    /// Ends it: of each range `bytes` were returned to the host. One that was not returned wholly is lazy again.
    pub fn finish(self, bytes: &[u64]) {
        let gone = |(range, &bytes): (&GpaRange, &u64)| bytes == range.len();
        let gone: Vec<bool> = self.ranges.iter().zip(bytes).map(gone).collect();
        let whole = self.ranges.iter().zip(&gone).filter(|(_, gone)| **gone);
        let bytes = whole.map(|(range, _)| range.len()).sum();
        self.arena.counters.reclaimed_bytes_total.add(bytes);
        self.taken.finish(&gone);
    }
}

#[cfg(test)]
mod tests;
