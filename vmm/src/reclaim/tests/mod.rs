//! Tests of reclaim as a whole.

mod reclaimer;
mod refusals;
mod stress;
