//! The story of one Redis, step by step.

use std::time::{Duration, Instant};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::debian::Debian;
use ebb_harness::error::{Context, Result};
use ebb_harness::size::{MIB, Size};
use ebb_harness::{Launch, host};
use serde_json::Value;

use super::outcome::{Fill, Run};
use crate::narrator::Narrator;
use crate::neighbour::{Neighbour, PIECE};
use crate::sampler::Sampler;

/// What the host has left when Redis is full: more than it keeps free, so that nothing happens yet.
const HEADROOM: u64 = 320 * MIB;
/// What the neighbour takes beyond what Redis has held: more than what the host has left.
const BEYOND: u64 = 96 * MIB;

/// How long the neighbour waits, in seconds.
const TIMEOUT: f64 = 30.0;

/// Where Redis has its heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heap {
    /// In an arena.
    Arena,
    /// In the guest's memory, as ever, with Debian's jemalloc; the guest reports free pages.
    Plain,
}

/// Everybody in the story.
struct Stage<'a> {
    narrator: &'a Narrator,
    cgroup: Cgroup,
    debian: Debian,
    sampler: Sampler,
    start: Instant,
    keys: u32,
    run: Run,
}

/// Tells the story of a Redis with `keys` values of about 4 KiB.
pub fn tell(heap: Heap, keys: u32, narrator: &Narrator) -> Result<Run> {
    let mut stage = Stage::boot(heap, keys, narrator)?;
    stage.fill_first()?;
    stage.flush()?;
    stage.host_needs_memory()?;
    stage.fill_again()?;
    stage.end()
}

/// The number behind `name=`.
fn number(text: &str, name: &str) -> Result<f64> {
    let mut words = text.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = value.and_then(|value| value.parse().ok());
    value.context(format_args!("no number {name} in {text:?}"))
}

impl<'a> Stage<'a> {
    fn boot(heap: Heap, keys: u32, narrator: &'a Narrator) -> Result<Self> {
        // As in a host that is full: what Redis and its neighbour get together is limited.
        let cgroup = Cgroup::new(&format!("{heap:?}"))?;
        let launch = Launch::new()?.within(&cgroup).memory("size=1G");
        let mut debian = Debian::boot(match heap {
            Heap::Arena => launch.option("--arena", "size=8G"),
            Heap::Plain => launch.option("--balloon", "size=0,reporting=eager"),
        })?;
        let command = match heap {
            Heap::Arena => {
                debian.guest.must("ebb-guest setup --mode 0666")?;
                narrator.say(
                    "guest",
                    "Debian boots; Redis starts with its heap in an arena of 8 GiB",
                );
                "/tmp/ebb-guest run --no-fork --"
            }
            Heap::Plain => {
                narrator.say(
                    "guest",
                    "Debian boots; Redis starts as Debian ships it, free pages are reported",
                );
                ""
            }
        };
        debian.run(&format!("bash /tmp/redis-demo.sh start {command}"))?;
        let api = debian.monitor.api();
        let lazy = move || api.get("/arenas").ok()?[0]["lazy_bytes"].as_u64();
        let start = Instant::now();
        let folder = debian.monitor.folder().to_owned();
        let sampler = Sampler::start(start, move || host::machine_rss(&folder), lazy);
        let mut stage = Self {
            narrator,
            cgroup,
            debian,
            sampler,
            start,
            keys,
            run: Run::default(),
        };
        stage.run.rss_idle = stage.rss()?;
        narrator.more(format_args!(
            "host: Ebb's resident memory (RSS) is {}",
            Size(stage.run.rss_idle)
        ));
        Ok(stage)
    }

    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn rss(&self) -> Result<u64> {
        host::rss(self.debian.monitor.pid())
    }

    fn script(&mut self, words: &str) -> Result<String> {
        self.debian.run(&format!("bash /tmp/redis-demo.sh {words}"))
    }

    fn fill(&mut self, letter: char) -> Result<Fill> {
        let keys = self.keys;
        let client = "python3 /tmp/redis-client.py";
        let said = self.debian.run(&format!("{client} fill {letter} {keys}"))?;
        let wrong = self
            .debian
            .run(&format!("{client} check {letter} {keys}"))?;
        Ok(Fill {
            seconds: number(&said, "seconds")?,
            faults: number(&said, "faults")?,
            wrong: number(&wrong, "wrong")?,
        })
    }

    fn tell_fill(&self, fill: Fill, rss: u64) {
        let Fill {
            seconds,
            faults,
            wrong,
        } = fill;
        let text = format!(
            "SET {} values of 4 KiB in {seconds:.1} s, {faults} page faults",
            self.keys
        );
        self.narrator.say("Redis", text);
        let text = format!(
            "GET all: {wrong} wrong; host: Ebb's resident memory (RSS) is {}",
            Size(rss)
        );
        self.narrator.more(text);
    }

    fn fill_first(&mut self) -> Result<()> {
        self.run.first = self.fill('a')?;
        self.sampler.dwell()?;
        self.run.rss_full = self.rss()?;
        self.tell_fill(self.run.first, self.run.rss_full);
        // What the monitor has read of its disks is the kernel's to drop, and no part of the story.
        std::fs::write("/proc/sys/vm/drop_caches", "1").context("drop_caches")?;
        let limit = self.cgroup.number("memory.current")? + HEADROOM;
        self.cgroup.set("memory.high", limit)
    }

    fn flush(&mut self) -> Result<()> {
        self.run.flushed_at = self.seconds();
        self.script("flush")?;
        self.sampler.dwell()?;
        self.run.rss_flushed = self.rss()?;
        let (rss, api) = (Size(self.run.rss_flushed), self.debian.monitor.api());
        let text = match &api.get("/arenas")?[0]["lazy_bytes"] {
            Value::Null => {
                let free = Size(self.debian.guest.number("meminfo", "MemFree")?);
                format!("host: RSS is {rss}; guest: {free} free")
            }
            bytes => {
                let lazy = Size(bytes.as_u64().unwrap_or(0));
                format!("host: RSS is {rss}, {lazy} of it lazily free")
            }
        };
        self.narrator.say("Redis", format_args!("FLUSHALL; {text}"));
        Ok(())
    }

    /// A neighbour moves in, who takes a piece whenever there is one below the limit.
    fn host_needs_memory(&mut self) -> Result<()> {
        let limit = self.cgroup.number("memory.high")?;
        let wanted = (self.run.rss_full - self.run.rss_idle + BEYOND).next_multiple_of(PIECE);
        let mut neighbour = Neighbour::within(&self.cgroup)?;
        self.run.wanted_at = self.seconds();
        self.run.neighbour_wanted = wanted;
        while self.run.neighbour_got < wanted && self.seconds() < self.run.wanted_at + TIMEOUT {
            let left = limit.saturating_sub(self.cgroup.number("memory.current")?);
            if left >= PIECE {
                neighbour.grow()?;
                self.run.neighbour_got += PIECE;
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.run.had_at = self.seconds();
        // Reclaim may still be under way.
        std::thread::sleep(Duration::from_secs(1));
        self.run.rss_pressed = self.rss()?;
        self.tell_need();
        Ok(())
    }

    fn tell_need(&self) {
        let (run, seconds) = (&self.run, self.run.waited());
        let (wanted, got) = (Size(run.neighbour_wanted), Size(run.neighbour_got));
        let rss = Size(run.rss_pressed);
        let text = if run.is_served() {
            format!("a neighbour wants {wanted} and has it after {seconds:.1} s; RSS is {rss}")
        } else {
            format!("a neighbour wants {wanted} and has {got} after {seconds:.0} s; RSS is {rss}")
        };
        self.narrator.say("host", text);
    }

    fn fill_again(&mut self) -> Result<()> {
        self.run.again_at = self.seconds();
        self.run.again = self.fill('b')?;
        self.sampler.dwell()?;
        self.tell_fill(self.run.again, self.rss()?);
        Ok(())
    }

    fn end(mut self) -> Result<Run> {
        self.script("end")?;
        self.debian.end()?;
        self.run.samples = self.sampler.finish();
        Ok(self.run)
    }
}
