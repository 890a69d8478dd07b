//! Records memory over time, beside the story.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ebb_harness::error::Result;
use ebb_harness::wait::{LONG, until};

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(200);
/// Samples that make a stretch of the picture readable.
const STRETCH: usize = 5;

/// Memory at one moment, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Seconds since the start.
    pub at: f64,
    /// Resident memory of the monitor and its helpers.
    pub rss: u64,
    /// What the story compares it with.
    pub other: u64,
}

/// A thread that takes samples until it is told to stop.
pub struct Sampler {
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Sampler {
    /// Starts. `rss` and `other` tell what a [`Sample`] has; `other` has no answer while nobody serves the API.
    pub fn start(
        start: Instant,
        rss: impl Fn() -> u64 + Send + 'static,
        other: impl Fn() -> Option<u64> + Send + 'static,
    ) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = mpsc::channel();
        let taken = Arc::clone(&samples);
        let thread = thread::spawn(move || {
            loop {
                // The API comes up after the process and goes before it: 0 then is right.
                let sample = Sample {
                    at: start.elapsed().as_secs_f64(),
                    rss: rss(),
                    other: other().unwrap_or(0),
                };
                taken
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(sample);
                if stopped.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        Self {
            samples,
            stop,
            thread,
        }
    }

    fn count(&self) -> usize {
        self.samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Lets a stretch pass so that the picture shows where things stand.
    pub fn dwell(&self) -> Result<()> {
        let enough = self.count() + STRETCH;
        until("samples", LONG, || {
            Ok((self.count() >= enough).then_some(()))
        })
    }

    /// Stops; all samples.
    pub fn finish(self) -> Vec<Sample> {
        // Both fail only when the thread has panicked; then there are fewer samples.
        let _ = self.stop.send(());
        let _ = self.thread.join();
        std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
