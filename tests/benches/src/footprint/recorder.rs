//! Records a monitor's memory over time, beside the work.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::error::{Error, Result};
use ebb_harness::host::rss_estimate;

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(200);

/// Seconds, and resident bytes.
#[derive(Debug, Default)]
pub struct Record(Vec<(f64, u64)>);

/// Does `work`, and records the memory of the process `pid` until it is done.
pub fn record<T>(pid: u32, work: impl FnOnce() -> Result<T>) -> Result<(T, Record)> {
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let recorder = scope.spawn(move || {
            let (start, mut samples) = (Instant::now(), Vec::new());
            loop {
                samples.push((start.elapsed().as_secs_f64(), rss_estimate(pid)?));
                if stopped.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return Ok(Record(samples));
                }
            }
        });
        let done = work();
        drop(stop);
        let record = recorder
            .join()
            .map_err(|_| Error::new("the recorder has panicked".to_owned()))?;
        Ok((done?, record?))
    })
}

impl Record {
    /// Memory over time.
    pub fn gib_minutes(&self) -> f64 {
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        let area =
            pairs.map(|((from, a), (to, b))| (to - from) * f64::midpoint(*a as f64, *b as f64));
        area.sum::<f64>() / 60.0 / f64::from(1 << 30)
    }

    /// The largest sample.
    pub fn peak(&self) -> u64 {
        self.0.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0)
    }

    /// Seconds and MiB.
    pub fn points(&self) -> Vec<(f64, f64)> {
        let mib = |(at, bytes): &(f64, u64)| (*at, *bytes as f64 / f64::from(1 << 20));
        self.0.iter().map(mib).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_added_up_over_time() {
        let record = Record(vec![(0.0, 1 << 30), (30.0, 1 << 30), (90.0, 3 << 30)]);
        assert!((record.gib_minutes() - 2.5).abs() < 1e-9);
        assert_eq!(record.peak(), 3 << 30);
        assert!(Record::default().gib_minutes().abs() < 1e-9);
    }

    #[test]
    fn the_recorder_ends_with_the_work() {
        let (done, record) = record(std::process::id(), || Ok(7)).unwrap();
        assert!(done == 7 && !record.0.is_empty());
    }
}
