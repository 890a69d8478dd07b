//! Takes memory of a guest that is at work: a balloon that grows and shrinks, and orders for what it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::Api;
use crate::error::{Error, Result};
use crate::size::MIB;
use crate::wait::{LONG, until};

/// A thread that takes memory until it is ended.
pub struct Taker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Taker {
    /// Has the balloon of the machine behind `api` take `bytes`, again and again.
    #[must_use]
    pub fn start(api: Api, bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut taken = 0;
            while taken == 0 || !seen.load(Ordering::Relaxed) {
                resize(&api, bytes)?;
                taken += api.reclaim(bytes)?.reclaimed_bytes;
                resize(&api, 0)?;
            }
            Ok(taken)
        });
        Self { stop, thread }
    }

    /// Leaves the guest all of its memory, and returns how many bytes were taken: more than 0.
    ///
    /// # Errors
    /// The machine did not do as it was told.
    pub fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.map_err(|_| Error::new("the thread has panicked"))?
    }
}

fn resize(api: &Api, bytes: u64) -> Result<()> {
    api.set_balloon(bytes)?;
    until("the balloon follows", LONG, || {
        Ok((api.balloon()?.actual_mib == bytes / MIB).then_some(()))
    })
}
