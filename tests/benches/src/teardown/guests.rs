//! Whole machines whose stock guest has touched its memory under KVM: how soon an end is seen, and when the memory is
//! free, compared with QEMU.

use std::process::{Command, Stdio};

use super::Results;
use super::ending::{End, Times, Watch, compared};
use super::machines::Killed;
use crate::BenchError;
use crate::guest::{Files, Guest, System};
use ebb_harness::console::Console;
use ebb_harness::error::{Context, Error};
use ebb_harness::host::{REAPER, anonymous, processes_named};
use ebb_harness::idle::signal_to;
use ebb_harness::size::MIB;
use ebb_harness::wait::LONG;

const GUEST: Guest = Guest {
    memory_mib: 1024,
    mode: "run",
};

/// What the guest fills, in addition to its kernel and its caches.
const FILL_MIB: u64 = 800;

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, runs: u32) -> Result<(), BenchError> {
    let files = Files::from_environment()?;
    let mut systems = [System::Ebb, System::QemuPc];
    for run in 1..=runs {
        systems.rotate_left(1);
        for end in [End::Stop, End::Kill] {
            for system in systems {
                let (times, touched) = ended(&files, system, end)?;
                let case = case_of(end);
                times.record(results, (system.name(), &case));
                #[allow(clippy::cast_precision_loss, reason = "a few GiB")]
                results.add((system.name(), &case), ("touched", "bytes"), touched as f64);
            }
        }
        eprintln!("teardown: guests, run {run} of {runs}");
    }
    for end in [End::Stop, End::Kill] {
        let case = case_of(end);
        let (qemu, ebb) = (System::QemuPc.name(), System::Ebb.name());
        let by = compared(results, [(qemu, &case), (ebb, &case)]);
        let name = format!("vs_qemu_kvm_{}", end.name());
        results.divide(&name, [qemu, &case, by], [ebb, &case, by]);
    }
    Ok(())
}

fn case_of(end: End) -> String {
    format!("guest {}", end.name())
}

/// Ends a machine whose guest has filled its memory: when, and how many bytes the host has back.
fn ended(files: &Files, system: System, end: End) -> Result<(Times, u64), BenchError> {
    let mut command = files.command(system, GUEST);
    let mut process = small_pages(&mut command).context(system.name())?;
    let (input, output) = (process.0.stdin.take(), process.0.stdout.take());
    let console = Console::read(output.context("no output")?);
    let mut guest = ebb_harness::guest::Guest::attach(input.context("no input")?, console)?;
    guest.ask_within(&format!("fill {FILL_MIB}M"), 5 * LONG)?;
    let pid = process.0.id();
    let touched = anonymous(pid)?;
    if touched < FILL_MIB * MIB {
        return Err(Error::new(format!("the host holds {touched} bytes only")).into());
    }
    // QEMU has none, and no other machine runs.
    let helpers = processes_named(REAPER);
    let times = Watch::new(pid, &helpers, touched)?.end(|| {
        signal_to(pid, end.signal());
        Ok(())
    })?;
    let _ = process.0.wait();
    Ok((times, touched))
}

/// Starts a monitor to which the host gives pages of 4 KiB only.
fn small_pages(command: &mut Command) -> std::io::Result<Killed> {
    rustix::thread::disable_transparent_huge_pages(true)?;
    let child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    rustix::thread::disable_transparent_huge_pages(false)?;
    child.map(Killed)
}
