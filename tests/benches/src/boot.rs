//! `ebb-bench boot`: from the start of the process until it has ended and its memory is free, with a guest that powers
//! off at once; what a monitor needs in addition to its guest's memory; and, with `--with-guest`, how soon the API answers.

use std::time::Duration;

use super::guest::{Files, Guest, System};
use super::process::{Outcome, Process};
use super::report::Report;
use super::results::{Metric, Results};
use super::{BenchError, overhead, start, system};

/// No system takes this long, not even where CPUs are emulated.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// What init says when it runs, with the guest's uptime in seconds.
pub(super) const READY: &str = "EBB-GUEST-READY uptime=";

/// The guest that is booted.
const GUEST: Guest = Guest {
    memory_mib: 512,
    mode: "poweroff",
};

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Boots of each system
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Ebb and QEMU's default machine only
    #[arg(long)]
    brief: bool,
    /// The second part, which needs no guest that does anything: time the start, and add the report of the first part
    #[arg(long)]
    with_guest: bool,
}

/// The report of the part with guests.
const GUEST_PART: &str = "boot-guest";

/// Until the last process of the system has ended: its memory is free.
const WALL: Metric = ("wall", "s");
/// Until the end of the system is seen. Ebb's memory is freed after that, by a helper.
const VISIBLE: Metric = ("visible", "s");
const CPU: Metric = ("cpu", "s");
const UPTIME: Metric = ("uptime", "s");

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a system does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let files = Files::from_environment()?;
    if arguments.with_guest {
        let mut results = Results::default();
        start::measure(&files, arguments.runs.max(11), &mut results)?;
        let mut report = results.report("boot");
        report.append(Report::read(&super::path("EBB_OUT")?, GUEST_PART)?);
        return report.publish();
    }
    let mut systems = vec![System::Ebb, System::QemuPc];
    if !arguments.brief {
        systems.extend([System::EbbImage, System::EbbElf, System::QemuMicrovm]);
    }
    let mut results = Results::default();
    // One boot each that does not count: it fills the page cache, so that no system pays for the others.
    for &system in &systems {
        boot(&files, system)?;
    }
    // Interleaved, and another one is first each time: what else the host does hits all alike.
    for run in 1..=arguments.runs {
        for &system in &systems {
            let outcome = boot(&files, system)?;
            let case = (system.name(), system.case());
            results.add(case, WALL, outcome.wall.as_secs_f64());
            results.add(case, VISIBLE, outcome.visible.as_secs_f64());
            results.add(case, CPU, outcome.cpu);
            if let Some(uptime) = uptime(&outcome.output) {
                results.add(case, UPTIME, uptime);
            }
        }
        systems.rotate_left(1);
        eprintln!("boot: run {run} of {}", arguments.runs);
    }
    overhead::measure(&files, arguments.runs.min(3), &mut results)?;
    compare(&mut results);
    results.report(GUEST_PART).publish()
}

/// Boots once; the guest must have reached its init and powered off.
fn boot(files: &Files, monitor: System) -> Result<Outcome, BenchError> {
    let failed = |reason: String, output: &str| failed(monitor, reason, output);
    let start = system(format!("start {}", monitor.name()));
    let process = Process::start(&mut files.command(monitor, GUEST)).map_err(start)?;
    let outcome = process
        .finish(LIMIT)
        .map_err(system(format!("wait for {}", monitor.name())))?;
    let outcome =
        outcome.map_err(|output| failed(format!("it did not end in {LIMIT:?}"), &output))?;
    if !outcome.status.success() || uptime(&outcome.output).is_none() {
        let reason = format!("the guest did not boot ({})", outcome.status);
        return Err(failed(reason, &outcome.output));
    }
    Ok(outcome)
}

/// The error of a system, with the end of what it wrote.
pub(super) fn failed(monitor: System, reason: String, output: &str) -> BenchError {
    const TAIL: usize = 20;
    let lines: Vec<_> = output.lines().collect();
    BenchError::Failed {
        system: monitor.name(),
        case: monitor.case(),
        reason,
        output: lines[lines.len().saturating_sub(TAIL)..].join("\n"),
    }
}

fn uptime(output: &str) -> Option<f64> {
    let (_, rest) = output.split_once(READY)?;
    rest.split_whitespace().next()?.parse().ok()
}

fn compare(results: &mut Results) {
    let of = |system: System| [system.name(), system.case(), WALL.0];
    for (name, other) in [
        ("vs_qemu", System::QemuPc),
        ("vs_qemu_microvm", System::QemuMicrovm),
        ("inner_elf_vs_image", System::EbbImage),
    ] {
        results.divide(name, of(other), of(System::Ebb));
    }
    let (ebb, qemu) = (System::Ebb.name(), System::QemuPc.name());
    let (case, metric) = (overhead::CASE, overhead::METRIC.0);
    if let Some(bytes) = results.median(ebb, case, metric) {
        results.lower("overhead_bytes", bytes);
    }
    results.divide(
        "overhead_vs_qemu",
        [qemu, case, metric],
        [ebb, case, metric],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uptime_is_found_among_other_lines() {
        let output = "a\r\nEBB-GUEST-READY uptime=3.25\r\n[    3.4] reboot: Power down\r\n";
        assert_eq!(uptime(output), Some(3.25));
        assert_eq!(uptime("EBB-GUEST-READY uptime="), None);
        assert_eq!(uptime(""), None);
    }
}
