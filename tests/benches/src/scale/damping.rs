//! Many monitors on one host answer one need: how much they take, divided by what is needed.
//!
//! A simulation in virtual time around the monitor's own policy. Nothing in it depends on the machine that runs it.

use std::time::Duration;

use ebb_vmm::reclaim::{Limit, Mode, Others, PolicyState, Room, Sample, decide};

use super::super::BenchError;
use super::super::results::Results;
use super::Arguments;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory of the host: its low watermark is 12.8 GiB.
const HOST: u64 = 256 * GIB;

/// What is available at first, if nobody needs anything: calm.
const FREE: u64 = 30 * GIB;

/// Lazily freed memory of all monitors together.
const LAZY: u64 = 64 * GIB;

/// Bytes that a monitor returns at a time, and the time that this takes: 8 GiB/s.
const CHUNK: u64 = 32 * MIB;
const CHUNK_TIME: Duration = Duration::from_micros(3906);

/// The memory that others on the host need: seconds, and MiB in use from then on; in between it grows or falls evenly.
const TRACE: [(u64, u64); 13] = [
    (0, 0),
    (5, 0),
    (6, 28 << 10),
    (15, 28 << 10),
    (25, 34 << 10),
    (30, 34 << 10),
    (31, 26 << 10),
    (40, 26 << 10),
    (41, 38 << 10),
    (50, 38 << 10),
    (60, (38 << 10) + 200),
    (80, (38 << 10) + 200),
    (81, 20 << 10),
];

/// From this second on a neighbour thrashes within its own limit, as the host's PSI tells; there is memory enough.
const NEIGHBOUR: u64 = 82;

const END: u64 = 95;

/// The step of the virtual clock.
const TICK: Duration = Duration::from_millis(1);

/// How monitors hear of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hearing {
    /// By what they tell.
    Told,
    /// Not at all: each answers as if it were alone.
    Nothing,
}

/// What came of a run.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    taken: u64,
    needed: u64,
    /// What was taken up to any moment, divided by what was needed up to then, at its worst.
    ratio: f64,
    /// The longest time for which more than a tenth of the watermark was missing.
    late: Duration,
}

#[derive(Clone, Debug)]
struct Monitor {
    wake: Duration,
    state: PolicyState,
    lazy: u64,
    given: u64,
    /// What it has told the others: its lazily freed memory, and what it has given.
    told: (u64, u64),
    /// What is left of its order, and the pause after it.
    left: u64,
    pause: Duration,
    /// It tells what it has, and gives nothing.
    deaf: bool,
}

struct Host {
    monitors: Vec<Monitor>,
    hearing: Hearing,
    random: u64,
    taken: u64,
    /// When PSI reports a stall of the host next.
    psi: Duration,
}

/// Memory that others need at `now`.
fn load(now: Duration) -> u64 {
    let micros = |seconds| Duration::from_secs(seconds).as_micros() as u64;
    let now = now.as_micros() as u64;
    let passed = TRACE
        .iter()
        .rposition(|(at, _)| micros(*at) <= now)
        .unwrap_or(0);
    let (from, before) = TRACE[passed];
    let Some((to, after)) = TRACE.get(passed + 1) else {
        return before * MIB;
    };
    let part =
        i128::from(now - micros(from)) * i128::from(MIB) / i128::from(micros(*to) - micros(from));
    let grown = (i128::from(*after) - i128::from(before)) * part;
    (i128::from(before * MIB) + grown) as u64
}

impl Host {
    fn new(count: usize, hearing: Hearing, seed: u64) -> Self {
        let mut host = Self {
            monitors: Vec::new(),
            hearing,
            random: seed,
            taken: 0,
            psi: Duration::ZERO,
        };
        let weights: Vec<u64> = (0..count).map(|_| 1 + host.random(15)).collect();
        let sum: u64 = weights.iter().sum();
        for weight in weights {
            let lazy = LAZY / sum * weight;
            let wake = Duration::from_millis(host.random(1000));
            host.monitors.push(Monitor {
                wake,
                state: PolicyState::default(),
                lazy,
                given: 0,
                told: (lazy, 0),
                left: 0,
                pause: Duration::ZERO,
                deaf: false,
            });
        }
        host
    }

    /// A number below `bound`: xorshift64.
    fn random(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % bound
    }

    fn room(&self, now: Duration) -> Room {
        Room {
            total: HOST,
            available: (FREE + self.taken).saturating_sub(load(now)),
        }
    }

    fn run(&mut self) -> Outcome {
        let (end, neighbour) = (Duration::from_secs(END), Duration::from_secs(NEIGHBOUR));
        let mut outcome = Outcome {
            taken: 0,
            needed: 0,
            ratio: 0.0,
            late: Duration::ZERO,
        };
        let (mut now, mut well) = (Duration::ZERO, Duration::ZERO);
        while now < end {
            let room = self.room(now);
            let alone = (room.low() + load(now)).saturating_sub(FREE);
            outcome.needed = outcome.needed.max(alone);
            // Before that a block more or less would count for much.
            if outcome.needed >= GIB {
                let ratio = self.taken as f64 / outcome.needed as f64;
                outcome.ratio = outcome.ratio.max(ratio);
            }
            if room.available >= room.low() / 10 * 9 {
                well = now;
            }
            outcome.late = outcome.late.max(now - well);
            let stalled = room.available < room.low() / 2 || now >= neighbour;
            if stalled && now >= self.psi {
                self.psi = now + Duration::from_millis(500);
                for index in 0..self.monitors.len() {
                    if self.monitors[index].left == 0 {
                        self.sample(index, now);
                    }
                }
            }
            for index in 0..self.monitors.len() {
                while self.monitors[index].wake <= now {
                    self.wake(index, now);
                }
            }
            now += TICK;
        }
        outcome.taken = self.taken;
        outcome
    }

    fn wake(&mut self, index: usize, now: Duration) {
        let monitor = &mut self.monitors[index];
        let chunk = CHUNK.min(monitor.left);
        if chunk > 0 {
            monitor.left -= chunk;
            monitor.wake += CHUNK_TIME;
            if !monitor.deaf {
                monitor.lazy -= chunk;
                monitor.given += chunk;
                self.taken += chunk;
            }
            if self.monitors[index].left == 0 {
                self.rest(index);
            }
        } else {
            self.sample(index, now);
        }
    }

    /// Lets a monitor wait for its pause: three to five quarters of it.
    fn rest(&mut self, index: usize) {
        let part = 3072 + u32::try_from(self.random(2048)).unwrap_or(0);
        let monitor = &mut self.monitors[index];
        monitor.wake += monitor.pause * part / 4096 + Duration::from_micros(100);
    }

    fn sample(&mut self, index: usize, now: Duration) {
        let room = self.room(now);
        let mut others = Others::default();
        for (other, monitor) in self.monitors.iter().enumerate() {
            if self.hearing == Hearing::Told && other != index {
                let side = if other < index {
                    &mut others.before
                } else {
                    &mut others.after
                };
                *side += monitor.told.0;
                others.given += monitor.told.1;
            }
        }
        let monitor = &mut self.monitors[index];
        monitor.told = (monitor.lazy, monitor.given);
        let sample = Sample {
            at: now,
            host: Limit { room, others },
            lazy: monitor.lazy,
            given: monitor.given,
            ..Sample::default()
        };
        let (decision, state) = decide(Mode::Pressure, sample, monitor.state);
        monitor.state = state;
        (monitor.left, monitor.pause, monitor.wake) = (decision.bytes, decision.pause, now);
        if decision.bytes == 0 {
            self.rest(index);
        } else {
            monitor.wake += CHUNK_TIME;
        }
    }
}

/// Adds what 1, 10 and 50 monitors take.
pub(super) fn measure(arguments: &Arguments, results: &mut Results) -> Result<(), BenchError> {
    for (count, name) in [(1, "damping_1"), (10, "damping_10"), (50, "damping_50")] {
        let case = format!("{count} monitors");
        let mut worst: f64 = 0.0;
        for round in 0..u64::from(arguments.runs) {
            for (system, hearing) in [("told", Hearing::Told), ("not told", Hearing::Nothing)] {
                let outcome = Host::new(count, hearing, 0x9e37_79b9 + round).run();
                let row = (system, case.as_str());
                results.add(row, ("taken / needed", ""), outcome.ratio);
                results.add(row, ("late", "ms"), outcome.late.as_secs_f64() * 1e3);
                if hearing == Hearing::Told {
                    worst = worst.max(outcome.ratio);
                }
            }
        }
        results.lower(name, worst);
    }
    results.note("A simulation of 95 s in virtual time around the monitor's policy; the worst of all rounds.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDS: [u64; 3] = [1, 77, 0x9e37_79b9];

    #[test]
    fn many_monitors_take_what_is_needed_together() {
        for (count, seed) in [1, 10, 50]
            .into_iter()
            .flat_map(|n| SEEDS.map(|seed| (n, seed)))
        {
            let outcome = Host::new(count, Hearing::Told, seed).run();
            println!("{count}: {:.2} {outcome:?}", outcome.ratio);
            assert!(outcome.ratio <= 1.3, "{count}: {outcome:?}");
            assert!(outcome.taken >= outcome.needed, "{count}: {outcome:?}");
        }
    }

    #[test]
    fn one_monitor_answers_as_fast_as_it_can() {
        for seed in SEEDS {
            let outcome = Host::new(1, Hearing::Told, seed).run();
            // In a second 28 GiB go, 11 GiB more than there are above the watermark. To return them takes 1.4 s.
            println!("{outcome:?}");
            assert!(outcome.late < Duration::from_millis(1400), "{outcome:?}");
        }
    }

    #[test]
    fn what_others_say_and_do_not_give_is_made_up_for() {
        for seed in SEEDS {
            let mut host = Host::new(50, Hearing::Told, seed);
            for (index, monitor) in host.monitors.iter_mut().enumerate() {
                monitor.lazy *= 8;
                monitor.deaf = index < 45;
            }
            let outcome = host.run();
            println!("{outcome:?}");
            assert!(outcome.ratio <= 1.3, "{outcome:?}");
            assert!(outcome.taken >= outcome.needed, "{outcome:?}");
            assert!(outcome.late < Duration::from_secs(5), "{outcome:?}");
        }
    }

    #[test]
    fn monitors_that_do_not_hear_of_each_other_take_more() {
        let [told, alone] =
            [Hearing::Told, Hearing::Nothing].map(|hearing| Host::new(50, hearing, 1).run().ratio);
        println!("{told} {alone}");
        assert!(alone > told);
    }
}
