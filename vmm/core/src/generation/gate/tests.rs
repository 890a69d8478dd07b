use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::{self, Thread};

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
    let kick = Arc::new(Flags(Arc::clone(&flags)));
    (flags, Gate::new(vcpus, Arc::default(), Box::new(kick)))
}

/// Stops the machine and kicks every vCPU when a test is over, also by a panic: else its threads would never end.
struct End<'a>(&'a Gate, usize);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.stop();
        (0..self.1).for_each(|index| self.0.kick.kick(index));
    }
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
        let _end = End(&gate, 2);
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
    });
    let stats = gate.stats();
    assert_eq!((stats.closings_total, stats.missed_total), (200, 0));
    assert_eq!(stats.pauses.iter().sum::<u64>(), 200);
}

/// A kick that takes as long as kicks to hundreds of vCPUs, and then brings the vCPU out, or does not.
struct Slow(Option<Flags>);

const KICK_TIME: Duration = Duration::from_millis(20);

impl Kick for Slow {
    fn kick(&self, index: usize) {
        thread::sleep(KICK_TIME);
        if let Some(flags) = &self.0 {
            flags.kick(index);
        }
    }
}

#[test]
fn the_time_to_come_out_begins_with_the_last_kick_and_that_for_work_when_all_are_out() {
    let gate = Gate::new(1, Arc::default(), Box::new(Slow(None)));
    let inside = gate.enter(0).unwrap();
    let start = Instant::now();
    assert!(gate.hold(KICK_TIME).is_err());
    assert!(start.elapsed() >= 2 * KICK_TIME);
    assert_eq!(gate.stats().longest_pause_us, 0, "nobody has waited");
    drop(inside);

    let kicks = flags(1);
    let kick = Box::new(Slow(Some(Flags(Arc::clone(&kicks)))));
    let gate = Gate::new(1, Arc::default(), kick);
    let inside = flags(1);
    thread::scope(|scope| {
        let _end = End(&gate, 1);
        scope.spawn(|| spin(&gate, &kicks[0], 0, &inside[0]));
        while !inside[0].load(Ordering::SeqCst) {
            thread::yield_now();
        }
        let start = Instant::now();
        let hold = gate.hold(LONG).unwrap();
        let end = hold.left() + start.elapsed();
        assert!(end >= LONG + KICK_TIME, "{end:?}");
    });
}

#[test]
fn a_vcpu_may_come_out_late_if_none_waits_for_it() {
    let mut gate = Gate::new(1, Arc::default(), Box::new(NoKick));
    gate.patience = LONG;
    let inside = gate.enter(0).unwrap();
    thread::scope(|scope| {
        let closer = scope.spawn(|| gate.hold(KICK_TIME / 20).is_ok());
        while gate.state.load(Ordering::Acquire) & AWAITED == 0 {
            thread::yield_now();
        }
        thread::sleep(KICK_TIME);
        drop(inside);
        assert!(closer.join().unwrap());
    });
    assert_eq!(gate.stats().missed_total, 0);
}

#[test]
fn those_that_wait_do_not_wait_for_the_late_longer_than_a_pause() {
    let mut gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    gate.patience = 200 * LONG;
    let late = gate.enter(1).unwrap();
    thread::scope(|scope| {
        let closer = scope.spawn(|| gate.hold(KICK_TIME).map(Hold::open));
        while gate.state.load(Ordering::Acquire) & CLOSED == 0 {
            thread::yield_now();
        }
        drop(gate.enter(0).unwrap());
        let (stats, least) = (gate.stats(), KICK_TIME.as_micros() as u64);
        assert!(stats.longest_pause_us >= least && stats.waits_total == 1);
        assert_eq!(stats.missed_total, 1);
        drop(late);
        let cost = closer.join().unwrap().expect("the next attempt meets all");
        assert!(cost >= KICK_TIME, "{cost:?}: the first one counts");
    });
    let stats = gate.stats();
    assert_eq!((stats.closings_total, stats.missed_total), (2, 1));
    let hold = gate.hold(LONG).unwrap();
    let forgotten = hold.missed.is_zero() && gate.waiters.since().is_none();
    assert!(
        forgotten,
        "who waited for one closing does not count for the next"
    );
    drop(hold);
}

/// A vCPU whose guest sleeps until it is kicked.
#[derive(Default)]
struct Sleepy {
    thread: OnceLock<Thread>,
    kicked: AtomicBool,
    kicks: AtomicU64,
    inside: AtomicBool,
}

impl Sleepy {
    fn run(&self, gate: &Gate, index: usize) {
        self.thread.get_or_init(thread::current);
        loop {
            self.kicked.store(false, Ordering::SeqCst);
            let Some(guard) = gate.enter(index) else {
                return;
            };
            self.inside.store(true, Ordering::SeqCst);
            while !self.kicked.load(Ordering::SeqCst) {
                thread::park();
            }
            self.inside.store(false, Ordering::SeqCst);
            drop(guard);
        }
    }

    fn kick(&self) {
        self.kicks.fetch_add(1, Ordering::SeqCst);
        self.kicked.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

struct Crowd(Arc<[Sleepy]>);

impl Kick for Crowd {
    fn kick(&self, index: usize) {
        self.0[index].kick();
    }
}

/// Closes the gate again and again before `vcpus` vCPUs, of which every third never enters.
fn crowd(vcpus: usize) {
    const CLOSINGS: u64 = if cfg!(miri) { 2 } else { 10 };
    let vcpus = if cfg!(miri) { vcpus / 16 } else { vcpus };
    let all: Arc<[Sleepy]> = (0..vcpus).map(|_| Sleepy::default()).collect();
    let gate = Gate::new(vcpus, Arc::default(), Box::new(Crowd(Arc::clone(&all))));
    let running: Vec<usize> = (0..vcpus).filter(|index| index % 3 != 0).collect();
    let count = running.len() as u64;
    let until = |done: &dyn Fn() -> bool| {
        while !done() {
            thread::yield_now();
        }
    };
    let all_in = || gate.words.behind(u64::MAX).count() == running.len();
    let returns = || gate.stats().returns.iter().sum::<u64>();
    thread::scope(|scope| {
        let _end = End(&gate, vcpus);
        for &index in &running {
            let (gate, vcpu) = (&gate, &all[index]);
            scope.spawn(move || vcpu.run(gate, index));
        }
        until(&all_in);
        for closing in 1..=CLOSINGS {
            let hold = gate.hold(LONG).expect("all come out");
            assert_eq!(hold.kicked(), count, "those in the guest, once each");
            let inside = |vcpu: &Sleepy| vcpu.inside.load(Ordering::SeqCst);
            assert!(!all.iter().any(inside));
            until(&|| gate.waiters.asleep() == count);
            assert_eq!(returns(), closing - 1);
            drop(hold);
            until(&|| returns() == closing);
            // The counter orders nothing, so this may be seen a moment later.
            until(&all_in);
        }
    });
    let stats = gate.stats();
    assert_eq!((stats.closings_total, stats.missed_total), (CLOSINGS, 0));
    assert_eq!(stats.kicks_total, CLOSINGS * count);
    let waits = (CLOSINGS + 1) * count;
    assert_eq!(stats.waits_total, waits, "the last is the stop's");
    for (index, vcpu) in all.iter().enumerate() {
        let kicks = if index % 3 == 0 { 1 } else { CLOSINGS + 1 };
        assert_eq!(vcpu.kicks.load(Ordering::SeqCst), kicks, "the last is ours");
    }
}

#[test]
fn a_crowd_of_64_comes_out_together_and_goes_in_together() {
    crowd(64);
}

#[test]
fn a_crowd_of_255_comes_out_together_and_goes_in_together() {
    crowd(255);
}

#[test]
fn a_passing_thread_closes_the_gate_only_if_all_are_out_and_it_is_open() {
    let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    assert!(gate.is_empty());
    let inside = gate.enter(1).unwrap();
    assert!(!gate.is_empty() && gate.hold_if_empty(LONG).is_none());
    assert!(gate.quiescent(0) && !gate.quiescent(1));
    drop(inside);
    let hold = gate.hold_if_empty(LONG).unwrap();
    assert!(!hold.expired() && gate.hold_if_empty(LONG).is_none());
    drop(hold);
    assert!(gate.enter(0).is_some() && gate.waits() == 0);
    assert_eq!(gate.stats().closings_total, 1);
}

#[test]
fn the_last_to_leave_wakes_a_closer_that_sleeps() {
    let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    let inside = [0, 1].map(|index| gate.enter(index).unwrap());
    thread::scope(|scope| {
        // It would wake by itself, but not before anybody has noticed.
        let closer = scope.spawn(|| gate.hold(200 * LONG).is_ok());
        while gate.state.load(Ordering::Acquire) & AWAITED == 0 {
            thread::yield_now();
        }
        inside.into_iter().for_each(drop);
        assert!(closer.join().unwrap());
    });
    assert_eq!(gate.state.load(Ordering::Acquire), 0);
}

#[test]
fn those_that_enter_and_leave_take_no_lock_that_a_closer_could_hold() {
    let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    let (turn, awaited) = (lock(&gate.turn), lock(&gate.awaited));
    drop(gate.enter(0).unwrap());
    gate.state.store(CLOSED, Ordering::Release);
    gate.leave(1);
    drop((turn, awaited));
}

#[test]
fn an_opening_that_nobody_waited_for_is_no_return() {
    let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    drop(gate.hold(LONG).unwrap());
    drop(gate.enter(0).unwrap());
    assert_eq!(gate.stats().returns.iter().sum::<u64>(), 0);
    let hold = gate.hold(LONG).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| drop(gate.enter(0).unwrap()));
        while gate.waiters.asleep() == 0 {
            thread::yield_now();
        }
        drop(hold);
        vcpu.join().unwrap();
    });
    let stats = gate.stats();
    assert_eq!(
        (stats.returns.iter().sum::<u64>(), stats.waits_total),
        (1, 1)
    );
}

#[test]
fn a_vcpu_that_stays_inside_is_not_waited_for_longer_than_the_budget() {
    let gate = Gate::new(2, Arc::default(), Box::new(NoKick));
    let inside = gate.enter(1).unwrap();
    let start = Instant::now();
    assert!(gate.hold(Duration::from_millis(20)).is_err());
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
    assert!(hold.expired(), "the holder must see it");
    drop(hold);
    assert!(gate.enter(1).is_none() && gate.hold_if_empty(LONG).is_none());
    assert!(gate.hold(LONG).is_err(), "there is nobody to hold");

    let gate = Gate::new(1, Arc::default(), Box::new(NoKick));
    let inside = gate.enter(0);
    thread::scope(|scope| {
        let closer = scope.spawn(|| gate.hold(LONG).is_err());
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
    assert!(panicked && gate.hold(LONG).is_ok());
}
