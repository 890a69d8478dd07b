//! Tests of reclaim as a whole.

mod damping;
mod huge;
mod orders;
mod reclaimer;
mod refusals;
mod stress;
