//! Chunks in flight: those that are being invalidated or discarded.

use std::collections::BTreeMap;

use super::map::{Counts, PageState};
use crate::range::{GpaRange, PAGE_SIZE};

/// Maximum number of ranges that reuses may want from one chunk. Above that they get the whole chunk, so that a
/// hostile guest cannot make the list long.
pub const MAX_WANTED: usize = 64;

/// A chunk in flight, and the parts of it that reuses wait for.
#[derive(Debug)]
pub struct Flight {
    id: u64,
    end: u64,
    from: PageState,
    wanted: Vec<GpaRange>,
}

/// The chunks in flight, which are disjoint.
#[derive(Debug, Default)]
pub struct Flights {
    /// By start.
    chunks: BTreeMap<u64, Flight>,
    next_id: u64,
    /// Their pages, by the state that they were taken from.
    pages: Counts,
}

impl Flights {
    /// Pages in chunks, by the state that they were taken from.
    pub const fn pages(&self) -> Counts {
        self.pages
    }

    /// Adds a chunk that is taken from the state `from`. It meets no other chunk.
    pub fn add(&mut self, chunk: GpaRange, from: PageState) {
        let flight = Flight {
            id: self.next_id,
            end: chunk.end(),
            from,
            wanted: Vec::new(),
        };
        self.next_id += 1;
        self.pages[from as usize] += chunk.len() / PAGE_SIZE;
        let before = self.chunks.insert(chunk.start(), flight);
        debug_assert!(before.is_none(), "{chunk:x?} is in flight already");
    }

    /// Removes a chunk. Returns what reuses want of it.
    pub fn remove(&mut self, chunk: GpaRange) -> Vec<GpaRange> {
        let Some(flight) = self.chunks.remove(&chunk.start()) else {
            return Vec::new();
        };
        self.pages[flight.from as usize] -= chunk.len() / PAGE_SIZE;
        flight.wanted
    }

    /// The first part of `range` that is in no chunk.
    pub fn first_gap(&self, range: GpaRange) -> Option<GpaRange> {
        let mut at = range.start();
        let before = self.chunks.range(..at).next_back();
        for (&start, flight) in before.into_iter().chain(self.chunks.range(at..range.end())) {
            if start > at {
                return GpaRange::new(at, start);
            }
            at = at.max(flight.end);
        }
        GpaRange::new(at, range.end())
    }

    /// Pages of `range` that are in chunks, by the state that they were taken from.
    pub fn survey(&self, range: GpaRange) -> Counts {
        let mut counts = Counts::default();
        for (&start, flight) in self.chunks.range(..range.end()).rev() {
            let Some(part) = GpaRange::new(start.max(range.start()), flight.end.min(range.end()))
            else {
                break;
            };
            counts[flight.from as usize] += part.len() / PAGE_SIZE;
        }
        counts
    }

    /// Notes that a reuse wants `range` from the chunks that it meets, and adds their ids to `ids`.
    pub fn want(&mut self, range: GpaRange, ids: &mut Vec<u64>) {
        for (&start, flight) in self.chunks.range_mut(..range.end()).rev() {
            let Some(part) = GpaRange::new(start.max(range.start()), flight.end.min(range.end()))
            else {
                break;
            };
            flight.wanted.push(part);
            if flight.wanted.len() > MAX_WANTED {
                flight.wanted = GpaRange::new(start, flight.end).into_iter().collect();
            }
            if !ids.contains(&flight.id) {
                ids.push(flight.id);
            }
        }
    }

    /// Returns true if one of the chunks `ids` is in flight.
    pub fn any(&self, ids: &[u64]) -> bool {
        self.chunks.values().any(|flight| ids.contains(&flight.id))
    }

    /// Number of ranges that reuses want of the first chunk.
    #[cfg(test)]
    pub fn wanted_of_first(&self) -> usize {
        let first = self.chunks.values().next();
        first.map_or(0, |flight| flight.wanted.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    #[test]
    fn more_wishes_than_are_kept_are_a_wish_for_all() {
        let (mut flights, mut ids) = (Flights::default(), Vec::new());
        let chunk = pages(0, 512);
        flights.add(chunk, PageState::Lazy);
        for page in 0..MAX_WANTED as u64 {
            flights.want(pages(page, page + 1), &mut ids);
        }
        assert_eq!(flights.wanted_of_first(), MAX_WANTED);
        flights.want(pages(100, 101), &mut ids);
        assert_eq!(ids.len(), 1);
        assert_eq!(flights.remove(chunk), [chunk]);
    }
}
