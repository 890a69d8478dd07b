//! Tests of reclaim as a whole.

mod orders;
mod reclaimer;
mod refusals;
mod stress;
