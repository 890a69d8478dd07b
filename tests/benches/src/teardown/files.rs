//! Memory in files: what it takes for two workers not to wait for each other.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use ebb_core::release::Release;
use ebb_vmm::memory::Backing;
use ebb_vmm::sys::{Mapping, MappingKind};

use super::{Arguments, GIB, Results, SECONDS, engine};
use crate::{BenchError, system};

/// Files of equal size that are compared.
const FILES: [u64; 5] = [1, 2, 4, 8, 16];

/// What a worker frees of one file at a time, when there is but one.
const PIECE: usize = 256 << 20;

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let bytes = arguments.gib * GIB;
    let backing = Backing {
        shared: true,
        ..Backing::default()
    };
    for run in 1..=arguments.runs {
        let time = engine::serially(engine::populated(bytes, backing)?);
        results.add(("munmap", "files"), SECONDS, time);
        let time = engine::shared(engine::populated(bytes, backing)?, 2);
        results.add(("ebb", "files, 2w"), SECONDS, time);
        for files in FILES {
            let time = in_files(bytes, files)?;
            results.add(("ebb", &format!("{files} files, 2w")), SECONDS, time);
        }
        eprintln!("teardown: files, run {run} of {}", arguments.runs);
    }
    results.divide(
        "speedup_2_files",
        ["munmap", "files", "time"],
        ["ebb", "files, 2w", "time"],
    );
    Ok(())
}

/// Seconds for freeing memory in so many files by two threads; unmapping counts.
fn in_files(bytes: u64, files: u64) -> Result<f64, BenchError> {
    let error = system("make files of memory; give a smaller --gib");
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mapping = Mapping::shared(len, 0, MappingKind::Small, bytes / files);
    let mapping = mapping.and_then(|mapping| mapping.populate().map(|()| mapping));
    let mapping = mapping.map_err(error)?;
    let piece = if files == 1 {
        PIECE.min(len)
    } else {
        len / files as usize
    };
    let start = Instant::now();
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        loop {
            let offset = next.fetch_add(piece, Ordering::Relaxed);
            if offset >= len {
                break Ok(());
            }
            mapping.release(offset, piece.min(len - offset), Release::Discard)?;
        }
    };
    let freed = thread::scope(|scope| {
        let other = scope.spawn(work);
        let own = work();
        let other = other
            .join()
            .map_err(|_| io::Error::other("a worker has panicked"))?;
        own.and(other)
    });
    freed.map_err(system("free the files"))?;
    drop(mapping);
    Ok(start.elapsed().as_secs_f64())
}
