//! How long it takes to release a piece, learned from the pieces before.

use std::time::Duration;

use ebb_core::range::PAGE_SIZE;

use super::Piece;

/// Assumed nanoseconds of a page of 4 KiB, until some were measured.
const FIRST_PAGE: u64 = 150;

/// Assumed nanoseconds of a block in a huge page.
const FIRST_HUGE: u64 = 20_000;

/// What a piece costs beside its pages, in pages: its descriptor is read, and a call may be due.
const OWN: u64 = 8;

/// The cost of pieces: moving averages over the calls.
#[derive(Clone, Copy, Debug)]
pub(in crate::reclaim) struct Cost {
    /// Nanoseconds of a page of 4 KiB.
    page: u64,
    /// Nanoseconds of a block in a huge page.
    huge: u64,
}

impl Cost {
    /// Nothing was measured yet.
    pub const fn new() -> Self {
        Self {
            page: FIRST_PAGE,
            huge: FIRST_HUGE,
        }
    }

    /// Time that `piece` will take.
    pub const fn of(&self, piece: &Piece) -> Duration {
        let each = if piece.huge { self.huge } else { self.page };
        Duration::from_nanos(each.saturating_mul(units(piece)))
    }

    /// `pieces`, all of one kind, took `took` together.
    pub fn learn(&mut self, pieces: &[Piece], took: Duration) {
        let Some(first) = pieces.first() else {
            return;
        };
        let units: u64 = pieces.iter().map(units).sum();
        let each = u64::try_from(took.as_nanos() / u128::from(units)).unwrap_or(u64::MAX);
        let before = if first.huge {
            &mut self.huge
        } else {
            &mut self.page
        };
        *before = (*before - *before / 4 + each / 4).max(1);
    }
}

const fn units(piece: &Piece) -> u64 {
    if piece.huge {
        1
    } else {
        piece.held / PAGE_SIZE + OWN
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::range::{BLOCK_SIZE, GpaRange};

    use super::*;

    #[test]
    fn each_kind_of_piece_has_its_own_cost() {
        let piece = |held, huge| Piece {
            range: GpaRange::new(0, BLOCK_SIZE).unwrap(),
            held,
            huge,
        };
        let (small, huge) = (piece(120 * PAGE_SIZE, false), piece(BLOCK_SIZE, true));
        let mut cost = Cost::new();
        assert_eq!(cost.of(&small), Duration::from_nanos(128 * FIRST_PAGE));
        assert_eq!(cost.of(&huge), Duration::from_nanos(FIRST_HUGE));
        for _ in 0..100 {
            cost.learn(&[small, small], Duration::from_micros(256));
            cost.learn(&[huge, huge], Duration::from_micros(14));
        }
        let near = |time: Duration, micros: u64| time.abs_diff(Duration::from_micros(micros));
        assert!(
            near(cost.of(&small), 128) < Duration::from_micros(2),
            "{cost:?}"
        );
        assert!(
            near(cost.of(&huge), 7) < Duration::from_micros(1),
            "{cost:?}"
        );
        let sparse = piece(PAGE_SIZE, false);
        assert!(cost.of(&sparse) * 10 < cost.of(&small));
        cost.learn(&[], Duration::MAX);
        cost.learn(&[huge], Duration::MAX);
        assert!(cost.of(&huge) > Duration::from_secs(1 << 30));
    }
}
