//! What the guest does: bursts of a compiler, Redis that fills and forgets, and a scan through the page cache.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ebb_harness::error::Result;
use ebb_harness::size::MIB;

use super::machine::Machine;
use super::recorder::{Record, record};

/// How much of everything.
#[derive(Debug, clap::Args)]
pub struct Size {
    /// Source files of the C project
    #[arg(long, default_value_t = 4)]
    files: u32,
    /// Functions in each
    #[arg(long, default_value_t = 2)]
    functions: u32,
    /// Values of 4 KiB that Redis holds
    #[arg(long, default_value_t = 12_000)]
    keys: u32,
    /// MiB that are read through the page cache
    #[arg(long, default_value_t = 320)]
    scan: u64,
    /// Seconds of a rest
    #[arg(long, default_value_t = 3)]
    rest: u64,
}

impl Size {
    /// Bytes that are read through the page cache.
    pub const fn scan_bytes(&self) -> u64 {
        self.scan * MIB
    }
}

/// What was done.
pub struct Done {
    /// The monitor's memory meanwhile.
    pub record: Record,
    /// Time of all steps, without the rests.
    pub busy: Duration,
    /// Time of each kind.
    pub steps: Vec<(&'static str, Duration)>,
}

/// A step and a rest after it.
const STEPS: [(&str, bool); 8] = [
    ("burst", true),
    ("fill", false),
    ("scan", false),
    ("burst", true),
    ("flush", true),
    ("fill", false),
    ("burst", false),
    ("flush", true),
];

/// Has the guest make its project, and builds that once, so that no system pays for reading the compiler from its disk.
pub fn prepare(machine: &mut Machine, size: &Size) -> Result<()> {
    machine.step(&format!("project {} {}", size.files, size.functions))?;
    machine.step("start")?;
    machine.step("burst")
}

/// Does all of it once.
pub fn run(machine: &mut Machine, size: &Size) -> Result<Done> {
    machine.step("rest")?;
    let pid = machine.pid();
    let (steps, record) = record(pid, || {
        let mut steps: Vec<(&str, Duration)> = Vec::new();
        for (name, rests) in STEPS {
            let start = Instant::now();
            match name {
                "fill" => machine.step(&format!("fill {}", size.keys))?,
                name => machine.step(name)?,
            }
            steps.push((name, start.elapsed()));
            if rests {
                sleep(Duration::from_secs(size.rest));
            }
        }
        Ok(steps)
    })?;
    let busy = steps.iter().map(|(_, time)| *time).sum();
    Ok(Done {
        record,
        busy,
        steps,
    })
}
