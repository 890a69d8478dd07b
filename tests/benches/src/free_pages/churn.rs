//! A guest that takes and frees memory all the time, while the host has plenty: with its free lists read and without. Two
//! machines are alike: what differs between those is noise.

use ebb_harness::free_pages::read_free_lists;
use ebb_harness::host::{KvmCounters, kvm_counters, minor_faults};
use ebb_harness::{Guest, Launch, Monitor, Result};

use super::Arguments;
use crate::results::{Metric, Results};

const MEMORY: &str = "size=512M";
/// Modes and their options. The first is what the others are compared with.
const MODES: [(&str, &str); 3] = [
    ("off", "free_pages=off"),
    ("off-again", "free_pages=off"),
    ("auto", "free_pages=auto"),
];
/// The case of all rows.
const CASE: &str = "churn";
/// What the guest achieves.
const RATE: Metric = ("rate", "pages/ms");

/// One machine.
struct Scene {
    mode: &'static str,
    monitor: Monitor,
    guest: Guest,
}

impl Scene {
    fn start((mode, options): (&'static str, &'static str)) -> Result<Self> {
        let launch = Launch::new()?.memory(MEMORY).cpus(2);
        let mut monitor = launch.option("--lazy", options).start()?;
        let mut guest = monitor.guest()?;
        if mode == "auto" {
            read_free_lists(&monitor, &mut guest)?;
        }
        // Every page once, so that no mode pays for the first touch.
        guest.ask("churn 400M 0")?;
        Ok(Self {
            mode,
            monitor,
            guest,
        })
    }

    fn counts(&self) -> Result<(KvmCounters, u64)> {
        let pid = self.monitor.pid();
        Ok((kvm_counters(pid)?, minor_faults(pid)?))
    }

    fn turn(&mut self, seconds: u32, results: &mut Results) -> Result<()> {
        let (before, faults_before) = self.counts()?;
        let answer = self.guest.ask(&format!("churn 320M {seconds}"))?;
        let (after, faults) = self.counts()?;
        let value = |name| {
            let mut words = answer.split_whitespace();
            words.find_map(|word: &str| word.strip_prefix(name)?.parse::<f64>().ok())
        };
        let ms = value("ms=").unwrap_or(0.0);
        let mut add = |metric: Metric, sample: f64| results.add((self.mode, CASE), metric, sample);
        add(RATE, value("pages=").unwrap_or(0.0) / ms.max(1.0));
        let per_second = |count: u64| count as f64 * 1e3 / ms.max(1.0);
        add(("exits", "/s"), per_second(after.exits - before.exits));
        let flushes = after.remote_tlb_flush_requests - before.remote_tlb_flush_requests;
        add(("flush-requests", ""), flushes as f64);
        add(("faults", ""), (faults - faults_before) as f64);
        Ok(())
    }
}

/// One machine a mode, all at once, driven in turn; whose turn is first changes from round to round.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    let scenes = MODES.into_iter().map(Scene::start);
    let mut scenes = scenes.collect::<Result<Vec<_>>>()?;
    for run in 1..=arguments.runs {
        for scene in &mut scenes {
            scene.turn(arguments.seconds, results)?;
        }
        scenes.rotate_left(1);
        eprintln!("free-pages: churn, run {run} of {}", arguments.runs);
    }
    let rates = |mode| [mode, CASE, RATE.0];
    results.divide_rounds("churn", rates("auto"), rates("off"))?;
    results.divide_rounds("churn_noise", rates("off-again"), rates("off"))?;
    for metric in ["flush-requests", "faults"] {
        let of = |mode| results.median(mode, CASE, metric).unwrap_or(0.0);
        let more = of("auto") - of("off");
        results.lower(&format!("churn_more_{metric}"), more);
    }
    Ok(())
}
