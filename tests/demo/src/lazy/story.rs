//! The story, step by step.

use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::size::{MIB, Size};
use ebb_harness::wait::{LONG, settled, until};
use ebb_harness::{Api, Guest, Launch, Monitor, host};

use super::outcome::{Moment, Outcome, percent};
use crate::narrator::Narrator;
use crate::picture::Mark;
use crate::sampler::Sampler;

/// Memory that the guest's kernel keeps for itself beside the workload.
const GUEST_RESERVE: u64 = 56 * MIB;
/// What the host's count may fall by while nothing is taken: the kernel may drop the monitor's file pages.
const NOISE: u64 = 4 * MIB;

/// Everybody in the story.
struct Stage {
    narrator: Narrator,
    monitor: Monitor,
    guest: Guest,
    api: Api,
    sampler: Sampler,
    outcome: Outcome,
}

/// Tells the story with a guest of `memory` MiB that keeps `keep` MiB of data.
pub fn tell(memory: u64, keep: u64) -> Result<Outcome> {
    let mut stage = Stage::boot(memory)?;
    let (filled, checksum) = stage.fill(keep)?;
    // A multiple of 32 MiB, well within what the guest has touched.
    let balloon = filled / 10 * 9 / (32 * MIB) * (32 * MIB);
    stage.inflate(balloon)?;
    stage.take_half(balloon)?;
    stage.take_rest()?;
    stage.reuse(filled, &checksum)?;
    stage.shut_down()
}

impl Stage {
    fn boot(memory: u64) -> Result<Self> {
        let narrator = Narrator::begin();
        let launch = Launch::new()?
            .memory(&format!("size={memory}M"))
            .option("--balloon", "size=0,statistics=1");
        let images = launch.images().clone();
        let mut outcome = Outcome {
            platform: images.platform.clone(),
            kernel: images.release.clone(),
            guest_memory: memory * MIB,
            ..Outcome::default()
        };
        introduce(&images.platform);
        let text = format!("boots Debian's kernel {}, unmodified", images.release);
        narrator.say("Ebb", format_args!("{text}; 1 vCPU, {memory} MiB"));
        let mut monitor = launch.start()?;
        let lazy_api = monitor.api();
        let lazy = move || Some(lazy_api.lazy().ok()?["lazy_bytes"]);
        let folder = monitor.folder().to_owned();
        let rss = move || host::machine_rss(&folder);
        let sampler = Sampler::start(narrator.start(), rss, lazy);
        outcome.marks.push(Mark {
            at: 0.0,
            label: "the guest boots".to_owned(),
        });
        let guest = monitor.guest()?;
        outcome.boot_seconds = monitor.age().as_secs_f64();
        let api = monitor.api();
        let mut stage = Self {
            narrator,
            monitor,
            guest,
            api,
            sampler,
            outcome,
        };
        let driver = until("the guest's balloon driver", LONG, || {
            Ok(Some(stage.api.balloon()?).filter(|balloon| balloon.lazy))
        });
        driver.map_err(|error| stage.monitor.explain(error))?;
        let total = stage.guest.number("meminfo", "MemTotal")?;
        stage.narrator.say(
            "guest",
            format_args!("is up and finds {} of memory", Size(total)),
        );
        stage.note("guest booted", "booted")?;
        Ok(stage)
    }

    /// The next part of the story begins.
    fn mark(&mut self, label: impl Into<String>) {
        let at = self.narrator.start().elapsed().as_secs_f64();
        self.outcome.marks.push(Mark {
            at,
            label: label.into(),
        });
    }

    /// Writes down where memory stands, and lets the picture show it.
    fn note(&mut self, title: &'static str, key: &'static str) -> Result<Moment> {
        self.sampler.dwell()?;
        let (rss, lazy) = (
            host::rss(self.monitor.pid())?,
            self.api.lazy()?["lazy_bytes"],
        );
        let moment = Moment {
            title,
            key,
            rss,
            lazy,
        };
        self.outcome.moments.push(moment);
        let lazy = if lazy > 0 {
            format!(", {} of it lazily free", Size(lazy))
        } else {
            String::new()
        };
        self.narrator.more(format_args!(
            "host: Ebb's resident memory (RSS) is {}{lazy}",
            Size(rss)
        ));
        Ok(moment)
    }

    /// The guest keeps some data, uses all other memory once, and frees that again.
    fn fill(&mut self, keep: u64) -> Result<(u64, String)> {
        self.mark("the guest fills its memory, then frees most of it");
        let checksum = self.guest.checksum(&format!("keep {keep}M"))?;
        let text = format!("keeps {} of data (checksum {checksum})", Size(keep * MIB));
        self.narrator.say("guest", text);
        let available = self.guest.number("meminfo", "MemAvailable")?;
        let fill = available.saturating_sub(GUEST_RESERVE) / MIB;
        let filled = self.guest.number(&format!("fill {fill}M"), "filled")?;
        self.guest.ask("drop")?;
        let text = format!(
            "fills {} more and frees it; the host cannot tell and keeps it",
            Size(filled)
        );
        self.narrator.say("guest", text);
        self.note("guest used its memory and freed it", "touched")?;
        Ok((filled, checksum))
    }

    fn balloon(&self, bytes: u64) -> Result<()> {
        self.api.set_balloon(bytes)?;
        let arrived = until(format!("a balloon of {}", Size(bytes)), LONG, || {
            Ok((self.api.balloon()?.actual_mib * MIB == bytes).then_some(()))
        });
        arrived.map_err(|error| self.monitor.explain(error))
    }

    /// The guest hands free memory to the host, which does nothing about it.
    fn inflate(&mut self, bytes: u64) -> Result<()> {
        self.mark("the guest hands free memory over, lazily");
        let before = self.outcome.rss("touched");
        let calls = self.api.lazy()?["discard_calls_total"];
        self.balloon(bytes)?;
        let quiet = Duration::from_millis(500);
        let state = settled("lazy memory", quiet, || self.api.lazy())?;
        self.narrator.say(
            "guest",
            format_args!("hands {} to the host through its balloon", Size(bytes)),
        );
        let after = self.note("guest handed it over, lazily", "lazily_freed")?;
        self.outcome.lazy = after.lazy;
        let calls = state["discard_calls_total"] - calls;
        self.narrator.more(format_args!(
            "Ebb only wrote it down: {calls} madvise calls"
        ));
        let costs_nothing = calls == 0 && before.saturating_sub(after.rss) <= NOISE;
        let text = format!(
            "handing over costs the host nothing: {calls} madvise calls, {}",
            change(before, after.rss)
        );
        self.outcome
            .claims
            .add(costs_nothing && after.lazy >= bytes / 100 * 99, text);
        Ok(())
    }

    fn take(&mut self, bytes: u64) -> Result<u64> {
        let outcome = self.api.reclaim(bytes);
        let outcome = outcome.map_err(|error| self.monitor.explain(error))?;
        self.outcome.reclaimed += outcome.reclaimed_bytes;
        let ms = outcome.duration_us as f64 / 1e3;
        let (asked, taken) = (Size(bytes), Size(outcome.reclaimed_bytes));
        self.narrator.say(
            "host",
            format_args!("wants {asked}; Ebb returns {taken} in {ms:.0} ms"),
        );
        Ok(outcome.reclaimed_bytes)
    }

    fn take_half(&mut self, balloon: u64) -> Result<()> {
        self.mark("the host takes half of it");
        let half = balloon / 2 / MIB * MIB;
        let taken = self.take(half)?;
        self.outcome.half = taken;
        let after = self.note("host took half of it", "half_reclaimed")?;
        let fell = self.outcome.rss("lazily_freed").saturating_sub(after.rss);
        let text = format!(
            "the host asked for {} and got {}; RSS fell by {} ({:.1} % of that)",
            Size(half),
            Size(taken),
            Size(fell),
            percent(fell, taken)
        );
        self.outcome
            .claims
            .add(taken >= half / 100 * 99 && fell >= taken / 100 * 95, text);
        Ok(())
    }

    fn take_rest(&mut self) -> Result<()> {
        self.mark("the host takes all of it");
        let rest = self.api.lazy()?["lazy_bytes"];
        self.take(rest)?;
        let after = self.note("host took all of it", "reclaimed")?;
        let fell = self.outcome.rss("lazily_freed").saturating_sub(after.rss);
        let (lazy, taken) = (self.outcome.lazy, self.outcome.reclaimed);
        let text = format!(
            "of {} lazily free, {} could be taken ({:.1} %); RSS fell by {} ({:.1} % of that)",
            Size(lazy),
            Size(taken),
            percent(taken, lazy),
            Size(fell),
            percent(fell, taken)
        );
        self.outcome
            .claims
            .add(taken >= lazy / 100 * 90 && fell >= taken / 100 * 95, text);
        Ok(())
    }

    /// The guest takes its memory back and uses it.
    fn reuse(&mut self, bytes: u64, checksum: &str) -> Result<()> {
        self.mark("the guest takes its memory back and fills it again");
        self.balloon(0)?;
        self.guest.ask(&format!("fill {}M", bytes / MIB))?;
        self.narrator.say(
            "guest",
            format_args!("takes all back and fills {} again", Size(bytes)),
        );
        let now = self.guest.checksum("verify");
        let text = match &now {
            Ok(now) => format!("reads everything again: no page is lost (checksum {now})"),
            Err(error) => format!("has lost data: {error}"),
        };
        self.narrator.say("guest", text);
        self.outcome.intact = now.is_ok_and(|now| now == checksum);
        let text = "the guest's data is intact, page by page, and so is what it wrote afterwards";
        self.outcome
            .claims
            .add(self.outcome.intact, text.to_owned());
        let after = self.note("guest took it back and used it", "reused")?;
        let text = format!("nothing stays lazily free: {}", Size(after.lazy));
        self.outcome.claims.add(after.lazy == 0, text);
        Ok(())
    }

    /// The guest powers off, and the host has its memory again.
    fn shut_down(mut self) -> Result<Outcome> {
        self.mark("the guest powers off");
        self.guest.ask("exit")?;
        let code = self.monitor.wait()?;
        // Memory is freed after the monitor's end, by a helper.
        let (freed, ms) = until("the log tells of the teardown", LONG, || {
            Ok(teardown(&self.monitor.log()).ok())
        })?;
        let left = host::machine_rss(self.monitor.folder());
        (self.outcome.teardown_freed, self.outcome.teardown_ms) = (freed, ms);
        let text = format!(
            "powers off; Ebb frees {} in {ms:.0} ms and ends with {code}",
            Size(freed)
        );
        self.narrator.say("guest", text);
        let rss = self.outcome.rss("reused");
        self.outcome.moments.push(Moment {
            title: "after shutdown",
            key: "ended",
            rss: left,
            lazy: 0,
        });
        let text = format!(
            "after the end everything is free again: {} of {} ({:.1} %) in {ms:.0} ms; RSS is {}",
            Size(freed),
            Size(rss),
            percent(freed, rss),
            Size(left)
        );
        let all = freed >= rss / 100 * 95 && left <= rss / 100;
        self.outcome.claims.add(code == 0 && all, text);
        self.sampler.dwell()?;
        self.outcome.samples = self.sampler.finish();
        Ok(self.outcome)
    }
}

/// How resident memory has moved while the guest handed memory over.
fn change(before: u64, after: u64) -> String {
    match after.checked_sub(before) {
        Some(rose) if rose < MIB => "RSS as before".to_owned(),
        Some(rose) => format!(
            "RSS did not fall (it rose by {}: the guest touched new pages meanwhile)",
            Size(rose)
        ),
        None => format!("RSS fell by {}", Size(before - after)),
    }
}

/// What this is about, and where it runs.
fn introduce(platform: &str) {
    println!(
        "Ebb runs virtual machines whose guests hand memory back lazily: a guest says what it does"
    );
    println!(
        "not need, nothing happens, and the host takes it when, and only if, it wants memory."
    );
    if platform == "nested" {
        println!(
            "This host cannot run a stock Linux guest, so all of this runs in an emulated machine that"
        );
        println!("can: sizes are as they are anywhere, times are many times longer.");
    }
    println!();
}

/// Bytes and milliseconds of the log's line `teardown: freed N bytes in M ms …`.
fn teardown(log: &str) -> Result<(u64, f64)> {
    let line = log
        .lines()
        .find_map(|line| line.split_once("teardown: freed "))
        .map(|(_, text)| text);
    let parse = |text: &str| {
        let (bytes, rest) = text.split_once(" bytes in ")?;
        let (ms, _) = rest.split_once(" ms")?;
        Some((bytes.parse().ok()?, ms.parse().ok()?))
    };
    line.and_then(parse).context(format_args!(
        "the log does not tell of the teardown:\n{log}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_guest_touches_is_not_taken_for_a_cost() {
        assert_eq!(change(MIB, MIB + 7), "RSS as before");
        assert!(change(MIB, 9 * MIB).contains("rose by 8.0 MiB"));
        assert_eq!(change(9 * MIB, MIB), "RSS fell by 8.0 MiB");
    }

    #[test]
    fn the_teardown_is_found_in_the_log() {
        let log = "x\n2024 INFO vmm: teardown: freed 1234 bytes in 5.6 ms with 2 workers\n";
        assert_eq!(teardown(log).unwrap(), (1234, 5.6));
        assert!(teardown("teardown: freed much").is_err());
    }
}
