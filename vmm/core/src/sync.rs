//! Atomics, locks and time: those of std and `parking_lot`, or those of loom under `--cfg loom`.
//!
//! Counters that no decision depends on use std even then: they would only multiply the interleavings.

use std::time::{Duration, Instant};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

pub use locks::{Condvar, Mutex, MutexGuard, give_way, lock, try_lock, wait, wait_until};

/// Locks that a thread can hand to one that waits, which those of std cannot. They know no poison: every step under these
/// locks is whole, also when a thread panics.
#[cfg(not(loom))]
mod locks {
    pub use parking_lot::{Condvar, Mutex, MutexGuard};

    use super::Deadline;

    /// Locks `mutex`.
    #[inline]
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock()
    }

    /// Locks `mutex` unless another thread holds it.
    pub fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        mutex.try_lock()
    }

    /// Hands `mutex` to the thread that has waited longest for it, if there is one, and takes it again after that.
    #[inline]
    pub fn give_way<'a, T>(_: &'a Mutex<T>, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        MutexGuard::bump(&mut guard);
        guard
    }

    /// Waits on `condvar`; may return without a notification.
    pub fn wait<'a, T>(condvar: &Condvar, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        condvar.wait(&mut guard);
        guard
    }

    /// Waits on `condvar` until `deadline` at the latest; may return without a notification.
    pub fn wait_until<'a, T>(
        condvar: &Condvar,
        mut guard: MutexGuard<'a, T>,
        deadline: Deadline,
    ) -> MutexGuard<'a, T> {
        condvar.wait_for(&mut guard, deadline.left());
        guard
    }
}

/// The same with loom's locks.
#[cfg(loom)]
mod locks {
    use std::sync::{PoisonError, TryLockError};

    pub use loom::sync::{Condvar, Mutex, MutexGuard};

    use super::Deadline;

    /// Locks `mutex`.
    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks `mutex` unless another thread holds it.
    pub fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Lets any other thread have `mutex`, and takes it again after that.
    pub fn give_way<'a, T>(mutex: &'a Mutex<T>, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        drop(guard);
        lock(mutex)
    }

    /// Waits on `condvar`; may return without a notification.
    pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits on `condvar`: for ever, as loom has no time.
    pub fn wait_until<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        deadline: Deadline,
    ) -> MutexGuard<'a, T> {
        let waited = condvar.wait_timeout(guard, deadline.left());
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A point in time. Under loom, which has no time, it never comes.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    #[cfg(not(loom))]
    at: Instant,
}

impl Deadline {
    /// The point `time` from now.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self::from(Instant::now(), time)
    }

    /// The point `time` after `start`.
    #[must_use]
    pub fn from(start: Instant, time: Duration) -> Self {
        #[cfg(loom)]
        let _ = (start, time);
        Self {
            #[cfg(not(loom))]
            at: start + time,
        }
    }

    /// The time that is left; zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        #[cfg(loom)]
        return Duration::MAX;
        #[cfg(not(loom))]
        self.at.saturating_duration_since(Instant::now())
    }

    /// Returns true if it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Yields the processor until `done` is true or `limit` has passed, without sleeping. Under loom, which has no
/// time, it returns at once.
pub fn spin_until(limit: Deadline, mut done: impl FnMut() -> bool) {
    while !cfg!(loom) && !done() && !limit.passed() {
        std::thread::yield_now();
    }
}
