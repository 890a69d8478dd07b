//! What a monitor needs in addition to its guest's memory, with a small guest idle at a shell prompt.

use std::thread::sleep;
use std::time::Duration;

use super::boot::{LIMIT, READY, failed};
use super::guest::{Files, Guest, System};
use super::process::Process;
use super::results::{Metric, Results};
use super::{BenchError, system};

/// The case of the rows.
pub(super) const CASE: &str = "idle-128M";
/// The metric of the rows.
pub(super) const METRIC: Metric = ("overhead", "bytes");

const GUEST: Guest = Guest {
    memory_mib: 128,
    mode: "shell",
};

/// Boot is over well before: the guest idles.
const SETTLE: Duration = Duration::from_secs(2);

/// Resident memory of a process in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// Guest memory.
    guest: u64,
    /// Everything else.
    pub rest: u64,
}

/// Measures Ebb and QEMU, `runs` times each.
pub(super) fn measure(files: &Files, runs: u32, results: &mut Results) -> Result<(), BenchError> {
    for _ in 0..runs {
        for monitor in [System::Ebb, System::QemuPc] {
            let Resident { guest, rest } = resident_of(files, monitor)?;
            let case = (monitor.name(), CASE);
            results.add(case, METRIC, rest as f64);
            results.add(case, ("guest-rss", "bytes"), guest as f64);
        }
    }
    Ok(())
}

fn resident_of(files: &Files, monitor: System) -> Result<Resident, BenchError> {
    let name = monitor.name();
    let mut process = Process::start(&mut files.command(monitor, GUEST))
        .map_err(system(format!("start {name}")))?;
    let ready = process
        .await_output(READY, LIMIT)
        .map_err(system(format!("read the output of {name}")))?;
    if !ready {
        let output = process.output().unwrap_or_default();
        return Err(failed(
            monitor,
            "the guest did not boot".to_owned(),
            &output,
        ));
    }
    sleep(SETTLE);
    let smaps = process
        .proc("smaps")
        .map_err(system(format!("read the mappings of {name}")))?;
    let size = u64::from(GUEST.memory_mib) << 20;
    resident(&smaps, size)
        .ok_or_else(|| failed(monitor, "its guest memory was not found".to_owned(), &smaps))
}

/// Adds up smaps (proc(5)). Guest memory is the one mapping of at least `guest` bytes that has the most
/// resident; `None` without one.
pub(super) fn resident(smaps: &str, guest: u64) -> Option<Resident> {
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let number = |text: &str| text.trim().trim_end_matches(" kB").parse::<u64>().ok();
        if let Some(size) = line.strip_prefix("Size:").and_then(number) {
            mappings.push((size * 1024, 0));
        } else if let Some(rss) = line.strip_prefix("Rss:").and_then(number) {
            mappings.last_mut()?.1 = rss * 1024;
        }
    }
    let total: u64 = mappings.iter().map(|(_, rss)| rss).sum();
    let guest = mappings
        .iter()
        .filter(|(size, _)| *size >= guest)
        .map(|(_, rss)| *rss)
        .max()?;
    Some(Resident {
        guest,
        rest: total - guest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = "55d0-55d1 r-xp 0 00:01 1 /bin/ebb\nSize: 2048 kB\nRss: 1024 kB\nPss: 9 kB\n\
                     7f00-7f01 rw-p 0 00:00 0\nSize: 131072 kB\nRss: 65536 kB\n\
                     7f02-7f03 rw-p 0 00:00 0\nSize: 65536 kB\nRss: 8 kB\n";
        let expected = Resident {
            guest: 64 << 20,
            rest: 1032 << 10,
        };
        assert_eq!(resident(smaps, 128 << 20), Some(expected));
        assert_eq!(resident(smaps, 256 << 20), None);
    }
}
