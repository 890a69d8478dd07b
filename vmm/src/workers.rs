//! Threads that share one job: work is drawn from a common stock, so whoever is through with a piece takes the
//! next one. After `max_active` of "mm: support parallel free of memory" (Aaron Lu, 2017), but with threads of
//! the process that the work is for, so in its cgroup and at its expense.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::RwLock;
use std::thread::{self, Builder};

/// How much less important than their process further threads are (nice(2)). The caller is not less: so work
/// shared on a busy host is never slower than work done alone.
pub const NICENESS: i32 = crate::sys::heir::NICENESS;

/// How a job went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared<T> {
    /// Threads that took part, the caller among them.
    pub workers: usize,
    /// Of these, how many panicked: the piece that each was at is not done, the others are.
    pub panicked: usize,
    /// What the caller's own share came to.
    pub own: T,
}

/// Runs `job` on up to `workers` threads, the caller among them, until all have returned. The further ones are
/// called `ebb-NAME1` and so on and run beside `beside`, which the caller does first; they begin when all are there, for
/// to start one the address space is changed, which waits for whatever madvise is at work (Linux before 6.17). Threads that
/// cannot be started are done without. When one panics, the caller runs `job` once more for what is left.
pub fn share<T>(
    workers: usize,
    name: &str,
    beside: impl FnOnce(),
    job: impl Fn() -> T + Sync,
) -> Shared<T> {
    let started = RwLock::new(());
    thread::scope(|scope| {
        let starting = started.write();
        let mut threads = Vec::new();
        for index in 1..workers {
            let help = || {
                // Where it may not be less important it helps all the same.
                let _ = rustix::process::nice(NICENESS);
                drop(started.read());
                job();
            };
            let thread = Builder::new().name(format!("ebb-{name}{index}"));
            match thread.spawn_scoped(scope, help) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    tracing::warn!(%error, started = index, wanted = workers, "fewer workers");
                    break;
                }
            }
        }
        drop(starting);
        beside();
        let own = catch_unwind(AssertUnwindSafe(&job));
        let workers = threads.len() + 1;
        let ends = threads.into_iter().map(thread::ScopedJoinHandle::join);
        let mut panicked = ends.filter(Result::is_err).count();
        let own = match own {
            Ok(own) if panicked == 0 => own,
            Ok(_) => job(),
            Err(_) => {
                panicked += 1;
                job()
            }
        };
        if panicked > 0 {
            tracing::error!(panicked, "workers have panicked");
        }
        Shared {
            workers,
            panicked,
            own,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Draws 0..100; `bad` is asked whether to panic at a number.
    fn draw(workers: usize, bad: impl Fn(usize) -> bool + Sync) -> (Shared<()>, usize) {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let shared = share(
            workers,
            "test",
            || {},
            || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= 100 {
                        return;
                    }
                    assert!(!bad(number), "on purpose");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            },
        );
        (shared, done.into_inner())
    }

    #[test]
    fn everything_is_done_by_any_number_of_workers() {
        for workers in [0, 1, 2, 7] {
            let (shared, done) = draw(workers, |_| false);
            assert_eq!((done, shared.panicked), (100, 0));
            assert_eq!(shared.workers, workers.max(1));
        }
    }

    #[test]
    fn nobody_begins_before_all_are_there() {
        const WORKERS: usize = 64;
        let there = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let names =
                tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
            names
                .filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("ebb-gate")))
                .count()
        };
        let least = AtomicUsize::new(usize::MAX);
        let begun = std::sync::Barrier::new(WORKERS);
        let job = || {
            least.fetch_min(there(), Ordering::Relaxed);
            // Nobody ends before the others have looked.
            begun.wait();
        };
        // A thread has its parent's name until it gives itself its own.
        let caller = Builder::new().name("ebb-gate0".to_owned());
        thread::scope(|scope| {
            let all = || share(WORKERS, "gate", || {}, job);
            caller.spawn_scoped(scope, all).unwrap();
        });
        assert_eq!(least.into_inner(), WORKERS);
    }

    #[test]
    fn a_panic_costs_its_own_piece_only() {
        for workers in [1, 4] {
            let (shared, done) = draw(workers, |number| number == 50);
            assert_eq!((done, shared.panicked), (99, 1), "{workers} workers");
        }
    }

    #[test]
    fn the_caller_does_what_is_beside_first() {
        let order = std::sync::Mutex::new(Vec::new());
        let note = |what| order.lock().unwrap().push(what);
        share(1, "test", || note("beside"), || note("job"));
        assert_eq!(*order.lock().unwrap(), ["beside", "job"]);
    }

    #[test]
    fn threads_that_cannot_be_started_are_done_without() {
        let child = crate::sys::process::fork_for_test(|| {
            crate::sys::process::forbid_threads();
            let (shared, done) = draw(8, |_| false);
            u8::from((shared.workers, done) != (1, 100))
        });
        let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
        let (_, status) = status.unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }
}
