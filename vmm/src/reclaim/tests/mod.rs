//! Tests of reclaim as a whole.

mod damping;
mod huge;
mod orders;
mod reclaimer;
mod refusals;
mod stress;

use super::{Order, Reach};

/// What somebody who waits asks for, of any age.
pub(super) const fn order(bytes: u64, reach: Reach) -> Order {
    Order {
        bytes,
        reach,
        newest: u64::MAX,
        urgent: true,
    }
}
