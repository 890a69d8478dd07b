//! The integrity run: guests verify their memory while it is reclaimed flat out.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use ebb_payload::freestanding::{Counts, Task, marker};

use crate::error::{Error, Result};
use crate::host::{monitors, rss_estimate};
use crate::payload_vm::{PayloadVm, Setup};
use crate::size::MIB;

/// Guest memory that the guest does not free.
const KEPT_MIB: u64 = 8;

/// One machine of a run.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// vCPUs.
    pub vcpus: u64,
    /// Ranges that are freed or reused, by all vCPUs together.
    pub operations: u64,
    /// `--lazy`.
    pub lazy: &'static str,
    /// The memory is in files.
    pub shared: bool,
    /// Least MiB that each request takes; 0: no requests, the monitor takes by itself.
    pub request_mib: u64,
    /// Seed of everything that is random.
    pub seed: u64,
}

/// Time between two requests, so that an emulated processor, on which each page that comes back costs 0.2 ms, does
/// something else besides.
const REST: Duration = Duration::from_millis(100);

/// RAM of each machine in MiB.
const RAM_MIB: u64 = 40;

/// The machines of a run of `operations` in all: 1, 2 and 4 vCPUs, and every mode that takes memory by itself. A
/// short pause makes many slices; requests take blocks, fragments and pieces of blocks.
#[must_use]
pub fn cases(operations: u64, seed: u64) -> Vec<Case> {
    let case = |vcpus, share: u64, lazy, request_mib| Case {
        vcpus,
        operations: (operations * share).div_ceil(100),
        lazy,
        shared: false,
        request_mib,
        seed: seed + vcpus,
    };
    let in_files = |case| Case {
        shared: true,
        ..case
    };
    vec![
        case(1, 42, "mode=age,age=1,pause=5000", 1),
        case(2, 46, "mode=eager,pause=5000,slice=16", 0),
        in_files(case(2, 10, "mode=pressure,pause=1000,slice=64", 1)),
        case(4, 2, "mode=eager,pause=20000,slice=128", 1),
    ]
}

/// What one machine of a run has shown.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// What it was.
    pub case: Case,
    /// What the guest says.
    pub counts: Counts,
    /// Bytes that the monitor has discarded.
    pub discarded: u64,
    /// Bytes that the monitor has invalidated.
    pub unmapped: u64,
    /// Reuses that had to wait for a chunk.
    pub waits: u64,
    /// Slices.
    pub slices: u64,
    /// Most and least resident bytes of the monitor after everything was touched.
    pub rss: (u64, u64),
    /// How long it took.
    pub time: Duration,
}

impl Outcome {
    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        let Counts {
            operations,
            calls,
            batches,
            kept,
            lost,
            reused_intact,
            reused_zero,
            foreign_bytes,
            bad_statuses,
            zero_at_end,
            ..
        } = self.counts;
        let (most, least) = self.rss;
        let ram = (RAM_MIB - KEPT_MIB) * MIB;
        let faults = [
            (lost != 0, "pages are lost"),
            (foreign_bytes != 0, "bytes are foreign"),
            (bad_statuses != 0, "calls had a wrong status"),
            (operations < self.case.operations, "operations are missing"),
            (
                batches == 0 || batches >= calls,
                "a kind of call was not made",
            ),
            (kept == 0, "nothing was verified"),
            (reused_intact == 0, "nothing was reused before it was taken"),
            (
                reused_zero <= zero_at_end,
                "nothing was taken during the run",
            ),
            (
                zero_at_end < ram / 4096 / 8 * 7,
                "what was taken at the end does not read zero",
            ),
            (self.discarded < ram, "little was discarded"),
            (
                // Looked at each tenth of a second: the last moment, when all is free, is usually missed.
                most.saturating_sub(least) < ram / 8,
                "the monitor's memory did not shrink",
            ),
            (self.slices == 0, "there were no slices"),
        ];
        match faults.iter().find(|(is_so, _)| *is_so) {
            None => Ok(()),
            Some((_, what)) => Err(Error::new(format!("{what}: {self:?}"))),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            operations,
            calls,
            batches,
            kept,
            lost,
            reused_intact,
            reused_zero,
            foreign_bytes,
            ..
        } = self.counts;
        write!(
            f,
            "{} vCPUs, {}{}: {operations} operations in {calls} calls ({batches} batches), {:.1} s; pages kept {kept}, lost \
             {lost}; reused intact {reused_intact}, zero {reused_zero}, foreign bytes {foreign_bytes}; discarded {} MiB, \
             invalidated {} MiB, {} slices, {} waits; RSS {} to {} MiB",
            self.case.vcpus,
            self.case.lazy,
            if self.case.shared { ", in files" } else { "" },
            self.time.as_secs_f64(),
            self.discarded / MIB,
            self.unmapped / MIB,
            self.slices,
            self.waits,
            self.rss.0 / MIB,
            self.rss.1 / MIB,
        )
    }
}

/// Runs one machine to its end.
///
/// # Errors
/// When it does not come to its end; not for what the guest has found.
pub fn run(case: Case, limit: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let setup = Setup {
        task: Task::Integrity,
        vcpus: case.vcpus,
        mib: RAM_MIB,
        shared: case.shared,
        operations: case.operations.div_ceil(case.vcpus),
        seed: case.seed,
    };
    let mut vm = PayloadVm::start(setup, &["--lazy", case.lazy])?;
    vm.wait_for(marker::READY, limit)?;
    let api = vm.api();
    let (mut most, mut least) = (0, u64::MAX);
    let mut last = api.get("/lazy-memory")?;
    let mut turn = 0;
    while !vm.ended()? {
        if start.elapsed() > limit {
            return Err(Error::new(format!(
                "{case:?}: not within {limit:?}: {last}{}",
                monitors()
            )));
        }
        // It may end at any moment: then there is no answer.
        if case.request_mib > 0 {
            let _ = api.reclaim((case.request_mib + turn % 4) * MIB);
        }
        thread::sleep(REST);
        turn += 1;
        if let Ok(state) = api.get("/lazy-memory") {
            last = state;
        }
        if let Ok(rss) = rss_estimate(vm.pid())
            && rss > 0
        {
            (most, least) = (most.max(rss), least.min(rss));
        }
    }
    let number = |name: &str| last[name].as_u64().unwrap_or(0);
    Ok(Outcome {
        case,
        counts: vm.counts()?,
        discarded: number("reclaimed_bytes_total"),
        unmapped: number("unmapped_bytes_total"),
        waits: number("reuse_waits_total"),
        slices: number("held_slices_total") + number("open_slices_total"),
        rss: (most, least),
        time: start.elapsed(),
    })
}
