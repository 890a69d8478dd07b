//! One pass over the tracked ranges, in ascending order of addresses.

use super::map::PageState;
use super::region::Look;
use crate::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};

/// Which parts of a range a sweep takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// Whole blocks of 2 MiB: no huge page is split.
    Blocks,
    /// What is left of a range at both ends of its whole blocks.
    Fragments,
    /// All of a range from its start on; splits at most the last block that it takes.
    Any,
}

impl Pieces {
    /// The size of the least piece.
    pub(super) const fn unit(self) -> u64 {
        match self {
            Self::Blocks => BLOCK_SIZE,
            Self::Fragments | Self::Any => PAGE_SIZE,
        }
    }

    /// The first such part of `range`, of at most `limit` bytes.
    pub(super) fn pick(self, range: GpaRange, limit: u64) -> Option<GpaRange> {
        let (start, end) = (range.start(), range.end());
        let first_block = start.checked_next_multiple_of(BLOCK_SIZE);
        let last_block = end / BLOCK_SIZE * BLOCK_SIZE;
        let blocks = first_block.and_then(|first| GpaRange::new(first, last_block));
        let piece = match (self, blocks) {
            (Self::Any, _) | (Self::Fragments, None) => range,
            (Self::Blocks, blocks) => blocks?,
            (Self::Fragments, Some(blocks)) => {
                let head = GpaRange::new(start, blocks.start());
                head.or_else(|| GpaRange::new(blocks.end(), end))?
            }
        };
        let bytes = piece.len().min(limit / self.unit() * self.unit());
        GpaRange::new(piece.start(), piece.start() + bytes)
    }
}

/// One pass over the ranges in one state, from low addresses to high ones. It looks at each address once, so it ends
/// even if chunks cannot be discarded.
#[derive(Clone, Debug)]
pub struct Sweep {
    pub(super) from: PageState,
    pub(super) pieces: Pieces,
    pub(super) newest: u64,
    pub(super) at: u64,
    pub(super) end: u64,
}

impl Sweep {
    /// A sweep for `pieces` of the lazy ranges of generation `newest` and before.
    #[must_use]
    pub const fn new(pieces: Pieces, newest: u64) -> Self {
        Self {
            from: PageState::Lazy,
            pieces,
            newest,
            at: 0,
            end: u64::MAX,
        }
    }

    /// The same sweep, but only over `range`.
    #[must_use]
    pub const fn within(self, range: GpaRange) -> Self {
        Self {
            at: range.start(),
            end: range.end(),
            ..self
        }
    }

    /// A sweep for `pieces` of the unmapped ranges of generation `quiescent` and before.
    #[must_use]
    pub const fn unmapped(pieces: Pieces, quiescent: u64) -> Self {
        Self {
            from: PageState::Unmapped,
            ..Self::new(pieces, quiescent)
        }
    }

    /// A sweep for all discarded ranges.
    #[must_use]
    pub const fn discarded() -> Self {
        Self {
            from: PageState::Discarded,
            ..Self::new(Pieces::Any, u64::MAX)
        }
    }

    /// The pages that it looks for.
    pub(super) fn look(&self) -> Look {
        Look {
            state: self.from,
            newest: self.newest,
            split: self.pieces != Pieces::Blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = BLOCK_SIZE / PAGE_SIZE;

    #[track_caller]
    fn check(pieces: Pieces, range: (u64, u64), limit: u64, want: Option<(u64, u64)>) {
        let pages = |(start, end)| GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap();
        assert_eq!(
            pieces.pick(pages(range), limit * PAGE_SIZE),
            want.map(pages)
        );
    }

    #[test]
    fn blocks_are_whole_and_within_the_limit() {
        check(Pieces::Blocks, (0, BLOCK), BLOCK, Some((0, BLOCK)));
        check(
            Pieces::Blocks,
            (1, 2 * BLOCK),
            9 * BLOCK,
            Some((BLOCK, 2 * BLOCK)),
        );
        check(
            Pieces::Blocks,
            (0, 9 * BLOCK),
            3 * BLOCK - 1,
            Some((0, 2 * BLOCK)),
        );
        check(Pieces::Blocks, (1, 2 * BLOCK - 1), 9 * BLOCK, None);
        check(Pieces::Blocks, (0, BLOCK), BLOCK - 1, None);
    }

    #[test]
    fn fragments_are_what_blocks_leave() {
        check(Pieces::Fragments, (0, BLOCK), BLOCK, None);
        check(
            Pieces::Fragments,
            (1, 2 * BLOCK),
            9 * BLOCK,
            Some((1, BLOCK)),
        );
        check(
            Pieces::Fragments,
            (0, BLOCK + 1),
            9 * BLOCK,
            Some((BLOCK, BLOCK + 1)),
        );
        check(
            Pieces::Fragments,
            (1, 2 * BLOCK - 1),
            9 * BLOCK,
            Some((1, 2 * BLOCK - 1)),
        );
        check(Pieces::Fragments, (1, 2 * BLOCK - 1), 3, Some((1, 4)));
    }

    #[test]
    fn any_is_the_beginning() {
        check(Pieces::Any, (0, 9), 3, Some((0, 3)));
        check(Pieces::Any, (5, 9), 30, Some((5, 9)));
        check(Pieces::Any, (5, 9), 0, None);
    }
}
