//! `ebb-bench arena`: what an arena costs the monitor: memory when nobody touches it, and looks through its table. Needs no KVM.

use std::time::Instant;

use ebb_core::range::GpaRange;
use ebb_hypercall_abi::arena::Layout;
use ebb_hypercall_abi::granule::{State, Word};
use ebb_vmm::arena::Arena;
use ebb_vmm::memory::{Backing, GuestRam};
use ebb_vmm::sys::resident_bytes;
use vm_memory::{Bytes, GuestAddress};

use super::BenchError;
use super::report::Report;
use super::results::Results;
use ebb_harness::error::{Context, Result};

const START: u64 = 4 << 30;
const GRANULE: u64 = 2 << 20;
const TIB: u64 = 1 << 40;
/// Frees of this generation are younger than what is looked for.
const YOUNG: u64 = 9;

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Looks at each table
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// Runs it, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: there is no address space, or the report cannot be written.
pub fn run(arguments: &Arguments) -> std::result::Result<(), BenchError> {
    measure(arguments.runs)?.publish()
}

/// Measures with so many looks at each table.
///
/// # Errors
/// There is no address space.
pub fn measure(runs: u32) -> std::result::Result<Report, BenchError> {
    let mut results = Results::default();
    let resident = || resident_bytes().context("this process's resident memory");
    let before = resident()?;
    let untouched = arena(4 * TIB)?;
    let grown = resident()?.saturating_sub(before);
    results.add(("ebb", "4 TiB untouched"), ("rss", "bytes"), grown as f64);
    drop(untouched);

    let (memory, arena) = arena(TIB)?;
    let layout = arena.place().layout;
    let search = || {
        let found = arena.take(&mut 0, YOUNG - 1, u64::MAX);
        assert!(found.is_none(), "nothing is as old");
    };
    let take = || {
        let found = arena.take(&mut 0, YOUNG, u64::MAX);
        assert!(found.is_some(), "all of it");
    };
    let mut look = |case: &str, look: &dyn Fn()| {
        for _ in 0..runs {
            let start = Instant::now();
            look();
            let ms = start.elapsed().as_secs_f64() * 1e3;
            results.add(("ebb", case), ("look", "ms"), ms);
        }
    };
    let count = || assert!(arena.stats().scans_total > 0);
    look("1 TiB untouched, count", &count);
    look("1 TiB untouched, search", &search);
    fill(&memory, layout, true)?;
    look("1 TiB half lazy, count", &count);
    look("1 TiB half lazy, search for older", &search);
    fill(&memory, layout, false)?;
    look("1 TiB all lazy, search for older", &search);
    look("1 TiB all lazy, take and give back", &take);
    let scan = results.median("ebb", "1 TiB half lazy, search for older", "look");
    // The goals are 32 MiB and 5 ms.
    results.lower("arena_rss_4tib_mib", grown as f64 / f64::from(1 << 20));
    results.lower("arena_scan_1tib_ms", scan.context("samples")?);
    Ok(results.report("arena"))
}

/// Memory as the monitor makes it, with an arena.
fn arena(size: u64) -> Result<(GuestRam, Arena)> {
    let range = |start, len| GpaRange::new(start, start + len).context("a range of pages");
    let (ram, gpa) = (range(0, 4096)?, range(START, size)?);
    let backing = Backing {
        thp: true,
        ..Backing::default()
    };
    let memory = GuestRam::with_arenas(backing, &[ram], &[gpa]).context("address space")?;
    let arena = Arena::new(0, "arena".to_owned(), gpa, GRANULE, memory.memory());
    Ok((memory, arena.context("an arena")?))
}

/// Writes every word of the table: the same state, but every other word is 0 when `half`.
fn fill(memory: &GuestRam, layout: Layout, half: bool) -> Result<()> {
    let lazy = Word::new(State::Lazy, YOUNG).raw();
    let word = |n: u64| if half && n % 2 == 1 { 0 } else { lazy };
    let words = (0..layout.granules()).flat_map(|n| word(n).to_le_bytes());
    let bytes: Vec<u8> = words.collect();
    let at = GuestAddress(START + layout.table());
    memory.memory().write_slice(&bytes, at).context("the table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untouched_arena_costs_little_and_a_look_is_short() {
        let report = measure(1).unwrap();
        let of = |name| report.ratio(name).unwrap();
        assert!(of("arena_rss_4tib_mib") < 32.0, "{report}");
        assert!(of("arena_scan_1tib_ms") > 0.0, "{report}");
    }
}
