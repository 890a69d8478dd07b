//! Where vCPU threads wait for the gate to open: in small groups, so that few of those that are woken together meet in
//! one lock. A lock for each vCPU would cost a system call for each.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, Ordering, lock, wait};

/// vCPUs in a group.
const GROUP: usize = 8;

/// Where a group's vCPUs sleep, on cache lines of its own.
#[repr(align(128))]
struct Group {
    /// A bit for each vCPU that sleeps.
    sleepers: Mutex<u32>,
    opened: Condvar,
    /// Those that were woken and are not back in the guest yet.
    returning: [AtomicBool; GROUP],
}

/// The groups of all vCPUs. What is counted here decides nothing of order, so it is in none of the models' atomics.
pub(super) struct Waiters {
    groups: Box<[Group]>,
    /// Threads that sleep, or are about to.
    asleep: AtomicU64,
    /// When the first of them came, in nanoseconds from `epoch` on; 0: none has since [`Waiters::begin`].
    first: AtomicU64,
    /// vCPUs that were woken and are not back in the guest yet, and one more while a thread wakes them.
    returning: AtomicU64,
    /// When the first of them was woken, in nanoseconds from `epoch` on.
    since: AtomicU64,
    epoch: Instant,
}

impl Waiters {
    pub fn new(vcpus: usize) -> Self {
        let group = |_| Group {
            sleepers: Mutex::new(0),
            opened: Condvar::new(),
            returning: [const { AtomicBool::new(false) }; GROUP],
        };
        Self {
            groups: (0..vcpus.div_ceil(GROUP)).map(group).collect(),
            asleep: AtomicU64::new(0),
            first: AtomicU64::new(0),
            returning: AtomicU64::new(0),
            since: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    /// Those who come from now on wait for something new. Must be called before that can be seen: one that was here before
    /// is awake and will look again.
    pub fn begin(&self) {
        self.first.store(0, Ordering::Release);
    }

    /// When the first of those that wait for it came.
    pub fn since(&self) -> Option<Instant> {
        let first = self.first.load(Ordering::Acquire);
        (first > 0).then(|| self.epoch + Duration::from_nanos(first))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The vCPU `index` waits until `decide` returns something. After a change of that, [`Waiters::wake_all`] must be
    /// called.
    pub fn wait<T>(&self, index: usize, decide: impl Fn() -> Option<T>) -> T {
        let (group, bit) = (&self.groups[index / GROUP], 1 << (index % GROUP));
        let mut sleepers = lock(&group.sleepers);
        loop {
            if let Some(decision) = decide() {
                return decision;
            }
            *sleepers |= bit;
            if self.first.load(Ordering::Acquire) == 0 {
                let came = self.now().max(1);
                let _ = self
                    .first
                    .compare_exchange(0, came, Ordering::AcqRel, Ordering::Acquire);
            }
            self.asleep.fetch_add(1, Ordering::Relaxed);
            sleepers = wait(&group.opened, sleepers);
            self.asleep.fetch_sub(1, Ordering::Relaxed);
            *sleepers &= !bit;
        }
    }

    /// Wakes those that wait, to decide again. Returns what [`Waiters::entered`] does, if the last one is back already.
    pub fn wake_all(&self) -> Option<Duration> {
        let mut some = self.returning.fetch_add(1, Ordering::AcqRel) > 0;
        if !some {
            self.since.store(self.now(), Ordering::Relaxed);
        }
        for group in &self.groups {
            // A thread has looked before this, and sleeps, or will see the change.
            let sleepers = *lock(&group.sleepers);
            for (bit, returning) in group.returning.iter().enumerate() {
                if sleepers & 1 << bit != 0 && !returning.swap(true, Ordering::AcqRel) {
                    self.returning.fetch_add(1, Ordering::AcqRel);
                }
            }
            if sleepers != 0 {
                some = true;
                group.opened.notify_all();
            }
        }
        self.came_back().filter(|_| some)
    }

    /// The vCPU `index` is in the guest. If it is the last of those that were woken, returns the time since the first
    /// was.
    pub fn entered(&self, index: usize) -> Option<Duration> {
        let group = &self.groups[index / GROUP];
        let returned = group.returning[index % GROUP].swap(false, Ordering::AcqRel);
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
        let waiters = Waiters::new(10);
        let open = AtomicBool::new(false);
        let moment = || thread::sleep(Duration::from_millis(5));
        moment();
        assert_eq!(waiters.wake_all(), None, "nobody waits");
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let opened = || open.load(Ordering::SeqCst).then_some(7);
                assert_eq!(waiters.wait(9, opened), 7);
                waiters.entered(9)
            });
            while waiters.asleep() == 0 {
                thread::yield_now();
            }
            let woken = Instant::now();
            assert_eq!(waiters.wake_all(), None);
            let least = Instant::now();
            moment();
            for _ in 0..2 {
                assert_eq!(waiters.wake_all(), None, "it is not back");
            }
            let least = least.elapsed();
            open.store(true, Ordering::SeqCst);
            let times = [waiters.wake_all(), vcpu.join().unwrap()];
            let times: Vec<_> = times.into_iter().flatten().collect();
            assert_eq!(times.len(), 1, "who ends it");
            assert!(least <= times[0] && times[0] <= woken.elapsed());
        });
        assert_eq!(
            (waiters.asleep(), *lock(&waiters.groups[1].sleepers)),
            (0, 0)
        );
        assert_eq!((waiters.entered(9), waiters.wake_all()), (None, None));
    }
}
