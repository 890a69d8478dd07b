//! Where vCPU threads wait for the gate to open: a seat for each, so that those that are woken together meet in no lock.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, Ordering, lock, wait};

/// A vCPU's seat, on cache lines of its own.
#[repr(align(128))]
struct Seat {
    /// Its thread sleeps here.
    taken: Mutex<bool>,
    opened: Condvar,
    /// It was woken and is not back in the guest yet.
    returning: AtomicBool,
}

/// The seats of all vCPUs. What is counted here decides nothing of order, so it is in none of the models' atomics.
pub(super) struct Seats {
    seats: Box<[Seat]>,
    /// Threads that sleep, or are about to.
    asleep: AtomicU64,
    /// vCPUs that were woken and are not back in the guest yet, and one more while a thread wakes them.
    returning: AtomicU64,
    /// When the first of them was woken, in nanoseconds from `epoch` on.
    since: AtomicU64,
    epoch: Instant,
}

impl Seats {
    pub fn new(vcpus: usize) -> Self {
        let seat = |_| Seat {
            taken: Mutex::new(false),
            opened: Condvar::new(),
            returning: AtomicBool::new(false),
        };
        Self {
            seats: (0..vcpus).map(seat).collect(),
            asleep: AtomicU64::new(0),
            returning: AtomicU64::new(0),
            since: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    /// The vCPU `index` waits until `decide` returns something. After a change of that, [`Seats::wake_all`] must be
    /// called.
    pub fn wait<T>(&self, index: usize, decide: impl Fn() -> Option<T>) -> T {
        let seat = &self.seats[index];
        let mut taken = lock(&seat.taken);
        loop {
            if let Some(decision) = decide() {
                return decision;
            }
            *taken = true;
            self.asleep.fetch_add(1, Ordering::Relaxed);
            taken = wait(&seat.opened, taken);
            self.asleep.fetch_sub(1, Ordering::Relaxed);
            *taken = false;
        }
    }

    /// Wakes those that wait, to decide again. Returns what [`Seats::entered`] does, if the last one is back already.
    pub fn wake_all(&self) -> Option<Duration> {
        let mut some = self.returning.fetch_add(1, Ordering::AcqRel) > 0;
        if !some {
            let now = self.epoch.elapsed().as_nanos();
            let now = u64::try_from(now).unwrap_or(u64::MAX);
            self.since.store(now, Ordering::Relaxed);
        }
        for seat in &self.seats {
            // A thread has looked before this, and sleeps, or will see the change.
            let taken = *lock(&seat.taken);
            if taken {
                if !seat.returning.swap(true, Ordering::AcqRel) {
                    self.returning.fetch_add(1, Ordering::AcqRel);
                }
                some = true;
                seat.opened.notify_one();
            }
        }
        self.came_back().filter(|_| some)
    }

    /// The vCPU `index` is in the guest. If it is the last of those that were woken, returns the time since the first
    /// was.
    pub fn entered(&self, index: usize) -> Option<Duration> {
        let returning = &self.seats[index].returning;
        let returned = returning.swap(false, Ordering::AcqRel);
        returned.then(|| self.came_back()).flatten()
    }

    fn came_back(&self) -> Option<Duration> {
        let last = self.returning.fetch_sub(1, Ordering::AcqRel) == 1;
        let since = Duration::from_nanos(self.since.load(Ordering::Relaxed));
        last.then(|| self.epoch.elapsed().saturating_sub(since))
    }

    /// Number of threads that sleep, or are about to.
    pub fn asleep(&self) -> u64 {
        self.asleep.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn one_that_is_woken_for_a_moment_only_returns_once() {
        let seats = Seats::new(2);
        let open = AtomicBool::new(false);
        assert_eq!(seats.wake_all(), None, "nobody waits");
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let opened = || open.load(Ordering::SeqCst).then_some(7);
                assert_eq!(seats.wait(1, opened), 7);
                seats.entered(1)
            });
            while seats.asleep() == 0 {
                thread::yield_now();
            }
            for _ in 0..3 {
                assert_eq!(seats.wake_all(), None, "it is not back");
            }
            open.store(true, Ordering::SeqCst);
            let times = [seats.wake_all(), vcpu.join().unwrap()];
            assert_eq!(times.iter().flatten().count(), 1, "who ends it");
        });
        assert_eq!(seats.asleep(), 0);
        assert_eq!((seats.entered(1), seats.wake_all()), (None, None));
    }
}
