//! Slices that vCPU threads run on their way in: a guest that exits often is interrupted for few of its slices.

use std::time::Duration;

use ebb_harness::Result;
use ebb_harness::payload_vm::{PayloadVm, Setup};
use ebb_payload::freestanding::{Task, marker};

const LIMIT: Duration = Duration::from_secs(120);
/// Scattered ranges of four pages.
const RANGES: u64 = 1024;

#[test]
fn a_guest_that_exits_often_is_kicked_for_few_slices() -> Result<()> {
    let setup = Setup {
        task: Task::Caller,
        vcpus: 1,
        mib: 64,
        shared: false,
        operations: RANGES,
        seed: 1,
    };
    let options = ["--lazy", "mode=pressure,pause=50000,slice=32,share=50"];
    let mut vm = PayloadVm::start(setup, &options)?;
    vm.wait_for(marker::READY, LIMIT)?;
    let api = vm.api();
    let mut taken = 0;
    while taken < RANGES * 4 * 4096 {
        taken += api.reclaim(64 << 20)?.reclaimed_bytes;
    }
    let state = api.get("/lazy-memory")?;
    let number = |name: &str| state[name].as_u64().unwrap_or(0);
    let kicks = state["gate"]["kicks_total"].as_u64().unwrap_or(u64::MAX);
    let (slices, passing) = (number("held_slices_total"), number("passing_slices_total"));
    println!("{slices} slices, {passing} of them in passing, {kicks} kicks");
    vm.wait_for(marker::TAKEN, LIMIT)?;
    assert!(slices >= RANGES / 32, "{state}");
    assert!(passing * 2 > slices, "{state}");
    assert!(kicks <= slices - passing, "{state}");
    Ok(())
}
