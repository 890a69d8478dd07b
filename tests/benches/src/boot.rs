//! `ebb-bench boot`: from the start of the process to its end, with a guest that powers off at once; and
//! what a monitor needs beside its guest's memory.

use std::time::Duration;

use super::guest::{Files, Guest, System};
use super::process::{Outcome, Process};
use super::report::{Host, Ratio, Report, Row};
use super::{BenchError, overhead, path, system};

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
}

/// The samples of one system.
struct Series {
    system: System,
    wall: Vec<f64>,
    cpu: Vec<f64>,
    uptime: Vec<f64>,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a system does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let files = Files::from_environment()?;
    let out = path("EBB_OUT")?;
    let systems: &[_] = if arguments.brief {
        &[System::Ebb, System::QemuPc]
    } else {
        &[
            System::Ebb,
            System::QemuPc,
            System::EbbImage,
            System::EbbElf,
            System::QemuMicrovm,
        ]
    };
    let mut all: Vec<_> = systems.iter().copied().map(Series::new).collect();
    // One boot each that does not count: it fills the page cache, so that no system pays for the others.
    for series in &all {
        boot(&files, series.system)?;
    }
    // Interleaved: what else the host does hits all alike.
    for run in 1..=arguments.runs {
        for series in &mut all {
            series.add(&files)?;
        }
        eprintln!("boot: run {run} of {}", arguments.runs);
    }
    let mut report = Report {
        name: "boot".to_owned(),
        host: Host::probe(),
        rows: all.iter().flat_map(Series::rows).collect(),
        ratios: Vec::new(),
    };
    report
        .rows
        .extend(overhead::rows(&files, arguments.runs.min(3))?);
    report.ratios = ratios(&report);
    println!("{report}");
    let path = report.write(&out)?;
    println!("written to {}", path.display());
    Ok(())
}

impl Series {
    const fn new(system: System) -> Self {
        Self {
            system,
            wall: Vec::new(),
            cpu: Vec::new(),
            uptime: Vec::new(),
        }
    }

    fn add(&mut self, files: &Files) -> Result<(), BenchError> {
        let outcome = boot(files, self.system)?;
        self.wall.push(outcome.wall.as_secs_f64());
        self.cpu.push(outcome.cpu);
        self.uptime.extend(uptime(&outcome.output));
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let who = (self.system.name(), self.system.case());
        let metrics = [
            ("wall", &self.wall),
            ("cpu", &self.cpu),
            ("uptime", &self.uptime),
        ];
        metrics
            .into_iter()
            .filter_map(|(metric, samples)| Row::new(who, (metric, "s"), samples))
            .collect()
    }
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

fn ratios(report: &Report) -> Vec<Ratio> {
    let wall = |system: System| report.median(system.name(), system.case(), "wall");
    let divide = |name: &str, a: Option<f64>, b: Option<f64>| {
        a.zip(b).map(|(a, b)| Ratio {
            name: name.to_owned(),
            value: a / b,
        })
    };
    let overhead = report.median(System::Ebb.name(), overhead::CASE, overhead::METRIC);
    [
        divide("boot_vs_qemu", wall(System::Ebb), wall(System::QemuPc)),
        divide(
            "boot_vs_qemu_microvm",
            wall(System::Ebb),
            wall(System::QemuMicrovm),
        ),
        divide(
            "inner_elf_vs_image",
            wall(System::Ebb),
            wall(System::EbbImage),
        ),
        divide("overhead_bytes", overhead, Some(1.0)),
    ]
    .into_iter()
    .flatten()
    .collect()
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
