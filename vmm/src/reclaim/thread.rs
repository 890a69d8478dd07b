//! The thread that reclaims under memory pressure.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::{Ages, Decision, Mode, Order, PolicyState, PressureSource, Reclaimer, Sample, decide};

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
    /// Starts the thread.
    ///
    /// # Errors
    /// [`StartError`] if the host has no descriptor or thread left.
    pub fn start(reclaimer: Arc<Reclaimer>, source: PressureSource) -> Result<Self, StartError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| StartError(error.into()))?;
        let stop = Arc::new(stop);
        let stopped = Arc::clone(&stop);
        let worker = Arc::clone(&reclaimer);
        let thread = Builder::new()
            .name("ebb-reclaim".into())
            .spawn(move || {
                let mut source = source;
                watch(&worker, &mut source, &stopped);
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

fn watch(reclaimer: &Reclaimer, source: &mut PressureSource, stop: &OwnedFd) {
    let (mut state, mut ages, start) = (PolicyState::default(), Ages::default(), Instant::now());
    loop {
        match source.wait(stop.as_fd()) {
            Ok(Some(sample)) => {
                let mut sample = reclaimer.sampled(sample);
                if let Mode::Age(age) = reclaimer.tuning().mode {
                    sample.aged = ages.aged(start.elapsed(), sample.generation, age);
                }
                state = respond(reclaimer, sample, state);
            }
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "memory pressure is not watched any more");
                return;
            }
        }
    }
}

/// Answers one sample.
fn respond(reclaimer: &Reclaimer, sample: Sample, state: PolicyState) -> PolicyState {
    let mode = reclaimer.tuning().mode;
    let (decision, next) = decide(mode, sample, state);
    if next.is_pressed() {
        reclaimer.count_pressure_event();
    }
    let Decision {
        bytes,
        invalidate,
        reach,
        newest,
    } = decision;
    let order = |bytes| Order {
        bytes,
        reach,
        newest,
        urgent: false,
    };
    if bytes > 0 {
        let outcome = reclaimer.discard(order(bytes));
        // Without this, modes that try each time would log a message each second.
        if outcome.bytes > 0 {
            tracing::info!(
                bytes = outcome.bytes,
                wanted = bytes,
                failures = outcome.failures,
                micros = u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX),
                "reclaimed"
            );
        }
    }
    if invalidate > 0 {
        let outcome = reclaimer.invalidate(order(invalidate));
        tracing::debug!(bytes = outcome.bytes, wanted = invalidate, "invalidated");
    }
    next
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ebb_core::generation::{Gate, VmGeneration};
    use ebb_core::lazy::LazyMemory;
    use ebb_core::range::GpaRange;

    use super::*;
    use crate::memory::{Backing, GuestRam};
    use crate::reclaim::ReclaimTuning;

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
    fn the_thread_stops_at_once() {
        for source in [PressureSource::open(), PressureSource::watermark_only()] {
            let thread = ReclaimThread::start(setup().1, source).unwrap();
            let start = Instant::now();
            drop(thread);
            assert!(start.elapsed() < Duration::from_millis(500));
        }
    }

    #[test]
    fn pressure_is_answered_and_calm_is_not() {
        let (lazy, reclaimer) = setup();
        let calm = Sample {
            available: 9 << 30,
            total: 16 << 30,
            ..Sample::default()
        };
        let state = respond(&reclaimer, reclaimer.sampled(calm), PolicyState::default());
        assert_eq!(lazy.snapshot().discarded_bytes, 0);
        let stalled = Sample {
            stalled: true,
            ..calm
        };
        respond(&reclaimer, reclaimer.sampled(stalled), state);
        let stats = lazy.snapshot();
        assert_eq!(stats.discarded_bytes, 64 << 20);
        assert_eq!(stats.unmapped_bytes, 64 << 20, "ahead of the next one");
        assert_eq!(reclaimer.snapshot().pressure_events_total, 1);
    }
}
