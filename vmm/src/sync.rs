//! Atomics and locks of what is checked by loom: std's, or loom's under `--cfg loom`.
//!
//! The modules that use this one (`generation`, `lazy`, the slices of `reclaim`) are compiled a second time
//! in the package `ebb-models`, where loom runs them through every interleaving of small programs. Counters
//! that no decision depends on stay with std even there: they would only multiply the interleavings.

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::{Condvar, Mutex, MutexGuard};

use std::sync::{PoisonError, TryLockError};
use std::time::Duration;

/// Locks `mutex`. A thread that panicked while holding it has left bookkeeping of whole steps only.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same unless somebody else holds it.
pub fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Waits on `condvar`, possibly in vain.
pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` until `deadline` at most, possibly in vain.
pub fn wait_until<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Deadline,
) -> MutexGuard<'a, T> {
    let waited = condvar.wait_timeout(guard, deadline.left());
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// A moment until which something may take. Under loom, where there is no time, it never comes.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    #[cfg(not(loom))]
    at: std::time::Instant,
}

impl Deadline {
    /// The moment `time` from now.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        #[cfg(loom)]
        let _ = time;
        Self {
            #[cfg(not(loom))]
            at: std::time::Instant::now() + time,
        }
    }

    /// The time until then; zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        #[cfg(loom)]
        return Duration::MAX;
        #[cfg(not(loom))]
        self.at.saturating_duration_since(std::time::Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Waits for `done`, without sleeping, until `limit` at most; others get the processor. Under loom, where
/// there is no time, it does not wait.
pub fn linger(limit: Deadline, mut done: impl FnMut() -> bool) {
    while !cfg!(loom) && !done() && !limit.passed() {
        std::thread::yield_now();
    }
}

/// A mistake that the models must catch, see `tests/models`. Outside of loom no mistake is ever on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Mutant {
    /// A chunk is looked for and claimed in two critical sections.
    CheckThenAct = 1,
    /// A vCPU publishes its word without release.
    RelaxedSeen,
    /// A reuse does not wait for the chunk that it meets.
    DiscardAfterReuse,
    /// A vCPU looks at the gate without a fence after its word.
    NoFence,
    /// The gate is opened without waking who waits at it.
    SilentOpening,
    /// A gate that was empty is closed without looking whether it still is.
    LookOnce,
    /// Who waits for an offered slice is not told when it was run.
    SilentOffer,
}

/// Whether this mistake is on.
#[cfg(not(loom))]
#[inline]
#[must_use]
pub const fn mutant(_: Mutant) -> bool {
    false
}

/// Whether this mistake is on.
#[cfg(loom)]
#[must_use]
pub fn mutant(mistake: Mutant) -> bool {
    MISTAKE.load(std::sync::atomic::Ordering::SeqCst) == mistake as u32
}

#[cfg(loom)]
static MISTAKE: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Turns a mistake on, or all off, for the whole process.
#[cfg(loom)]
pub fn set_mutant(mistake: Option<Mutant>) {
    let number = mistake.map_or(0, |mistake| mistake as u32);
    MISTAKE.store(number, std::sync::atomic::Ordering::SeqCst);
}
