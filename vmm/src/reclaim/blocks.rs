//! Whole blocks, in big chunks, by several workers when there is much to do.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ebb_core::lazy::{Chunk, LazyMemory, Sweep};
use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::{Release, ReleasePages};

use super::Outcome;
use crate::workers::share;

/// How long a reuse may have to wait for a chunk, unless a call takes that long whatever its size.
const CHUNK_TIME: Duration = Duration::from_millis(1);

/// Chunks are never bigger.
const MAX_CHUNK: u64 = 256 << 20;

/// A worker is worth its start for so many bytes: 40 ms of work in pages of 4 KiB.
const BYTES_PER_WORKER: u64 = 512 << 20;

/// The live guest needs the cores, too.
const MAX_WORKERS: u64 = 4;

/// One sweep over whole blocks, up to a number of bytes.
pub(super) struct BlockPass<'a> {
    lazy: &'a LazyMemory,
    pages: &'a dyn ReleasePages,
    how: Release,
    todo: Mutex<Todo>,
}

struct Todo {
    sweep: Sweep,
    left: u64,
    outcome: Outcome,
}

impl<'a> BlockPass<'a> {
    pub fn new(
        lazy: &'a LazyMemory,
        pages: &'a dyn ReleasePages,
        how: Release,
        sweep: Sweep,
        bytes: u64,
    ) -> Self {
        let todo = Todo {
            sweep,
            left: bytes,
            outcome: Outcome::default(),
        };
        Self {
            lazy,
            pages,
            how,
            todo: Mutex::new(todo),
        }
    }

    /// Runs it with chunks of `chunk` bytes to begin with; returns what the next pass should begin with.
    pub fn run(&self, chunk: u64) -> u64 {
        let stats = self.lazy.snapshot();
        let most = self.with(|todo| todo.left);
        let bytes = most.min(stats.lazy_bytes + stats.unmapped_bytes);
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let workers = (bytes / BYTES_PER_WORKER).min(cores).min(MAX_WORKERS);
        let workers = usize::try_from(workers).unwrap_or(1);
        let shared = share(workers, "take", || {}, || self.work(chunk));
        self.with(|todo| todo.outcome.failures += shared.panicked as u64);
        shared.own
    }

    pub fn outcome(&self) -> Outcome {
        self.with(|todo| todo.outcome)
    }

    fn with<T>(&self, action: impl FnOnce(&mut Todo) -> T) -> T {
        action(&mut self.todo.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn take(&self, size: u64) -> Option<Chunk<'a>> {
        self.with(|todo| {
            let chunk = self.lazy.take_chunk(&mut todo.sweep, size.min(todo.left))?;
            todo.left -= chunk.range().len();
            Some(chunk)
        })
    }

    /// Takes chunks until none is left, each of about [`CHUNK_TIME`].
    fn work(&self, size: u64) -> u64 {
        let mut pace = Pace::new(size);
        while let Some(chunk) = self.take(pace.size) {
            let (range, start) = (chunk.range(), Instant::now());
            let refused = self.release(chunk);
            pace.learn(range.len(), start.elapsed());
            if refused && range.len() > BLOCK_SIZE {
                self.piecemeal(range);
            }
        }
        pace.size
    }

    /// Goes through `range`, which failed as a whole, block by block: a page that the host keeps, for it is locked for
    /// instance, does not keep its neighbours.
    fn piecemeal(&self, range: GpaRange) {
        let mut sweep = self.with(|todo| todo.sweep.clone()).within(range);
        let next = |sweep: &mut Sweep| {
            self.with(|todo| {
                let chunk = self.lazy.take_chunk(sweep, BLOCK_SIZE.min(todo.left))?;
                todo.left -= chunk.range().len();
                Some(chunk)
            })
        };
        while let Some(chunk) = next(&mut sweep) {
            self.release(chunk);
        }
    }

    /// Releases a chunk. Returns true if the host has refused a part of it.
    fn release(&self, chunk: Chunk<'_>) -> bool {
        let range = chunk.range();
        let released = self.pages.release(&[range], self.how);
        let bytes = released.bytes.first().copied().unwrap_or(0);
        // With hugetlb less may be gone than was asked for.
        if bytes == range.len() {
            match self.how {
                Release::MarkFree => chunk.unmapped(self.lazy.begin_generation()),
                Release::Discard => chunk.discarded(),
            }
        } else {
            drop(chunk);
        }
        self.with(|todo| {
            todo.left += range.len() - bytes.min(range.len());
            todo.outcome.bytes += bytes;
            todo.outcome.calls += released.calls;
            todo.outcome.failures += released.failures;
        });
        released.failures > 0
    }
}

/// Finds the size of chunks such that one takes about [`CHUNK_TIME`], whatever the page size and the host.
///
/// Where smaller chunks are not quicker, what takes time is the call itself: it interrupts every vCPU that
/// runs, and an emulated or a crowded host takes milliseconds for that. Smaller chunks are then no gain for
/// a reuse and a loss for reclaim, so a chunk may take a few times as long as a call does anyway.
pub(super) struct Pace {
    /// Bytes of the next chunk.
    pub size: u64,
    /// Bytes of the last one, and the time that it took.
    last: (u64, Duration),
    /// What a call takes whatever its size, as far as that has shown.
    call: Duration,
}

impl Pace {
    pub const fn new(size: u64) -> Self {
        Self {
            size,
            last: (0, Duration::ZERO),
            call: Duration::ZERO,
        }
    }

    /// A chunk of `len` bytes took `took`.
    pub fn learn(&mut self, len: u64, took: Duration) {
        let (last_len, last_took) = self.last;
        if len <= last_len / 2 && took >= last_took * 3 / 4 {
            self.call = took;
        }
        self.call = self.call.min(took);
        self.last = (len, took);
        let aim = CHUNK_TIME.max(self.call * 4);
        if took > aim {
            self.size = (self.size / 2).max(BLOCK_SIZE);
        } else if len == self.size && took < aim * 2 / 5 {
            self.size = (self.size * 2).min(MAX_CHUNK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn chunks_aim_at_a_millisecond() {
        let next = |chunk, len, micros| {
            let mut pace = Pace::new(chunk);
            pace.learn(len, Duration::from_micros(micros));
            pace.size
        };
        assert_eq!(next(8 * MIB, 8 * MIB, 20), 16 * MIB);
        assert_eq!(next(8 * MIB, 4096, 20), 8 * MIB, "a small one says little");
        assert_eq!(next(8 * MIB, 8 * MIB, 700), 8 * MIB);
        assert_eq!(next(8 * MIB, 8 * MIB, 1500), 4 * MIB);
        assert_eq!(next(2 * MIB, 2 * MIB, 90_000), 2 * MIB);
        assert_eq!(next(MAX_CHUNK, MAX_CHUNK, 20), MAX_CHUNK);
    }

    /// The sizes of chunks where a call takes `call` and a MiB takes `mib` microseconds.
    fn sizes(call: u64, mib: u64) -> Vec<u64> {
        let mut pace = Pace::new(8 * MIB);
        let mut step = || {
            let took = call + pace.size / MIB * mib;
            pace.learn(pace.size, Duration::from_micros(took));
            pace.size / MIB
        };
        (0..12).map(|_| step()).collect()
    }

    #[test]
    fn calls_that_take_long_by_themselves_do_not_make_chunks_small() {
        // Quick calls: a millisecond, no more.
        assert!(sizes(4, 80)[6..].iter().all(|size| *size == 8));
        assert!(sizes(100, 400)[6..].iter().all(|size| *size == 2));
        // Slow calls: most of the time goes to the pages.
        assert!(sizes(15_000, 500)[6..].iter().all(|size| *size >= 16));
        // Twice a call took long for another reason: the next ones tell.
        let mut pace = Pace::new(8 * MIB);
        for took in [4000, 4000, 300, 300, 650, 650, 1300] {
            pace.learn(pace.size, Duration::from_micros(took));
        }
        assert!(pace.size <= 16 * MIB, "{}", pace.size);
    }
}
