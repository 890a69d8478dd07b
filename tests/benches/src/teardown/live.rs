//! What KVM adds: the end of a machine whose guest has mapped all its memory, compared with that of the same machine whose
//! memory was touched by its monitor only, so that KVM has mapped none of it. One clock from outside for both, and the same
//! threads.

use ebb_harness::error::Context;
use ebb_harness::idle::Place;
use ebb_harness::wait::{LONG, until};
use ebb_payload::{FREE_START, Program, RESULT_SIZE};

use super::Results;
use super::ending::{End, Times, compared};
use super::machines::ended;
use crate::BenchError;

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 1024 * MIB;

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, runs: u32) -> Result<(), BenchError> {
    let mut cases = [MAPPED, UNMAPPED];
    for run in 1..=runs {
        for case in cases {
            let times = if case == MAPPED { mapped() } else { unmapped() };
            times?.record(results, ("ebb", case));
        }
        cases.rotate_left(1);
        eprintln!("teardown: live, run {run} of {runs}");
    }
    let by = compared(results, [("ebb", MAPPED), ("ebb", UNMAPPED)]);
    let (mapped, unmapped) = (["ebb", MAPPED, by], ["ebb", UNMAPPED, by]);
    results.divide_cost("live_vm_overhead", mapped, unmapped);
    Ok(())
}

const MAPPED: &str = "stop, mapped by KVM";
const UNMAPPED: &str = "stop, not mapped by KVM";

/// The end of a machine whose guest has touched all that it can.
fn mapped() -> Result<Times, BenchError> {
    let place = Place::new()?;
    let mut program = Program::kernel();
    program.fill(FREE_START, (MEMORY - FREE_START) / 4096, 1);
    program.halt();
    program
        .write(&place.path("kernel"))
        .context("write the payload")?;
    let serial = place.path("serial");
    let words = format!("file={}", serial.display());
    let memory = format!("size={}M,thp=off", MEMORY / MIB);
    let idle = place.start(&memory, "on", &["--serial", &words])?;
    until("the guest has filled its memory", 5 * LONG, || {
        let written = std::fs::metadata(&serial).map_or(0, |file| file.len());
        Ok((written >= RESULT_SIZE as u64).then_some(()))
    })?;
    // Nothing of the machine may be left at the end.
    std::fs::remove_file(&serial).context("remove the serial port's file")?;
    ended(&place, idle, ("on", End::Stop), MEMORY - FREE_START)
}

/// The end of a machine whose monitor has touched its memory, and whose guest sleeps.
fn unmapped() -> Result<Times, BenchError> {
    let place = Place::new()?;
    let memory = format!("size={}M,thp=off,prefault=on", MEMORY / MIB);
    let idle = place.running(&memory, "on")?;
    ended(&place, idle, ("on", End::Stop), MEMORY - FREE_START)
}
