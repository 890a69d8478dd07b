//! The entry gate keeps vCPUs out of the guest for a moment, so that invalidations interrupt none of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::VmGeneration;
use super::vcpus::VcpuWords;
use super::waiters::Waiters;
use crate::fault::fault_point;
use crate::metrics::Source;
use crate::sync::{
    AtomicU32, Condvar, Deadline, Mutex, MutexGuard, Ordering, fence, lock, spin_until, try_lock,
    wait_until,
};

/// A flag of the state: vCPUs wait before they enter.
const CLOSED: u32 = 1;
/// A flag of the state: a thread sleeps until vCPUs have left.
const AWAITED: u32 = 2;
/// A flag of the state: no vCPU enters any more.
const STOPPED: u32 = 4;

/// A closer does not spin for longer, whatever its budget.
const MAX_SPIN: Duration = Duration::from_millis(1);

/// How long a closer waits for vCPUs that are in the guest while none waits at the gate.
const PATIENCE: Duration = Duration::from_millis(20);

/// A closer tries so often to have all vCPUs out at once.
const ATTEMPTS: u32 = 3;

/// How a vCPU is brought out of the guest.
pub trait Kick: Send + Sync {
    /// Makes the vCPU `index` leave the guest soon, or not enter it if it is about to. Never blocks.
    fn kick(&self, index: usize);
}

impl<T: Kick + ?Sized> Kick for Arc<T> {
    fn kick(&self, index: usize) {
        (**self).kick(index);
    }
}

/// Kicks no vCPU: for machines whose vCPUs leave by themselves, or that have none.
#[derive(Debug)]
pub struct NoKick;

impl Kick for NoKick {
    fn kick(&self, _: usize) {}
}

crate::metrics! {
    /// What a gate has cost the vCPUs since the machine started.
    pub struct GateStats from struct Counters {
        /// vCPUs that were interrupted to bring them out of the guest.
        kicks_total: Counter,
        /// Times that the gate was closed, in vain or not.
        closings_total: Counter,
        /// Closings that were in vain because a vCPU was not out in time. Some are tried again at once.
        missed_total: Counter,
        /// Entries that had to wait at the gate.
        waits_total: Counter,
        /// Pauses by length, from when the first vCPU waited at the gate, or all were out, until the gate opened: bucket `i`
        /// counts those shorter than 2^i microseconds and not shorter than half of that; the last one also counts
        /// everything longer.
        pauses: Histogram of Microseconds,
        /// All pauses together.
        pause_us_total: Counter of Microseconds,
        /// The longest pause: no vCPU has waited at the gate for longer.
        longest_pause_us: Peak of Microseconds,
        /// Times from the opening of the gate until all vCPUs that waited at it are back in the guest, in buckets as those
        /// of the pauses. If it closes again before that, the time goes on.
        returns: Histogram of Microseconds,
        /// The longest such time.
        longest_return_us: Peak of Microseconds,
    }
}

/// The gate between the vCPU threads and the guest.
///
/// Each vCPU thread enters through [`Gate::enter`], and is out once it has dropped that guard: it counts as out
/// while it handles an exit, even if it sleeps then. A reclaimer closes the gate with [`Gate::hold`], works, and
/// opens it again.
///
/// **Cost** of an entry while the gate is open: a load of the generation, a store to a cache line of the vCPU's
/// own, a full fence, and a load of the gate's state, which no thread writes then. To leave costs a store, a fence
/// and a load. The fences take about 40 cycles, an exit more than a thousand.
///
/// **Why no lock is needed** (Dekker's algorithm): a vCPU first says that it is in and then looks at the gate; a
/// closer first closes the gate and then looks at the vCPUs. With the fences in between, at least one of them sees
/// the other.
///
/// **Many vCPUs**: those that leave together take a lock only if the closer sleeps, and of those that are woken together
/// few share one. Kicks are sent one after the other: the kernel sends signals to threads of one process under one
/// lock, so several senders would wait for each other.
///
/// **Locks**, in this order: `turn` (one closer at a time, held for the pause, system calls included), `awaited` and
/// those of the waiters (held for moments, and no other lock is taken under them). A thread that holds the gate may
/// take the tracker's lock; a thread that holds the tracker's lock may not close the gate.
pub struct Gate {
    generation: Arc<VmGeneration>,
    words: VcpuWords,
    state: AtomicU32,
    turn: Mutex<()>,
    /// The generation that a thread waits for, asleep, to be quiescent.
    awaited: Mutex<Option<u64>>,
    /// It waits here. There is at most one, as it has the turn.
    left: Condvar,
    /// vCPUs wait here for the gate to open.
    waiters: Waiters,
    kick: Box<dyn Kick>,
    patience: Duration,
    counters: Counters,
}

impl Gate {
    /// An open gate for `vcpus` vCPUs.
    #[must_use]
    pub fn new(vcpus: usize, generation: Arc<VmGeneration>, kick: Box<dyn Kick>) -> Self {
        Self {
            generation,
            words: VcpuWords::new(vcpus),
            state: AtomicU32::new(0),
            turn: Mutex::new(()),
            awaited: Mutex::new(None),
            left: Condvar::new(),
            waiters: Waiters::new(vcpus),
            kick,
            patience: PATIENCE,
            counters: Counters::default(),
        }
    }

    /// The gate of a machine without vCPUs: closing it waits for nobody.
    #[must_use]
    pub fn without_vcpus(generation: Arc<VmGeneration>) -> Self {
        Self::new(0, generation, Box::new(NoKick))
    }

    /// Waits until the gate is open, and marks the vCPU `index` as in the guest until the guard is dropped, which
    /// must be as soon as `KVM_RUN` returns. `None`: the machine is stopping.
    ///
    /// The vCPU's own thread calls this after it has cleared old kicks and before it enters.
    #[inline]
    pub fn enter(&self, index: usize) -> Option<Inside<'_>> {
        (self.try_enter(index) || self.enter_later(index)).then_some(Inside { gate: self, index })
    }

    #[inline]
    fn try_enter(&self, index: usize) -> bool {
        // Loaded before the word says "in": so the vCPU never claims a generation that begins later.
        self.words.publish_in(index, self.generation.current());
        if !fault_point!("no fence on entry") {
            fence(Ordering::SeqCst);
        }
        let open = self.state.load(Ordering::Acquire) & (CLOSED | STOPPED) == 0;
        if !open {
            // A closer may have seen the word, which said "in" for a moment, and wait for it.
            self.leave(index);
        }
        open
    }

    /// Enters when the gate opens. Returns false if the machine is stopping.
    #[cold]
    fn enter_later(&self, index: usize) -> bool {
        loop {
            self.counters.waits_total.increment();
            let stopped = self.waiters.wait(index, || {
                let state = self.state.load(Ordering::Acquire);
                (state & (CLOSED | STOPPED) != CLOSED).then_some(state & STOPPED != 0)
            });
            if stopped {
                return false;
            }
            if self.try_enter(index) {
                self.count_return(self.waiters.entered(index));
                return true;
            }
        }
    }

    #[inline]
    fn leave(&self, index: usize) {
        self.words.publish_out(index);
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) & AWAITED != 0 {
            self.tell_left();
        }
    }

    /// Wakes the thread that waits for vCPUs to leave, if this was the last of them: each wake costs an interrupt. Of
    /// two that leave at once, the one that comes later to the lock sees both out.
    #[cold]
    fn tell_left(&self) {
        let awaited = lock(&self.awaited);
        let last = awaited.is_some_and(|generation| self.words.quiescent(generation));
        if last && !fault_point!("the last to leave wakes nobody") {
            self.left.notify_one();
        }
    }

    /// Closes the gate, kicks the vCPUs that are in the guest (and no others), and returns when all are out. The gate
    /// opens when the returned value is dropped.
    ///
    /// A vCPU that is still in the guest loses nothing, one that waits at the gate does. So the time that the vCPUs have to
    /// come out, `pause`, begins when the first of them waits, but not before the last kick; if none waits, the caller loses
    /// patience at some time. Once all are out the caller has `pause` for its work, and must begin nothing more when
    /// [`Hold::expired`] is true. So a vCPU waits for the kicks, twice `pause`, and one step of the caller's work at most.
    ///
    /// A vCPU comes out late if its thread has to wait for a processor. When it has one the next attempt is likely to do
    /// better, so there are up to three; between them the gate is open.
    ///
    /// # Errors
    /// [`Missed`] if a vCPU was not out in time, or the machine is stopping. The gate is open again.
    pub fn hold(&self, pause: Duration) -> Result<Hold<'_>, Missed> {
        let mut missed = Duration::ZERO;
        for attempt in 1..=ATTEMPTS {
            match self.try_hold(pause) {
                Ok(mut hold) => {
                    hold.missed = missed;
                    return Ok(hold);
                }
                Err(waited) => missed += waited.max(pause),
            }
            let again = attempt < ATTEMPTS && self.waiters.since().is_some();
            if !again || !self.catch_up(self.generation.advance(), self.patience) {
                break;
            }
        }
        Err(Missed { cost: missed })
    }

    /// One attempt. The error is how long the first vCPU has waited at the gate.
    fn try_hold(&self, pause: Duration) -> Result<Hold<'_>, Duration> {
        let closed = self.close(lock(&self.turn)).ok_or(Duration::ZERO)?;
        let mut hold = closed.hold(pause);
        hold.kicked = self.kick_behind(u64::MAX);
        let kicked = Instant::now();
        // A vCPU leaves within microseconds: too short to sleep and be woken by an interrupt.
        self.spin(pause / 4, || self.words.quiescent(u64::MAX));
        let limit = || match self.waiters.since() {
            Some(first) => Deadline::from(first.max(kicked), pause),
            None => Deadline::from(kicked, self.patience.max(pause)),
        };
        if !self.wait_until_quiescent(u64::MAX, pause, limit) {
            self.counters.missed_total.increment();
            return Err(hold.pause());
        }
        hold.all_out = Some(Instant::now());
        // For each page that is taken, the kernel interrupts the threads that run, but not those that sleep.
        self.spin(pause / 8, || self.waiters.asleep() >= hold.kicked);
        hold.deadline = Deadline::after(pause);
        Ok(hold)
    }

    /// Spins until `done` is true, or the machine stops; not for longer than `limit`.
    fn spin(&self, limit: Duration, done: impl Fn() -> bool) {
        let limit = Deadline::after(limit.min(MAX_SPIN));
        spin_until(limit, || done() || self.is_stopped());
    }

    /// Returns true if every vCPU is out at this moment.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.quiescent(u64::MAX)
    }

    /// Closes the gate if every vCPU is out and no other thread is closing it, without waiting. For a vCPU thread
    /// that is about to enter, and so is out itself.
    ///
    /// The first look at the vCPUs avoids closing the gate in vain; the second, after the fence, is the one that
    /// counts.
    pub fn hold_if_empty(&self, pause: Duration) -> Option<Hold<'_>> {
        if !self.is_empty() {
            return None;
        }
        let closed = self.close(try_lock(&self.turn)?)?;
        let empty = fault_point!("no second look at the vCPUs") || self.is_empty();
        empty.then(|| {
            let mut hold = closed.hold(pause);
            hold.all_out = Some(Instant::now());
            hold
        })
    }

    /// Closes the gate. `None`: the machine is stopping.
    fn close<'a>(&'a self, turn: MutexGuard<'a, ()>) -> Option<Closed<'a>> {
        let closed = Closed {
            gate: self,
            _turn: turn,
        };
        self.waiters.begin();
        let state = self.state.fetch_or(CLOSED, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        (state & STOPPED == 0).then_some(closed)
    }

    /// Kicks the vCPUs that are in the guest and have not seen `generation`, and waits until every vCPU is out or has
    /// seen it: then `generation` is quiescent. The gate stays open, so they may enter again at once. Returns false
    /// if that takes longer than `timeout`, or the machine is stopping.
    pub fn catch_up(&self, generation: u64, timeout: Duration) -> bool {
        let _turn = lock(&self.turn);
        fence(Ordering::SeqCst);
        self.kick_behind(generation);
        let deadline = Deadline::after(timeout);
        self.wait_until_quiescent(generation, timeout, || deadline)
    }

    /// The latest quiescent generation: no vCPU has a translation of what was invalidated before it began.
    #[must_use]
    pub fn quiescent_generation(&self) -> u64 {
        let current = self.generation.current();
        // Pairs with the fence of an entry: a vCPU that is seen out here will see what was invalidated.
        fence(Ordering::SeqCst);
        self.words.quiescent_generation(current)
    }

    /// Returns true if `generation` is quiescent: every vCPU is out of the guest or has seen it.
    #[must_use]
    pub fn quiescent(&self, generation: u64) -> bool {
        fence(Ordering::SeqCst);
        self.words.quiescent(generation)
    }

    /// Lets no vCPU in any more: vCPUs that wait at the gate return, and closers give up. The caller must bring out
    /// the vCPUs that are in the guest.
    pub fn stop(&self) {
        self.state.fetch_or(STOPPED, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        drop(lock(&self.awaited));
        self.left.notify_one();
        self.waiters.wake_all();
    }

    /// Number of entries that had to wait so far.
    #[must_use]
    pub fn waits(&self) -> u64 {
        self.counters.waits_total.get()
    }

    /// The counters. Each is exact; they are not read at the same moment.
    #[must_use]
    pub fn stats(&self) -> GateStats {
        self.counters.snapshot()
    }

    fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Acquire) & STOPPED != 0
    }

    fn kick_behind(&self, generation: u64) -> u64 {
        let mut kicked = 0;
        for index in self.words.behind(generation) {
            self.kick.kick(index);
            kicked += 1;
        }
        self.counters.kicks_total.add(kicked);
        kicked
    }

    /// Waits until `generation` is quiescent. Returns false if it is not so by `limit`, or the machine is stopping. `limit`
    /// may come nearer, and is looked at each `nap`. The caller has the turn, and has put a fence after what it did before.
    fn wait_until_quiescent(
        &self,
        generation: u64,
        nap: Duration,
        limit: impl Fn() -> Deadline,
    ) -> bool {
        if self.words.quiescent(generation) {
            return true;
        }
        let mut awaited = lock(&self.awaited);
        *awaited = Some(generation);
        self.state.fetch_or(AWAITED, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        let quiescent = loop {
            if self.words.quiescent(generation) {
                break true;
            }
            let limit = limit();
            if self.is_stopped() || limit.passed() {
                break false;
            }
            let nap = Deadline::after(nap.min(limit.left()));
            awaited = wait_until(&self.left, awaited, nap);
        };
        self.state.fetch_and(!AWAITED, Ordering::AcqRel);
        *awaited = None;
        quiescent
    }

    fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
        if !fault_point!("opening wakes nobody") {
            self.count_return(self.waiters.wake_all());
        }
    }

    fn count_return(&self, time: Option<Duration>) {
        if let Some(time) = time {
            let micros = micros(time);
            self.counters.returns.record(micros);
            self.counters.longest_return_us.record(micros);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A vCPU is in the guest, or about to be, until this is dropped.
#[must_use = "the vCPU is out as soon as this is dropped"]
pub struct Inside<'a> {
    gate: &'a Gate,
    index: usize,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.index);
    }
}

/// The gate is closed until this is dropped, also by a panic.
struct Closed<'a> {
    gate: &'a Gate,
    _turn: MutexGuard<'a, ()>,
}

impl<'a> Closed<'a> {
    /// Counts this as a closing, with `pause` for the work.
    fn hold(self, pause: Duration) -> Hold<'a> {
        self.gate.counters.closings_total.increment();
        Hold {
            deadline: Deadline::after(pause),
            kicked: 0,
            all_out: None,
            missed: Duration::ZERO,
            closed: self,
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.open();
    }
}

/// A vCPU was not out in time, or the machine is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// What it has cost the vCPUs: how long the first of them has waited at the gate, and at least a pause for each attempt,
    /// because they were kicked for nothing.
    pub cost: Duration,
}

/// The gate is closed and every vCPU is out, until this is dropped.
#[must_use = "the gate opens as soon as this is dropped"]
pub struct Hold<'a> {
    deadline: Deadline,
    kicked: u64,
    all_out: Option<Instant>,
    /// What attempts before this one have cost the vCPUs.
    missed: Duration,
    closed: Closed<'a>,
}

impl Hold<'_> {
    /// Returns true if the time is used up or the machine is stopping: the holder must begin nothing more.
    #[must_use]
    pub fn expired(&self) -> bool {
        self.deadline.passed() || self.closed.gate.is_stopped()
    }

    /// What is left of the time.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.deadline.left()
    }

    /// Number of vCPUs that were kicked for it.
    #[must_use]
    pub const fn kicked(&self) -> u64 {
        self.kicked
    }

    /// Opens the gate. Returns what it has cost the vCPUs: the pause, and the attempts that were missed before.
    pub fn open(self) -> Duration {
        self.missed + self.pause()
    }

    /// Time since the first vCPU waited, or since all were out.
    fn pause(&self) -> Duration {
        let first = self.closed.gate.waiters.since();
        let since = first.into_iter().chain(self.all_out).min();
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let pause = micros(self.pause());
        let counters = &self.closed.gate.counters;
        counters.pauses.record(pause);
        counters.pause_us_total.add(pause);
        counters.longest_pause_us.record(pause);
    }
}

#[cfg(test)]
mod tests;
