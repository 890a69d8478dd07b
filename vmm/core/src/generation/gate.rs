//! The entry gate keeps vCPUs out of the guest for a moment, so that invalidations interrupt none of them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use super::VmGeneration;
use super::vcpus::VcpuWords;
use crate::fault::fault_point;
use crate::metrics::Source;
use crate::sync::{
    AtomicU32, Condvar, Deadline, Mutex, MutexGuard, Ordering, fence, lock, spin_until, try_lock,
    wait, wait_until,
};

/// A flag of the state: vCPUs wait before they enter.
const CLOSED: u32 = 1;
/// A flag of the state: a thread waits for some vCPUs to leave.
const WATCHED: u32 = 2;
/// A flag of the state: no vCPU enters any more.
const STOPPED: u32 = 4;

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
        /// Times that the gate was closed.
        closings_total: Counter,
        /// Closings that were given up because a vCPU was not out in time.
        missed_total: Counter,
        /// Entries that had to wait at the gate.
        waits_total: Counter,
        /// Pauses by length: bucket `i` counts those shorter than 2^i microseconds and not shorter than half of that;
        /// the last one also counts everything longer.
        pauses: Histogram of Microseconds,
        /// All pauses together.
        pause_us_total: Counter of Microseconds,
        /// The longest pause.
        longest_pause_us: Peak of Microseconds,
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
/// **Locks**, in this order: `turn` (one closer at a time, held for the pause, system calls included), `sleepers`
/// (guards the two condition variables, held for moments). No other lock is taken under `sleepers`. A thread that
/// holds the gate may take the tracker's lock; a thread that holds the tracker's lock may not close the gate.
pub struct Gate {
    generation: Arc<VmGeneration>,
    words: VcpuWords,
    state: AtomicU32,
    turn: Mutex<()>,
    sleepers: Mutex<()>,
    /// vCPUs wait here for the gate to open.
    opened: Condvar,
    /// Closers wait here for vCPUs to leave.
    left: Condvar,
    kick: Box<dyn Kick>,
    /// vCPU threads that wait at the gate, or are about to. It only limits how long a closer spins, so it is not one
    /// of the models' atomics.
    asleep: AtomicU64,
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
            sleepers: Mutex::new(()),
            opened: Condvar::new(),
            left: Condvar::new(),
            kick,
            asleep: AtomicU64::new(0),
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
        loop {
            // Loaded before the word says "in": so the vCPU never claims a generation that begins later.
            self.words.publish_in(index, self.generation.current());
            if !fault_point!("no fence on entry") {
                fence(Ordering::SeqCst);
            }
            let state = self.state.load(Ordering::Acquire);
            if state & (CLOSED | STOPPED) == 0 {
                return Some(Inside { gate: self, index });
            }
            self.words.publish_out(index);
            if !self.wait_outside() {
                return None;
            }
        }
    }

    /// Waits for the gate to open. Returns false if the machine is stopping.
    #[cold]
    fn wait_outside(&self) -> bool {
        self.counters.waits_total.increment();
        let mut sleepers = lock(&self.sleepers);
        // A closer may have seen this vCPU's word, which said "in" for a moment, and wait for it.
        self.notify_left();
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & STOPPED != 0 {
                return false;
            }
            if state & CLOSED == 0 {
                return true;
            }
            self.asleep.fetch_add(1, Ordering::Relaxed);
            sleepers = wait(&self.opened, sleepers);
            self.asleep.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[inline]
    fn leave(&self, index: usize) {
        self.words.publish_out(index);
        fence(Ordering::SeqCst);
        if self.state.load(Ordering::Relaxed) != 0 {
            self.tell_left();
        }
    }

    #[cold]
    fn tell_left(&self) {
        let _sleepers = lock(&self.sleepers);
        self.notify_left();
    }

    /// Wakes the threads that wait for vCPUs to leave. A closer waits for all of them, and is woken by the last one
    /// only: each wake costs an interrupt. The caller holds `sleepers`, so of two vCPUs that leave at once, the later
    /// sees both out.
    fn notify_left(&self) {
        let watched = self.state.load(Ordering::Acquire) & WATCHED != 0;
        if watched || self.words.quiescent(u64::MAX) {
            self.left.notify_all();
        }
    }

    /// Closes the gate, kicks the vCPUs that are in the guest (and no others), and returns when all are out. The gate
    /// opens when the returned value is dropped.
    ///
    /// `budget` limits the whole pause, from the closing on. If a vCPU is not out by then, the gate opens again and
    /// this returns `None`, as it does when the machine is stopping. The caller must begin nothing more once
    /// [`Hold::expired`] is true: so a vCPU waits for `budget` and one step of the caller's work at most.
    pub fn hold(&self, budget: Duration) -> Option<Hold<'_>> {
        let turn = lock(&self.turn);
        let (start, deadline) = (Instant::now(), Deadline::after(budget));
        if self.state.fetch_or(CLOSED, Ordering::AcqRel) & STOPPED != 0 {
            self.open();
            return None;
        }
        fence(Ordering::SeqCst);
        self.counters.closings_total.increment();
        let kicked = self.kick_behind(u64::MAX);
        let hold = Hold {
            gate: self,
            start,
            deadline,
            kicked,
            _turn: turn,
        };
        // A vCPU leaves within microseconds: too short to sleep and be woken by an interrupt.
        spin_until(Deadline::after(budget / 4), || {
            self.words.quiescent(u64::MAX) || self.is_stopped()
        });
        if self.wait_until_quiescent(u64::MAX, deadline) {
            // For each page that is taken, the kernel interrupts the threads that run, but not those that sleep.
            spin_until(Deadline::after(budget / 8), || {
                self.asleep.load(Ordering::Relaxed) >= kicked
            });
            return Some(hold);
        }
        self.counters.missed_total.increment();
        None
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
    pub fn hold_if_empty(&self, budget: Duration) -> Option<Hold<'_>> {
        if !self.is_empty() {
            return None;
        }
        let turn = try_lock(&self.turn)?;
        let (start, deadline) = (Instant::now(), Deadline::after(budget));
        let stopped = self.state.fetch_or(CLOSED, Ordering::AcqRel) & STOPPED != 0;
        fence(Ordering::SeqCst);
        if stopped || !(fault_point!("no second look at the vCPUs") || self.is_empty()) {
            self.open();
            return None;
        }
        self.counters.closings_total.increment();
        Some(Hold {
            gate: self,
            start,
            deadline,
            kicked: 0,
            _turn: turn,
        })
    }

    /// Kicks the vCPUs that are in the guest and have not seen `generation`, and waits until every vCPU is out or has
    /// seen it: then `generation` is quiescent. The gate stays open, so they may enter again at once. Returns false
    /// if that takes longer than `timeout`, or the machine is stopping.
    pub fn catch_up(&self, generation: u64, timeout: Duration) -> bool {
        let _turn = lock(&self.turn);
        self.state.fetch_or(WATCHED, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.kick_behind(generation);
        let quiescent = self.wait_until_quiescent(generation, Deadline::after(timeout));
        self.state.fetch_and(!WATCHED, Ordering::AcqRel);
        quiescent
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
        let _sleepers = lock(&self.sleepers);
        self.opened.notify_all();
        self.left.notify_all();
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

    /// Waits until `generation` is quiescent. Returns false if it is not so in time, or the machine is stopping. The
    /// caller has set its flag in `state`, and then put a fence.
    fn wait_until_quiescent(&self, generation: u64, deadline: Deadline) -> bool {
        if self.words.quiescent(generation) {
            return true;
        }
        let mut sleepers = lock(&self.sleepers);
        loop {
            if self.words.quiescent(generation) {
                return true;
            }
            if self.is_stopped() || deadline.passed() {
                return false;
            }
            sleepers = wait_until(&self.left, sleepers, deadline);
        }
    }

    fn open(&self) {
        let sleepers = lock(&self.sleepers);
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
        // The threads that are woken take this lock first.
        drop(sleepers);
        if !fault_point!("opening wakes nobody") {
            self.opened.notify_all();
        }
    }
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

/// The gate is closed and every vCPU is out, until this is dropped, also by a panic.
#[must_use = "the gate opens as soon as this is dropped"]
pub struct Hold<'a> {
    gate: &'a Gate,
    start: Instant,
    deadline: Deadline,
    kicked: u64,
    _turn: MutexGuard<'a, ()>,
}

impl Hold<'_> {
    /// Returns true if the budget is used up: the holder must begin nothing more.
    #[must_use]
    pub fn expired(&self) -> bool {
        self.deadline.passed()
    }

    /// What is left of the budget.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.deadline.left()
    }

    /// Number of vCPUs that were kicked for it.
    #[must_use]
    pub const fn kicked(&self) -> u64 {
        self.kicked
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.gate.open();
        let pause = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let counters = &self.gate.counters;
        counters.pauses.record(pause);
        counters.pause_us_total.add(pause);
        counters.longest_pause_us.record(pause);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// vCPUs that leave when they are kicked.
    struct Flags(Arc<[AtomicBool]>);

    impl Kick for Flags {
        fn kick(&self, index: usize) {
            self.0[index].store(true, Ordering::SeqCst);
        }
    }

    fn flags(vcpus: usize) -> Arc<[AtomicBool]> {
        (0..vcpus).map(|_| AtomicBool::new(false)).collect()
    }

    fn gate(vcpus: usize) -> (Arc<[AtomicBool]>, Gate) {
        let flags = flags(vcpus);
        let kick = Box::new(Flags(Arc::clone(&flags)));
        (flags, Gate::new(vcpus, Arc::default(), kick))
    }

    /// A vCPU that spins in the guest until it is kicked, and again, until the machine stops.
    fn spin(gate: &Gate, kicked: &AtomicBool, index: usize, inside: &AtomicBool) {
        loop {
            kicked.store(false, Ordering::SeqCst);
            let Some(guard) = gate.enter(index) else {
                return;
            };
            inside.store(true, Ordering::SeqCst);
            while !kicked.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            inside.store(false, Ordering::SeqCst);
            drop(guard);
        }
    }

    #[test]
    fn a_hold_keeps_everybody_out_and_kicks_those_inside_only() {
        let (kicks, gate) = gate(3);
        let inside = flags(3);
        thread::scope(|scope| {
            for index in 0..2 {
                let (gate, kicks, inside) = (&gate, &kicks[index], &inside[index]);
                scope.spawn(move || spin(gate, kicks, index, inside));
            }
            for _ in 0..200 {
                let hold = gate.hold(LONG).unwrap();
                let any = || inside.iter().any(|inside| inside.load(Ordering::SeqCst));
                assert!(!any() && hold.kicked() <= 2 && !hold.expired());
                thread::yield_now();
                assert!(!any());
            }
            assert!(!kicks[2].load(Ordering::SeqCst), "it was never in");
            gate.stop();
            (0..2).for_each(|index| kicks[index].store(true, Ordering::SeqCst));
        });
        let stats = gate.stats();
        assert_eq!((stats.closings_total, stats.missed_total), (200, 0));
        assert_eq!(stats.pauses.iter().sum::<u64>(), 200);
    }

    #[test]
    fn a_vcpu_that_stays_inside_is_not_waited_for_longer_than_the_budget() {
        let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
        let inside = gate.enter(1).unwrap();
        let start = Instant::now();
        assert!(gate.hold(Duration::from_millis(20)).is_none());
        assert!(start.elapsed() >= Duration::from_millis(20));
        drop(gate.enter(0).expect("the gate is open again"));
        drop(inside);
        let hold = gate.hold(Duration::ZERO).expect("everybody is out already");
        assert!(hold.expired());
        drop(hold);
        let stats = gate.stats();
        assert_eq!(
            (stats.kicks_total, stats.closings_total, stats.missed_total),
            (1, 2, 1)
        );
    }

    #[test]
    fn stopping_ends_every_wait() {
        let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
        let hold = gate.hold(LONG).unwrap();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| gate.enter(0).is_none());
            while gate.stats().waits_total == 0 {
                thread::yield_now();
            }
            gate.stop();
            assert!(vcpu.join().unwrap(), "it must not enter");
        });
        drop(hold);
        assert!(gate.enter(1).is_none());
        assert!(gate.hold(LONG).is_none(), "there is nobody to hold");

        let gate = Gate::new(1, Arc::default(), Box::new(NoKick));
        let inside = gate.enter(0);
        thread::scope(|scope| {
            let closer = scope.spawn(|| gate.hold(LONG).is_none());
            while gate.stats().kicks_total == 0 {
                thread::yield_now();
            }
            gate.stop();
            assert!(closer.join().unwrap(), "a closer does not wait for ever");
        });
        drop(inside);
    }

    #[test]
    fn only_those_behind_are_kicked_to_catch_up() {
        let (kicks, gate) = gate(2);
        let old = gate.enter(0).unwrap();
        let generation = gate.generation.advance();
        let new = gate.enter(1).unwrap();
        assert_eq!(gate.quiescent_generation(), 0);
        assert!(!gate.catch_up(generation, Duration::from_millis(1)));
        assert!(kicks[0].load(Ordering::SeqCst) && !kicks[1].load(Ordering::SeqCst));
        drop(old);
        assert!(gate.catch_up(generation, Duration::ZERO) && gate.quiescent(generation));
        assert_eq!(gate.quiescent_generation(), generation);
        drop(new);
        assert_eq!(gate.stats().kicks_total, 1);
    }

    #[test]
    fn a_panic_of_the_holder_opens_the_gate() {
        let gate = Gate::without_vcpus(Arc::default());
        let panicked = thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _hold = gate.hold(LONG);
                panic!("on purpose");
            });
            holder.join().is_err()
        });
        assert!(panicked && gate.hold(LONG).is_some());
    }
}
