//! What KVM adds: a machine whose guest has mapped all its memory, beside memory that KVM knows nothing of.

use ebb_payload::{FREE_START, Program, RESULT_SIZE};
use rustix::process::Signal;

use super::{Results, SECONDS, engine};
use crate::BenchError;
use ebb_harness::error::{Context, Result};
use ebb_harness::idle::Place;
use ebb_harness::wait::{LONG, until};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 1024 * MIB;

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, runs: u32) -> std::result::Result<(), BenchError> {
    for run in 1..=runs {
        let (bytes, seconds) = live()?;
        results.add("ebb", "live", SECONDS, seconds);
        results.add("ebb", "live", ("freed", "bytes"), bytes);
        let time = engine::shared(engine::touched(MEMORY, false)?, 2);
        results.add("ebb", "plain", SECONDS, time);
        eprintln!("teardown: live, run {run} of {runs}");
    }
    results.divide(
        "live_vm_overhead",
        ["ebb", "live", "time"],
        ["ebb", "plain", "time"],
    );
    Ok(())
}

/// Bytes and seconds of the teardown of a machine whose guest has touched all that it can.
fn live() -> Result<(f64, f64)> {
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
    let mut idle = place.start(&memory, "on", &["--serial", &words])?;
    until("the guest has filled its memory", 5 * LONG, || {
        let written = std::fs::metadata(&serial).map_or(0, |file| file.len());
        Ok((written >= RESULT_SIZE as u64).then_some(()))
    })?;
    idle.signal(Signal::TERM);
    idle.wait()?;
    let line = until("the log tells of the teardown", LONG, || {
        let log = place.text("log");
        Ok(log
            .split_once("teardown: freed ")
            .map(|(_, line)| line.to_owned()))
    })?;
    let number = |text: Option<&str>| text.and_then(|it| it.trim().parse::<f64>().ok());
    let bytes = number(line.split(' ').next()).context("bytes")?;
    let time = line
        .split_once(" in ")
        .and_then(|(_, rest)| rest.split(' ').next());
    Ok((bytes, number(time).context("milliseconds")? / 1e3))
}
