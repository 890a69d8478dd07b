//! The thread that reclaims under memory pressure.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::policy::ALERT;
use super::{
    Ages, AutoBalloon, Decision, Mode, Order, Outcome, PolicyState, PressureSource, Reclaimer,
    Sample, Until, decide,
};
use crate::sys::panic_point;
use crate::sys::seccomp::Role;

/// An order ends after this time, and the host is looked at again: fragments may take minutes, and need may grow.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The reclaim thread cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("starting the thread ebb-reclaim failed")]
pub struct StartError(#[source] io::Error);

/// The thread `ebb-reclaim`: waits for memory pressure, decides, and reclaims. Stopped and joined on drop.
pub struct ReclaimThread {
    stop: Arc<OwnedFd>,
    reclaimer: Arc<Reclaimer>,
    thread: Option<JoinHandle<PressureSource>>,
}

impl ReclaimThread {
    /// Starts the thread, which also runs `balloon`.
    ///
    /// # Errors
    /// [`StartError`] if the host has no descriptor or thread left.
    pub fn start(
        reclaimer: Arc<Reclaimer>,
        source: PressureSource,
        balloon: Option<AutoBalloon>,
    ) -> Result<Self, StartError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| StartError(error.into()))?;
        let stop = Arc::new(stop);
        let stopped = Arc::clone(&stop);
        let worker = Arc::clone(&reclaimer);
        let thread = Builder::new()
            .name("ebb-reclaim".into())
            .spawn(move || {
                Role::Reclaim.enter();
                let mut source = source;
                watch(&worker, &mut source, balloon, &stopped);
                source
            })
            .map_err(StartError)?;
        Ok(Self {
            stop,
            reclaimer,
            thread: Some(thread),
        })
    }

    /// Stops the thread and returns its source of pressure, so that the caller can choose when to drop it: the kernel takes
    /// 10 ms to remove a trigger.
    pub fn stop(mut self) -> Option<PressureSource> {
        self.end()
    }

    fn end(&mut self) -> Option<PressureSource> {
        let thread = self.thread.take()?;
        self.reclaimer.stop();
        let written = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        debug_assert_eq!(written, Ok(8), "an event can be written once");
        let source = thread.join();
        if source.is_err() {
            tracing::error!("the thread ebb-reclaim has panicked");
        }
        source.ok()
    }
}

impl Drop for ReclaimThread {
    fn drop(&mut self) {
        drop(self.end());
    }
}

fn watch(
    reclaimer: &Reclaimer,
    source: &mut PressureSource,
    mut balloon: Option<AutoBalloon>,
    stop: &OwnedFd,
) {
    let (mut answers, mut ages, start) =
        (Answers::new(LOOK_AGAIN), Ages::default(), Instant::now());
    loop {
        match source.wait(stop.as_fd(), answers.pause) {
            Ok(Some(sample)) => {
                panic_point();
                reclaimer.count_limit_events(source.take_limit_events());
                let mut sample = reclaimer.sampled(sample);
                if let Mode::Age(age) = reclaimer.tuning().mode {
                    let now = start.elapsed();
                    sample.aged = ages.aged(now, sample.generation, age);
                    sample.old_free = reclaimer.old_free(now, age);
                }
                sample.given = answers.given;
                sample.free = reclaimer.free_now(&sample, answers.state.is_hard());
                let sample = source.shared(sample);
                answers.respond(reclaimer, sample, &|| source.is_reported());
                if let Some(balloon) = &mut balloon {
                    balloon.look(reclaimer, &sample);
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "memory pressure is not watched any more");
                return;
            }
        }
    }
}

/// What one answer leaves to the next.
#[derive(Clone, Copy, Debug)]
struct Answers {
    /// How long an order may take before the next sample.
    patience: Duration,
    state: PolicyState,
    /// Bytes given back in all answers.
    given: u64,
    /// Time to the next sample.
    pause: Duration,
}

impl Answers {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            state: PolicyState::default(),
            given: 0,
            pause: Duration::ZERO,
        }
    }

    /// Answers one sample. Orders end when they take too long; what can wait, as soon as `reported` says that there may be
    /// pressure.
    fn respond(
        &mut self,
        reclaimer: &Reclaimer,
        sample: Sample,
        reported: &(dyn Fn() -> bool + Sync),
    ) {
        let mode = reclaimer.tuning().mode;
        let (decision, next) = decide(mode, sample, self.state);
        let until = Until {
            other: (!decision.pressed).then_some(reported),
            ..Until::after(Some(self.patience))
        };
        (self.state, self.pause) = (next, decision.pause);
        if let Some(order) = order(&decision, decision.bytes) {
            if decision.pressed {
                reclaimer.count_pressure_event();
                event!("pressure", wanted_bytes = decision.bytes);
            }
            let outcome = reclaimer.discard_until(order, until);
            self.given = self.given.saturating_add(outcome.bytes);
            // Without this, modes that try each time would log a message each second.
            if outcome.bytes > 0 {
                tracing::info!(
                    bytes = outcome.bytes,
                    wanted = order.bytes,
                    failures = outcome.failures,
                    micros = u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX),
                    "reclaimed"
                );
            }
            if outcome.bytes < order.bytes {
                // To ask again at once would only keep a core busy.
                self.pause = self.pause.max(ALERT);
            }
            self.go_on_after(&outcome);
            if outcome.cut_short {
                return;
            }
        }
        if let Some(order) = order(&decision, decision.old_free) {
            let outcome = reclaimer.discard_old_free(order, until);
            self.given = self.given.saturating_add(outcome.bytes);
            self.go_on_after(&outcome);
            if outcome.cut_short {
                return;
            }
        }
        if let Some(order) = order(&decision, decision.invalidate) {
            let outcome = reclaimer.invalidate_until(order, until);
            self.go_on_after(&outcome);
            tracing::debug!(bytes = outcome.bytes, wanted = order.bytes, "invalidated");
        }
    }

    /// What is left of an order that took too long is decided anew, at once if it came on.
    fn go_on_after(&mut self, outcome: &Outcome) {
        if outcome.cut_short && outcome.bytes > 0 {
            self.pause = Duration::ZERO;
        }
    }
}

/// The order for `bytes` bytes of a decision; `None` for none. Nobody waits for it: the vCPUs keep their share of time.
fn order(decision: &Decision, bytes: u64) -> Option<Order> {
    (bytes > 0).then_some(Order {
        bytes,
        reach: decision.reach,
        newest: decision.newest,
        urgent: false,
    })
}

#[cfg(test)]
mod tests {
    use ebb_core::generation::{Gate, NoKick, VmGeneration};
    use ebb_core::lazy::LazyMemory;
    use ebb_core::range::GpaRange;

    use super::*;
    use crate::memory::{Backing, GuestRam};
    use crate::reclaim::{Limit, ReclaimTuning, Room};

    fn setup() -> (Arc<LazyMemory>, Arc<Reclaimer>) {
        let all = GpaRange::new(0, 256 << 20).unwrap();
        let ram = Arc::new(GuestRam::allocate(Backing::default(), &[all]).unwrap());
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
        let lazy = Arc::new(LazyMemory::new(generation));
        lazy.free(&[all]);
        let reclaimer = Reclaimer::new(Arc::clone(&lazy), ram, gate, ReclaimTuning::default());
        (lazy, Arc::new(reclaimer))
    }

    #[test]
    fn the_thread_stops_and_returns_its_source() {
        for source in [PressureSource::open(), PressureSource::watermark_only()] {
            let thread = ReclaimThread::start(setup().1, source, None).unwrap();
            assert!(thread.stop().is_some());
        }
    }

    #[test]
    fn pressure_is_answered_and_calm_is_not() {
        let (lazy, reclaimer) = setup();
        let mut answers = Answers::new(Duration::MAX);
        let calm = Sample::default();
        answers.respond(&reclaimer, reclaimer.sampled(calm), &|| false);
        assert_eq!(lazy.snapshot().discarded_bytes, 0);
        assert_eq!(answers.pause, Duration::from_secs(1));
        let stalled = Sample {
            stalled: true,
            ..calm
        };
        answers.respond(&reclaimer, reclaimer.sampled(stalled), &|| false);
        let stats = lazy.snapshot();
        assert_eq!(stats.discarded_bytes, 64 << 20);
        assert_eq!(stats.unmapped_bytes, 64 << 20, "ahead of the next one");
        assert_eq!(reclaimer.snapshot().pressure_events_total, 1);
        assert_eq!(answers.given, 64 << 20);
        assert_eq!(answers.pause, Duration::from_millis(100));
    }

    #[test]
    fn a_need_that_cannot_be_met_is_not_tried_again_at_once() {
        let (_, reclaimer) = setup();
        let mut answers = Answers::new(Duration::MAX);
        let room = Room {
            total: 1 << 40,
            available: 0,
        };
        let host = Limit {
            room,
            ..Limit::default()
        };
        let sample = Sample {
            host,
            lazy: 9 << 30,
            ..Sample::default()
        };
        answers.respond(&reclaimer, sample, &|| false);
        assert_eq!((answers.given, answers.pause), (256 << 20, ALERT));
    }

    #[test]
    fn work_that_can_wait_gives_way_to_what_is_reported() {
        let (lazy, reclaimer) = setup();
        let mut answers = Answers::new(Duration::MAX);
        let near = Room {
            total: 4 << 30,
            available: 300 << 20,
        };
        let host = Limit {
            room: near,
            ..Limit::default()
        };
        let sample = reclaimer.sampled(Sample {
            host,
            ..Sample::default()
        });
        answers.respond(&reclaimer, sample, &|| true);
        assert_eq!(lazy.snapshot().unmapped_bytes, 0, "nothing is prepared");
        answers.respond(&reclaimer, sample, &|| false);
        assert_eq!(lazy.snapshot().unmapped_bytes, 64 << 20);
        assert_eq!(answers.pause, ALERT);
    }

    #[test]
    fn an_order_that_takes_long_ends_so_that_the_host_is_looked_at_again() {
        let all = GpaRange::new(0, 2 << 20).unwrap();
        let ram = Arc::new(GuestRam::allocate(Backing::default(), &[all]).unwrap());
        ram.populate(all).unwrap();
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::new(1, Arc::clone(&generation), Box::new(NoKick)));
        let lazy = Arc::new(LazyMemory::new(generation));
        let page = |at| GpaRange::new(at, at + 4096).unwrap();
        lazy.free(
            &(0..100)
                .map(|page| page * 8192)
                .map(page)
                .collect::<Vec<_>>(),
        );
        let tuning = ReclaimTuning {
            mode: Mode::Eager,
            pause: Duration::from_millis(10),
            ..ReclaimTuning::default()
        };
        let reclaimer = Reclaimer::new(Arc::clone(&lazy), ram, Arc::clone(&gate), tuning);
        // It misses the pause, for which the order would have to rest for a second.
        let _inside = gate.enter(0);
        let mut answers = Answers::new(LOOK_AGAIN);
        answers.respond(&reclaimer, reclaimer.sampled(Sample::default()), &|| false);
        assert_eq!(lazy.snapshot().lazy_bytes, 100 * 4096);
        assert_eq!(gate.stats().missed_total, 1);
        assert_eq!(answers.pause, ALERT, "it did not come on");
        answers.go_on_after(&Outcome {
            cut_short: true,
            bytes: 1,
            ..Outcome::default()
        });
        assert_eq!(answers.pause, Duration::ZERO);
    }

    #[test]
    fn nobody_waits_for_what_the_thread_takes() {
        let sample = Sample {
            lazy: 5,
            ..Sample::default()
        };
        let decision = decide(Mode::Eager, sample, PolicyState::default()).0;
        let expected = Order {
            bytes: 5,
            reach: decision.reach,
            newest: u64::MAX,
            urgent: false,
        };
        assert_eq!(order(&decision, 5), Some(expected));
        assert_eq!(order(&decision, 0), None);
    }
}
