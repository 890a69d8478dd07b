//! The engine alone: memory of this process, which KVM knows nothing of.

use std::time::Instant;

use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_vmm::memory::{Backing, GuestRam};
use ebb_vmm::teardown::{PageSize, Region, execute, plan};
use vm_memory::{Bytes, GuestAddress};

use super::{Arguments, GIB, Results, SECONDS};
use crate::report::Row;
use crate::{BenchError, system};

/// What is compared.
const WORKERS: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Those of them that can have a CPU each; two at least.
pub(super) fn workers() -> impl Iterator<Item = usize> {
    let cpus = std::thread::available_parallelism().map_or(2, |cpus| cpus.get().max(2));
    WORKERS.into_iter().filter(move |&count| count <= cpus)
}

/// Memory of `bytes` bytes.
fn memory(bytes: u64, backing: Backing) -> Result<GuestRam, BenchError> {
    let range = GpaRange::new(0, bytes).ok_or(std::io::ErrorKind::InvalidInput);
    let range = range.map_err(system("size the memory"))?;
    GuestRam::allocate(backing, &[range])
        .map_err(|error| std::io::Error::other(error.to_string()))
        .map_err(system("make the memory; give a smaller --gib"))
}

/// Memory of `bytes` bytes, all of it populated.
pub(super) fn populated(bytes: u64, backing: Backing) -> Result<GuestRam, BenchError> {
    let ram = memory(bytes, backing)?;
    ram.populate_unless(|_| false)
        .map_err(|error| std::io::Error::other(error.to_string()))
        .map_err(system("populate the memory; give a smaller --gib"))?;
    Ok(ram)
}

/// Frees it as the kernel does at an exit: by one CPU.
pub(super) fn serially(ram: GuestRam) -> f64 {
    let start = Instant::now();
    drop(ram);
    start.elapsed().as_secs_f64()
}

/// Frees it with so many workers; unmapping counts.
pub(super) fn shared(ram: GuestRam, workers: usize) -> f64 {
    let start = Instant::now();
    free(&ram, workers);
    drop(ram);
    start.elapsed().as_secs_f64()
}

/// Frees it with so many workers; it stays mapped.
pub(super) fn free(ram: &GuestRam, workers: usize) {
    let regions = ram.regions().iter().map(|region| Region {
        range: region.gpa,
        page_size: PageSize::Small,
        unit: region.file.unwrap_or(BLOCK_SIZE),
    });
    execute(&plan(regions, None), workers, ram, || {});
}

/// Touched memory in pages of 4 KiB, or transparent huge pages.
pub(super) fn touched(bytes: u64, thp: bool) -> Result<GuestRam, BenchError> {
    let backing = Backing {
        thp,
        ..Backing::default()
    };
    populated(bytes, backing)
}

/// An address space of which one page in 2 MiB was read: no memory but the tables, which are real.
fn sparse(bytes: u64) -> Result<GuestRam, BenchError> {
    let ram = memory(bytes, Backing::default())?;
    let view = ram.memory();
    for address in (0..bytes).step_by(2 << 20) {
        let mut byte = [0u8];
        let read = view.read_slice(&mut byte, GuestAddress(address));
        read.map_err(|error| std::io::Error::other(error.to_string()))
            .map_err(system("touch the sparse memory"))?;
    }
    drop(view);
    Ok(ram)
}

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let bytes = arguments.gib * GIB;
    // No workers: as the kernel frees at an exit.
    let small = [None].into_iter().chain(WORKERS.map(Some));
    let mut subjects: Vec<_> = small.map(|workers| ("4k", workers)).collect();
    subjects.push(("thp", None));
    subjects.extend(workers().skip(1).map(|workers| ("thp", Some(workers))));
    for run in 1..=arguments.runs {
        for &(case, workers) in &subjects {
            let ram = touched(bytes, case == "thp")?;
            match workers {
                None => results.add(("munmap", case), SECONDS, serially(ram)),
                Some(workers) => {
                    let time = shared(ram, workers);
                    results.add(("ebb", &case_of(case, workers)), SECONDS, time);
                }
            }
        }
        subjects.rotate_left(1);
        eprintln!("teardown: memory, run {run} of {}", arguments.runs);
    }
    // What the model is calibrated with.
    #[allow(clippy::cast_precision_loss, reason = "whole GiB")]
    results.add(("munmap", "4k"), ("size", "bytes"), bytes as f64);
    let sparse_bytes = arguments.sparse_gib * GIB;
    #[allow(clippy::cast_precision_loss, reason = "a count of millions at most")]
    results.add(
        ("munmap", "sparse"),
        ("tables", "pages"),
        (sparse_bytes >> 21) as f64,
    );
    for _ in 0..arguments.runs.min(3) {
        results.add(
            ("munmap", "sparse"),
            SECONDS,
            serially(sparse(sparse_bytes)?),
        );
        let time = shared(sparse(sparse_bytes)?, 2);
        results.add(("ebb", &case_of("sparse", 2)), SECONDS, time);
    }
    for workers in workers().skip(1) {
        for case in ["4k", "thp", "sparse"] {
            let name = match case {
                "4k" => format!("speedup_{workers}"),
                case => format!("speedup_{workers}_{case}"),
            };
            let by = case_of(case, workers);
            results.divide(&name, ["munmap", case, "time"], ["ebb", &by, "time"]);
        }
    }
    beyond_best(results, "", |row| row.median);
    beyond_best(results, "_best", |row| row.min);
    Ok(())
}

/// Which setting is the best, and how much of its rate is left at the worst higher one.
fn beyond_best(results: &mut Results, suffix: &str, time: impl Fn(&Row) -> f64) {
    let sweep = sweep(results, time);
    let best = sweep.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((workers, time)) = best {
        let beyond = sweep.iter().filter(|point| point.0 > workers);
        let worst = beyond.map(|point| point.1).fold(time, f64::max);
        let best = if suffix.is_empty() {
            "best-workers"
        } else {
            "best-workers-fastest"
        };
        results.add(("ebb", "4k"), (best, ""), workers);
        results.higher(&format!("beyond_best{suffix}"), time / worst);
    }
}

pub(super) fn case_of(case: &str, workers: usize) -> String {
    format!("{case}, {workers}w")
}

/// Workers and the time.
pub(super) fn sweep(results: &Results, time: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let point = |workers: usize| {
        let row = results.row("ebb", &case_of("4k", workers), "time")?;
        #[allow(clippy::cast_precision_loss, reason = "a small count")]
        Some((workers as f64, time(&row)))
    };
    WORKERS.into_iter().filter_map(point).collect()
}
