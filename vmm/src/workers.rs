//! Threads that share one job. Each takes a piece of work, and the next one when it has done that, until none is left.
//! After `max_active` of "mm: support parallel free of memory" (Aaron Lu, 2017), but with threads of the process that the
//! work is for: so they are in its cgroup, and it is charged for them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::RwLock;
use std::thread::{self, Builder};

/// Nice increment of extra threads. The calling thread keeps its priority, so that on a busy host shared work is never
/// slower than work done alone.
pub const NICE_INCREMENT: i32 = 5;

/// Lowers the priority of the calling thread by [`NICE_INCREMENT`]. Where that is not allowed, it keeps its priority.
pub fn lower_priority() {
    let _ = rustix::process::nice(NICE_INCREMENT);
}

/// How a shared job went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedWork<T> {
    /// Threads that took part, the calling one among them.
    pub workers: usize,
    /// How many of these panicked. The piece that each of them was working on is not done; all others are.
    pub panicked: usize,
    /// What the calling thread's run of the job returned.
    pub own: T,
}

/// Runs `job` on up to `workers` threads, the calling one among them, and returns when all have returned. The extra threads
/// are called `ebb-NAME1` and so on.
///
/// The extra threads begin only when all of them exist: starting a thread changes the address space, which has to wait for
/// every madvise(2) that is running (Linux before 6.17). Meanwhile the calling thread runs `first`, and `job` after
/// that. If a thread cannot be started, there are fewer. If one panics, the calling thread runs `job` again for what is left.
pub fn share<T>(
    workers: usize,
    name: &str,
    first: impl FnOnce(),
    job: impl Fn() -> T + Sync,
) -> SharedWork<T> {
    let all_started = RwLock::new(());
    thread::scope(|scope| {
        let starting = all_started.write();
        let mut threads = Vec::new();
        for index in 1..workers {
            let run = || {
                lower_priority();
                drop(all_started.read());
                job();
            };
            let thread = Builder::new().name(format!("ebb-{name}{index}"));
            match thread.spawn_scoped(scope, run) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    tracing::warn!(
                        %error,
                        started = index,
                        wanted = workers,
                        "not all worker threads could be started"
                    );
                    break;
                }
            }
        }
        drop(starting);
        first();
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
        SharedWork {
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

    /// Counts the numbers from 0 to 99, each drawn by one worker. Panics at those that are `bad`.
    fn draw(workers: usize, bad: impl Fn(usize) -> bool + Sync) -> (SharedWork<()>, usize) {
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
            // No thread ends before the others have counted.
            begun.wait();
        };
        // A thread has its parent's name until it sets its own.
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
    fn only_extra_threads_are_less_important() {
        let priority = || rustix::process::getpriority_process(None).unwrap();
        let before = priority();
        let seen = std::sync::Mutex::new(Vec::new());
        let begun = std::sync::Barrier::new(3);
        let note = || {
            seen.lock().unwrap().push(priority());
            // Each thread notes once.
            begun.wait();
        };
        share(3, "test", || {}, note);
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        let extra = (before + NICE_INCREMENT).min(19);
        assert_eq!(seen, [before, extra, extra]);
        assert_eq!(priority(), before);
    }

    #[test]
    fn the_caller_has_something_to_do_first() {
        let order = std::sync::Mutex::new(Vec::new());
        let note = |what| order.lock().unwrap().push(what);
        share(1, "test", || note("first"), || note("job"));
        assert_eq!(*order.lock().unwrap(), ["first", "job"]);
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
