//! No guest reads what another one has left in the host's memory. Each guest looks through all memory that it was given,
//! fills it with marks, frees a part of it lazily, and ends in one of several ways; the next one gets its pages.
//!
//! `EBB_ISOLATION_RUNS=200` changes the number of runs.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::figure;
use ebb_harness::host::guest_memory;
use ebb_harness::payload_vm::{PayloadVm, Setup};
use ebb_harness::restart::setting;
use ebb_payload::freestanding::{Task, marker};

const LIMIT: Duration = Duration::from_secs(120);
/// Runs in the suite.
const RUNS: u64 = 20;
const MIB: u64 = 12;

/// How a guest's pages come back to the host.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// It powers off.
    PowerOff,
    /// Its monitor is killed.
    Kill,
    /// The host takes what is lazily free, and the guest lives on.
    Reclaim,
}

/// The host's page frames behind a process's guest memory.
fn frames(pid: u32) -> Result<HashSet<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("pagemap")?;
    let mut found = HashSet::new();
    for area in guest_memory(pid, MIB << 20)? {
        let mut entries = vec![0; ((area.end - area.start) / 4096 * 8) as usize];
        let at = area.start / 4096 * 8;
        pagemap.read_exact_at(&mut entries, at).context("pagemap")?;
        let (entries, _) = entries.as_chunks::<8>();
        let entries = entries.iter().map(|bytes| u64::from_le_bytes(*bytes));
        found.extend(entries.filter(|it| it & PRESENT != 0).map(|it| it & FRAME));
    }
    Ok(found)
}

/// Starts a guest, and waits until it has looked through its memory and left its own marks there.
fn start(run: u64, way: Way, shared: bool) -> Result<PayloadVm> {
    let setup = Setup {
        task: Task::Isolation,
        vcpus: 1,
        mib: MIB,
        shared,
        operations: u64::from(matches!(way, Way::PowerOff)),
        seed: run,
    };
    let mut vm = PayloadVm::start(setup, &["--lazy", "mode=pressure"])?;
    vm.wait_for(marker::READY, LIMIT)?;
    let words = ebb_payload::results(&vm.serial());
    let at = words.iter().position(|word| *word == marker::SCANNED);
    let found = at.and_then(|at| words.get(at + 1..at + 3));
    let what = format!("run {run}: words of another guest, and words in use");
    assert_eq!(found, Some(&[0, 0][..]), "{what}");
    Ok(vm)
}

#[test]
fn no_guest_finds_what_another_one_has_left() -> Result<()> {
    let runs = setting("EBB_ISOLATION_RUNS", RUNS)?;
    let (mut left, mut alive, mut reused) = (HashSet::new(), None, 0);
    for run in 0..runs {
        let way = [Way::PowerOff, Way::Kill, Way::Reclaim][run as usize % 3];
        // Memory in files is given back in other ways.
        let shared = run / 3 % 3 == 2;
        let mut vm = start(run, way, shared)?;
        let frames = if shared || matches!(way, Way::PowerOff) {
            HashSet::new()
        } else {
            frames(vm.pid())?
        };
        reused += left.intersection(&frames).count();
        left = frames;
        match way {
            Way::PowerOff => while !vm.ended()? {},
            Way::Kill => drop(vm),
            Way::Reclaim => {
                assert!(
                    vm.api().reclaim(MIB << 20)?.reclaimed_bytes > 0,
                    "run {run}"
                );
                alive = Some(vm);
            }
        }
    }
    drop(alive);
    // Else the runs would say nothing.
    assert!(reused > 0, "no guest got a page of the one before it");
    println!("{reused} pages were seen to come from the guest before");
    figure("isolation_runs", runs);
    Ok(())
}
