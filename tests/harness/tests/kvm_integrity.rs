//! What the guest has in use is never lost, whatever reclaim does: 1 million ranges freed and reused by guests on
//! 1, 2 and 4 vCPUs. An exit takes about 100 us on an emulated processor, so most ranges travel in batches, and
//! each range of a batch counts as one operation; `cargo xtask bench integrity` runs 10 million.

use std::time::Duration;

use ebb_harness::Result;
use ebb_harness::integrity::{cases, run};

const OPERATIONS: u64 = 1_000_000;
const LIMIT: Duration = Duration::from_secs(150);

#[test]
fn memory_in_use_survives_a_million_operations() -> Result<()> {
    let mut operations = 0;
    for case in cases(OPERATIONS, 1) {
        let outcome = run(case, LIMIT)?;
        println!("{outcome}");
        outcome.check()?;
        operations += outcome.counts.operations;
    }
    assert!(operations >= OPERATIONS, "{operations}");
    Ok(())
}
