//! Releases whole blocks in large chunks, by several workers if there is much to do.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use ebb_core::lazy::{Chunk, LazyMemory, Sweep};
use ebb_core::metrics::Histogram;
use ebb_core::range::BLOCK_SIZE;
use ebb_core::release::{Release, ReleasePages};

use super::Outcome;
use super::pace::Pace;
use super::turns::Turn;
use crate::workers::share;

/// One worker is started for each of this many bytes: 40 ms of work in pages of 4 KiB.
const BYTES_PER_WORKER: u64 = 512 << 20;

/// Maximum number of workers: the live guest needs the cores, too.
const MAX_WORKERS: u64 = 4;

/// One sweep over whole blocks, up to a number of bytes.
pub(super) struct BlockPass<'a> {
    lazy: &'a LazyMemory,
    pages: &'a dyn ReleasePages,
    how: Release,
    chunks: &'a Histogram,
    todo: Mutex<Todo>,
}

struct Todo {
    sweep: Sweep,
    /// Sweeps over chunks that the kernel has refused as a whole. Their blocks go one by one: so a page that it keeps, for
    /// example a locked one, does not keep the other blocks.
    refused: Vec<Sweep>,
    /// Bytes that are still to be taken.
    left: u64,
    /// All sweeps are at their end.
    done: bool,
    outcome: Outcome,
}

impl<'a> BlockPass<'a> {
    /// A pass over at most `bytes` bytes of `sweep`, which releases blocks as `how` says. Notes in `chunks` how long each
    /// chunk takes, in microseconds.
    pub fn new(
        (lazy, pages): (&'a LazyMemory, &'a dyn ReleasePages),
        how: Release,
        sweep: Sweep,
        bytes: u64,
        chunks: &'a Histogram,
    ) -> Self {
        let todo = Todo {
            sweep,
            refused: Vec::new(),
            left: bytes,
            done: false,
            outcome: Outcome::default(),
        };
        Self {
            lazy,
            pages,
            how,
            chunks,
            todo: Mutex::new(todo),
        }
    }

    /// Runs the pass to its end, or until `turn` does not go on. Returns whether it is at its end; if not, it may be run
    /// again.
    pub fn run(&self, turn: &Turn<'_>, pace: &mut Pace) -> bool {
        let cores = || thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        self.run_on(cores, turn, pace)
    }

    fn run_on(&self, cores: impl FnOnce() -> u64, turn: &Turn<'_>, pace: &mut Pace) -> bool {
        let stats = self.lazy.snapshot();
        let max = self.with(|todo| todo.left);
        let bytes = max.min(stats.lazy_bytes + stats.unmapped_bytes);
        let job = || self.work(turn, *pace);
        let shared = share(workers(bytes, cores), "take", || {}, job);
        *pace = shared.own;
        self.with(|todo| {
            todo.outcome.failures += shared.panicked as u64;
            todo.done
        })
    }

    /// What the pass did.
    pub fn outcome(&self) -> Outcome {
        self.with(|todo| todo.outcome)
    }

    fn with<T>(&self, action: impl FnOnce(&mut Todo) -> T) -> T {
        action(&mut self.todo.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes chunks until none is left. Returns what it has learned.
    fn work(&self, turn: &Turn<'_>, mut pace: Pace) -> Pace {
        while turn.goes_on()
            && let Some(chunk) = self.with(|todo| todo.take(self.lazy, pace.size()))
        {
            let (len, start) = (chunk.range().len(), Instant::now());
            self.release(chunk);
            let took = start.elapsed();
            pace.learn(len, took);
            self.chunks
                .record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
        pace
    }

    fn release(&self, chunk: Chunk<'_>) {
        let range = chunk.range();
        let released = self.pages.release(&[range], self.how);
        let bytes: u64 = released.bytes.iter().sum();
        // With hugetlb less may be released than was asked for.
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
            todo.outcome += &released;
            if released.failures > 0 && range.len() > BLOCK_SIZE {
                let again = todo.sweep.clone().within(range);
                todo.refused.push(again);
                todo.done = false;
            }
        });
    }
}

impl Todo {
    fn take<'a>(&mut self, lazy: &'a LazyMemory, size: u64) -> Option<Chunk<'a>> {
        while let Some(sweep) = self.refused.last_mut() {
            if let Some(chunk) = lazy.take_chunk(sweep, BLOCK_SIZE.min(self.left)) {
                self.left -= chunk.range().len();
                return Some(chunk);
            }
            self.refused.pop();
        }
        let Some(chunk) = lazy.take_chunk(&mut self.sweep, size.min(self.left)) else {
            self.done = true;
            return None;
        };
        self.left -= chunk.range().len();
        Some(chunk)
    }
}

/// Number of workers for `bytes` bytes on a host with so many `cores`, which is called only if it matters: the answer takes a
/// dozen system calls (`sched_getaffinity`, and the cgroup's files), and what the guest frees meanwhile is left to the next order.
fn workers(bytes: u64, cores: impl FnOnce() -> u64) -> usize {
    let wanted = (bytes / BYTES_PER_WORKER).min(MAX_WORKERS);
    if wanted <= 1 {
        return 1;
    }
    usize::try_from(wanted.min(cores())).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Condvar};
    use std::thread::ThreadId;
    use std::time::Duration;

    use ebb_core::generation::VmGeneration;
    use ebb_core::lazy::Pieces;
    use ebb_core::range::GpaRange;
    use ebb_core::release::Released;

    use super::*;
    use crate::reclaim::turns::{Turns, Until, Work};

    const GIB: u64 = 1 << 30;

    /// Memory whose releases wait until `expected` threads are in one. If that takes 20 s, they wait no more.
    struct Meeting {
        expected: AtomicUsize,
        threads: Mutex<HashSet<ThreadId>>,
        met: Condvar,
    }

    impl Meeting {
        fn new(expected: usize) -> Self {
            Self {
                expected: AtomicUsize::new(expected),
                threads: Mutex::default(),
                met: Condvar::new(),
            }
        }

        fn threads(&self) -> usize {
            self.threads.lock().unwrap().len()
        }
    }

    impl ReleasePages for Meeting {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            1
        }

        fn release(&self, ranges: &[GpaRange], _: Release) -> Released {
            let mut threads = self.threads.lock().unwrap();
            threads.insert(thread::current().id());
            self.met.notify_all();
            let timeout = Duration::from_secs(20);
            let expected = self.expected.load(Ordering::Relaxed);
            let waiting = |threads: &mut HashSet<_>| threads.len() < expected;
            let waited = self.met.wait_timeout_while(threads, timeout, waiting);
            if waited.unwrap().1.timed_out() {
                self.expected.store(0, Ordering::Relaxed);
            }
            Released {
                bytes: ranges.iter().map(|range| range.len()).collect(),
                calls: 1,
                ..Released::default()
            }
        }
    }

    fn lazy(bytes: u64) -> LazyMemory {
        let lazy = LazyMemory::new(Arc::new(VmGeneration::default()));
        lazy.free(&[GpaRange::new(0, bytes).unwrap()]);
        lazy
    }

    /// Keeps the first block, or panics at it.
    struct Keeping {
        panics: bool,
    }

    impl ReleasePages for Keeping {
        fn can_mark_free(&self) -> bool {
            true
        }

        fn max_batch(&self) -> usize {
            1
        }

        fn release(&self, ranges: &[GpaRange], _: Release) -> Released {
            let first = ranges[0].start() == 0;
            assert!(!(first && self.panics), "on purpose");
            Released {
                bytes: vec![if first { 0 } else { ranges[0].len() }],
                calls: 1,
                failures: first.into(),
                ..Released::default()
            }
        }
    }

    /// Runs a pass to its end on so many cores. Returns what it did.
    fn run(
        cores: u64,
        memory: (&LazyMemory, &dyn ReleasePages),
        how: Release,
        bytes: u64,
    ) -> Outcome {
        let (turns, chunks) = (Turns::default(), Histogram::default());
        let ticket = turns.ticket(true, Until::default());
        let turn = turns.take(&ticket, Work::Blocks, None).unwrap();
        let sweep = Sweep::new(Pieces::Blocks, u64::MAX);
        let pass = BlockPass::new(memory, how, sweep, bytes, &chunks);
        assert!(pass.run_on(|| cores, &turn, &mut Pace::new()));
        pass.outcome()
    }

    #[test]
    fn much_memory_is_released_by_several_threads_at_once() {
        let (lazy, pages) = (lazy(2 * GIB), Meeting::new(2));
        let outcome = run(2, (&lazy, &pages), Release::Discard, u64::MAX);
        assert_eq!(outcome.bytes, 2 * GIB);
        assert_eq!(pages.threads(), 2);
        assert_eq!(lazy.snapshot().discarded_bytes, 2 * GIB);
    }

    #[test]
    fn a_little_is_released_by_the_caller_alone() {
        for (free, wanted) in [(GIB - 4096, u64::MAX), (8 * GIB, GIB - 4096)] {
            let (lazy, pages) = (lazy(free), Meeting::new(1));
            let outcome = run(64, (&lazy, &pages), Release::MarkFree, wanted);
            assert_eq!(outcome.bytes, GIB - BLOCK_SIZE);
            assert_eq!(pages.threads(), 1, "{free} {wanted}");
        }
    }

    #[test]
    fn another_block_goes_for_one_that_is_kept_and_a_panic_is_a_failure() {
        for (panics, blocks) in [(false, 2), (true, 1)] {
            let (lazy, pages) = (lazy(4 * BLOCK_SIZE), Keeping { panics });
            let outcome = run(1, (&lazy, &pages), Release::Discard, 2 * BLOCK_SIZE);
            let done = (outcome.bytes, outcome.failures);
            assert_eq!(done, (blocks * BLOCK_SIZE, 1), "panics: {panics}");
            assert_eq!(lazy.snapshot().discarded_bytes, outcome.bytes);
        }
    }

    #[test]
    fn workers_follow_the_bytes_and_the_cores() {
        let half = BYTES_PER_WORKER;
        for (bytes, cores, want) in [
            (0, 8, 1),
            (2 * half - 1, 8, 1),
            (2 * half, 8, 2),
            (3 * half, 8, 3),
            (u64::MAX, 2, 2),
            (u64::MAX, 64, 4),
        ] {
            assert_eq!(workers(bytes, || cores), want, "{bytes} {cores}");
        }
        let asked = || panic!("the host was asked for its cores");
        assert_eq!(workers(2 * half - 1, asked), 1);
    }
}
