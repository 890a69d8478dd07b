//! Machines whose memory is mostly addresses: page tables that are real, and next to nothing in them.

use std::fs::{File, read_to_string};
use std::io;
use std::os::unix::fs::FileExt;

use super::ending::End;
use super::machines::ended;
use super::{Arguments, Results};
use crate::{BenchError, system};
use ebb_harness::idle::Place;

/// Bytes that one page table maps.
const TABLE: u64 = 2 << 20;

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let place = Place::new()?;
    let memory = format!("size={}G,thp=off", arguments.sparse_gib);
    let runs = arguments.runs.min(3);
    let mut systems = [("ebb", "on"), ("ebb-alone", "off")];
    for run in 1..=runs {
        systems.rotate_left(1);
        for end in [End::Stop, End::Kill] {
            for (name, guardian) in systems {
                let idle = place.running(&memory, guardian)?;
                let tables = touch(idle.pid()).map_err(system("touch the guest's memory"))?;
                let case = case_of(end);
                #[allow(clippy::cast_precision_loss, reason = "a count of millions at most")]
                results.add((name, &case), ("tables", "pages"), tables as f64);
                let times = ended(&place, idle, (guardian, end), tables * 4096)?;
                times.record(results, (name, &case));
            }
        }
        eprintln!("teardown: sparse machines, run {run} of {runs}");
    }
    let kill = case_of(End::Kill);
    results.divide(
        "kill_speedup_sparse",
        ["ebb-alone", &kill, "gone"],
        ["ebb", &kill, "gone"],
    );
    Ok(())
}

fn case_of(end: End) -> String {
    format!("{} sparse", end.name())
}

/// Reads a byte of each 2 MiB of a machine's biggest region, as a debugger would: the kernel maps its page of zeroes
/// there. How many tables it takes for that.
fn touch(monitor: u32) -> io::Result<u64> {
    let maps = read_to_string(format!("/proc/{monitor}/maps"))?;
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        Some((address(start)?, address(end)?))
    };
    let biggest = maps.lines().filter_map(range).max_by_key(|it| it.1 - it.0);
    let (start, end) = biggest.ok_or(io::ErrorKind::NotFound)?;
    let memory = File::open(format!("/proc/{monitor}/mem"))?;
    let mut tables = 0;
    for address in (start..end).step_by(TABLE as usize) {
        memory.read_exact_at(&mut [0], address)?;
        tables += 1;
    }
    Ok(tables)
}
