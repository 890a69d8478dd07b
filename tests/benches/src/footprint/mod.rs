//! `ebb-bench footprint`: what a guest with bursts of work costs the host, in GiB·min, and how long its work takes: with
//! nothing, with QEMU's free page reporting, and with Ebb's ways, while the host has plenty, little, and too little.

mod machine;
mod neighbour;
mod picture;
mod recorder;
mod work;

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::host::{meminfo, rss_estimate};
use ebb_harness::size::MIB;

use super::results::{Metric, Results};
use super::{BenchError, path};
use machine::{Machine, SYSTEMS, System};
use neighbour::Neighbour;
use picture::Line;

/// RAM of the guest.
const RAM: u64 = 640 * MIB;
/// What a monitor takes beside it, at most.
const BESIDE: u64 = 96 * MIB;

/// How short the host is of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressure {
    name: &'static str,
    /// What the host has for the machine beyond its RAM, in percent of the watermark below which Ebb takes memory.
    beyond: u64,
}

/// More than twice the watermark is left: nobody is asked for anything.
const PLENTY: Pressure = Pressure {
    name: "none",
    beyond: 240,
};

const PRESSURES: [Pressure; 3] = [
    PLENTY,
    Pressure {
        name: "light",
        beyond: 40,
    },
    Pressure {
        name: "hard",
        beyond: 15,
    },
];

impl Pressure {
    /// What the host has for the machine.
    fn room(self) -> Result<u64> {
        let watermark = watermark(meminfo("MemTotal")?);
        Ok(RAM + BESIDE + watermark * self.beyond / 100)
    }
}

/// Host memory, integrated over time.
const FOOTPRINT: Metric = ("footprint", "GiB·min");
/// What the guest's work took, without the rests in between.
const TIME: Metric = ("time", "s");
/// Of all processors, for the monitor and its guest.
const CPU: Metric = ("cpu", "s");
/// The most memory that the host held.
const PEAK: Metric = ("peak", "bytes");

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Measure only these systems
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only under this pressure
    #[arg(long, value_parser = ["none", "light", "hard"])]
    pressure: Option<String>,
    #[command(flatten)]
    work: work::Size,
}

/// Runs the benchmark, prints the table, draws the picture and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    let mut lines = Vec::new();
    let mut neighbour = Neighbour::default();
    for system in SYSTEMS {
        if arguments.only.is_empty() || arguments.only.iter().any(|only| only == system.name()) {
            measure(
                system,
                arguments,
                &mut neighbour,
                (&mut results, &mut lines),
            )?;
        }
    }
    compare(&mut results);
    results.note("footprint: the monitor's RSS over the time of the whole work, rests included; one run each");
    results.note("the ratios without a pressure's name are of the sums over all three");
    let picture = path("EBB_OUT")?.join("footprint.svg");
    picture::draw(&picture, PRESSURES.map(|it| it.name), &lines)?;
    println!("picture: {}", picture.display());
    results.report("footprint").publish()
}

/// One machine, under each pressure in turn, from none to hard.
fn measure(
    system: System,
    arguments: &Arguments,
    neighbour: &mut Neighbour,
    (results, lines): (&mut Results, &mut Vec<Line>),
) -> Result<()> {
    let cgroup = Cgroup::counting(system.name())?;
    neighbour.leave(PLENTY.room()?, || Ok(0))?;
    let mut machine = Machine::start(system, arguments.work.scan_bytes(), &cgroup)?;
    work::prepare(&mut machine, &arguments.work)?;
    for pressure in PRESSURES {
        let wanted = arguments.pressure.as_deref();
        if wanted.is_some_and(|wanted| wanted != pressure.name) {
            continue;
        }
        neighbour.leave(pressure.room()?, || rss_estimate(machine.pid()))?;
        let cpu = cgroup.cpu_seconds()?;
        let done = work::run(&mut machine, &arguments.work)?;
        let case = (system.name(), pressure.name);
        results.add(case, FOOTPRINT, done.record.gib_minutes());
        results.add(case, TIME, done.busy.as_secs_f64());
        results.add(case, CPU, cgroup.cpu_seconds()? - cpu);
        results.add(case, PEAK, done.record.peak() as f64);
        for (step, time) in done.steps {
            results.add(case, (step, "s"), time.as_secs_f64());
        }
        eprintln!(
            "footprint: {}, pressure {}: {:.2} GiB·min, {:.1} s; {}",
            system.name(),
            pressure.name,
            done.record.gib_minutes(),
            done.busy.as_secs_f64(),
            machine.state()?
        );
        lines.push(Line {
            system,
            pressure: pressure.name,
            points: done.record.points(),
        });
    }
    machine.end()
}

/// The available memory below which Ebb takes memory by itself, see `docs/operating.md`.
fn watermark(total: u64) -> u64 {
    (total / 20).max(256 * MIB).min(total / 4)
}

/// The figures: QEMU's reporting compared with Ebb's ways, and the latter with nothing.
fn compare(results: &mut Results) {
    let sum = |results: &Results, system: System, metric: Metric| {
        let values = PRESSURES.map(|it| results.median(system.name(), it.name, metric.0));
        values.into_iter().sum::<Option<f64>>()
    };
    let reporting = System::QemuReporting;
    for (prefix, ours) in [
        ("", System::EbbAuto),
        ("free_lists_", System::EbbFreeLists),
        ("reporting_", System::EbbReporting),
    ] {
        for (name, metric) in [("vs_reporting", FOOTPRINT), ("time_vs_reporting", TIME)] {
            let name = format!("{prefix}{name}");
            let all = [reporting, ours].map(|system| sum(results, system, metric));
            if let [Some(theirs), Some(ours)] = all {
                results.higher(&name, theirs / ours);
            }
            for pressure in PRESSURES.map(|it| it.name) {
                let of = |system: System| [system.name(), pressure, metric.0];
                let quotient = [reporting, ours].map(|system| {
                    let [system, case, metric] = of(system);
                    results.median(system, case, metric)
                });
                if let [Some(theirs), Some(ours)] = quotient {
                    results.higher(&format!("{name}_{pressure}"), theirs / ours);
                }
            }
        }
    }
    let all = [System::Nothing, System::EbbAuto].map(|system| sum(results, system, FOOTPRINT));
    if let [Some(nothing), Some(ours)] = all {
        results.higher("vs_nothing", nothing / ours);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_sums_and_of_each_pressure() {
        let mut results = Results::default();
        for (pressure, theirs, ours) in
            [("none", 1.0, 1.0), ("light", 2.0, 1.0), ("hard", 3.0, 1.0)]
        {
            results.add((System::QemuReporting.name(), pressure), FOOTPRINT, theirs);
            results.add((System::EbbAuto.name(), pressure), FOOTPRINT, ours);
        }
        compare(&mut results);
        let report = results.report("test");
        assert_eq!(report.ratio("vs_reporting"), Some(2.0));
        assert_eq!(report.ratio("vs_reporting_hard"), Some(3.0));
        assert_eq!(report.ratio("time_vs_reporting"), None);
        assert_eq!(report.ratio("vs_nothing"), None);
    }

    #[test]
    fn the_watermark_is_the_documented_one() {
        assert_eq!(watermark(8000 * MIB), 400 * MIB);
        assert_eq!(watermark(2048 * MIB), 256 * MIB);
        assert_eq!(watermark(512 * MIB), 128 * MIB);
    }
}
