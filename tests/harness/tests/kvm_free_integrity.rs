//! What the guest has in use is never lost when the host takes what the guest's free lists hold: a stock kernel, a program
//! that checks every byte, and orders to take everything, one after the other. `cargo xtask bench integrity -- --free-pages`
//! runs longer.

use std::time::Duration;

use ebb_harness::Result;
use ebb_harness::free_pages::{cases, run};

/// Of the guests' program, in all machines together.
const OPERATIONS: u64 = 280;
const LIMIT: Duration = Duration::from_secs(400);

/// Runs one of the machines.
fn run_one(index: usize) -> Result<()> {
    let outcome = run(cases(OPERATIONS, 1)[index], LIMIT)?;
    println!("{outcome}");
    outcome.check()
}

#[test]
fn memory_that_is_cleared_when_freed_stays_clear() -> Result<()> {
    run_one(0)
}

#[test]
fn nothing_is_lost_in_small_pages_and_movable_memory() -> Result<()> {
    run_one(1)
}

#[test]
fn nothing_is_lost_beside_lazy_reports_and_a_moving_balloon() -> Result<()> {
    run_one(2)
}

#[test]
fn nothing_is_lost_beside_eager_reports_on_four_vcpus() -> Result<()> {
    run_one(3)
}
