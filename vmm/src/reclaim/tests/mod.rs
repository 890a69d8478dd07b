//! Tests of reclaim as a whole.

mod damping;
mod orders;
mod reclaimer;
mod refusals;
mod stress;
