//! What the guest has in use is never lost, whatever reclaim does: 1 million ranges freed and reused by guests on
//! 1, 2 and 4 vCPUs. An exit takes about 100 us on an emulated processor, so most ranges travel in batches, and
//! each range of a batch counts as one operation; `cargo xtask bench integrity` runs 10 million.

use std::time::Duration;

use ebb_harness::Result;
use ebb_harness::integrity::{cases, run};

/// Of all machines together.
const OPERATIONS: u64 = 1_000_000;
/// Two machines run at a time.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs one of the machines.
fn run_one(index: usize) -> Result<()> {
    let outcome = run(cases(OPERATIONS, 1)[index], LIMIT)?;
    println!("{outcome}");
    outcome.check()
}

#[test]
fn memory_in_use_survives_by_age() -> Result<()> {
    run_one(0)
}

#[test]
fn memory_in_use_survives_eager_reclaim_on_two_vcpus() -> Result<()> {
    run_one(1)
}

#[test]
fn memory_in_files_survives_pressure() -> Result<()> {
    run_one(2)
}

#[test]
fn memory_in_use_survives_eager_reclaim_on_four_vcpus() -> Result<()> {
    run_one(3)
}
