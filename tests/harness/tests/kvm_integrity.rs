//! What the guest has in use is never lost, whatever reclaim does: 1 million ranges freed and reused by guests on
//! 1, 2 and 4 vCPUs. An exit takes about 100 us on an emulated processor, so most ranges travel in batches, and
//! each range of a batch counts as one operation; `cargo xtask bench integrity` runs 10 million.

use std::time::Duration;

use ebb_harness::Result;
use ebb_harness::integrity::{cases, run};

/// Of all machines together.
const OPERATIONS: u64 = 1_000_000;
const LIMIT: Duration = Duration::from_secs(300);

/// Runs one of the machines, which checks that none of its operations is missing.
fn run_one(index: usize) -> Result<()> {
    let outcome = run(cases(OPERATIONS, 1)[index], LIMIT)?;
    println!("{outcome}");
    outcome.check()
}

#[test]
fn the_cases_are_a_million_operations() {
    let cases = cases(OPERATIONS, 1);
    let operations: u64 = cases.iter().map(|case| case.operations).sum();
    assert!(operations >= OPERATIONS, "{operations}");
    assert_eq!(cases.len(), 4, "each has a test below");
}

#[test]
fn memory_in_use_survives_orders_and_age() -> Result<()> {
    run_one(0)
}

#[test]
fn memory_in_use_survives_eager_reclaim() -> Result<()> {
    run_one(1)
}

#[test]
fn memory_in_use_in_files_survives_orders_and_pressure() -> Result<()> {
    run_one(2)
}

#[test]
fn memory_in_use_survives_both_at_once_on_four_vcpus() -> Result<()> {
    run_one(3)
}
