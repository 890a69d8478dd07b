//! The third story, step by step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_harness::api::Metrics;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::size::{MIB, Size};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Api, Guest, Launch, Monitor, host};

use super::outcome::{Found, Outcome};
use crate::narrator::Narrator;
use crate::neighbour::{Neighbour, PIECE};
use crate::picture::Mark;
use crate::sampler::Sampler;

const GUEST_MEMORY: u64 = 1024 * MIB;
/// What the guest keeps, and what a job of it uses and frees.
const KEPT: u64 = 64 * MIB;
const FREED: u64 = 608 * MIB;

/// What the host has left then: more than Ebb keeps free, so that nothing happens yet.
const HEADROOM: u64 = 320 * MIB;
/// What the neighbour wants: more than the host has left.
const WANTED: u64 = 640 * MIB;

/// Everybody in the story.
struct Stage {
    narrator: Narrator,
    cgroup: Cgroup,
    monitor: Monitor,
    guest: Guest,
    api: Api,
    sampler: Sampler,
    /// What the neighbour has.
    got: Arc<AtomicU64>,
    found: Found,
}

/// Tells it.
pub fn tell() -> Result<Outcome> {
    let mut stage = Stage::boot()?;
    let kept = stage.guest_works()?;
    stage.neighbour_wants_memory()?;
    stage.host_takes_the_rest()?;
    stage.guest_works_again(&kept)?;
    stage.end()
}

impl Stage {
    fn boot() -> Result<Self> {
        let narrator = Narrator::begin();
        println!(
            "A guest frees memory and tells nobody. Then the host needs memory for a neighbour.\n"
        );
        // As in a host that is full: what the guest and its neighbour get together is limited.
        let cgroup = Cgroup::new("free-pages")?;
        let launch = Launch::new()?.within(&cgroup);
        let mut monitor = launch
            .memory(&format!("size={}M", GUEST_MEMORY / MIB))
            .start()?;
        let got = Arc::new(AtomicU64::new(0));
        let (folder, shown) = (monitor.folder().to_owned(), Arc::clone(&got));
        let sampler = Sampler::start(
            narrator.start(),
            move || host::machine_rss(&folder),
            move || Some(shown.load(Ordering::Relaxed)),
        );
        let (guest, api) = (monitor.guest()?, monitor.api());
        let mut stage = Self {
            narrator,
            cgroup,
            monitor,
            guest,
            api,
            sampler,
            got,
            found: Found {
                guest_memory: GUEST_MEMORY,
                freed: FREED,
                neighbour_wanted: WANTED,
                ..Found::default()
            },
        };
        stage.mark(0.0, "the guest boots");
        stage.find_free_lists()?;
        Ok(stage)
    }

    /// The stock driver, which udev loads in an installed system, tells where the kernel's note is.
    fn find_free_lists(&mut self) -> Result<()> {
        self.guest
            .must("while read -r module; do insmod $module; done </etc/modules.note")?;
        let api = &self.api;
        let kernel = until("the guest's free lists are read", LONG, || {
            let state = api.get("/lazy-memory")?;
            Ok(state["free_pages"]["kernel"].as_str().map(str::to_owned))
        });
        self.found.kernel = kernel.map_err(|error| self.monitor.explain(error))?;
        let text = format!(
            "boots Debian's kernel {}: no balloon, no agent; Ebb can read its free lists",
            self.found.kernel
        );
        self.narrator.say("guest", text);
        Ok(())
    }

    fn mark(&mut self, at: f64, label: &str) {
        let label = label.to_owned();
        self.found.marks.push(Mark { at, label });
    }

    fn mark_now(&mut self, label: &str) {
        self.mark(self.narrator.start().elapsed().as_secs_f64(), label);
    }

    /// Resident memory, after a stretch of the picture.
    fn rss(&self) -> Result<u64> {
        self.sampler.dwell()?;
        host::rss(self.monitor.pid())
    }

    fn free_pages(&self) -> Result<Metrics> {
        Ok(self.api.lazy()?.part("free_pages"))
    }

    /// Writes a file in memory.
    fn write(&mut self, name: &str, from: &str, bytes: u64) -> Result<()> {
        let count = bytes / MIB;
        let command = format!("dd if=/dev/{from} of=/mnt/{name} bs=1M count={count} 2>/dev/null");
        self.guest.must(&command).map(drop)
    }

    fn checksum(&mut self) -> Result<String> {
        self.guest.must("sha256sum /mnt/kept")
    }

    fn guest_works(&mut self) -> Result<String> {
        self.mark_now("a job in the guest uses memory, and frees it");
        self.guest
            .must("mkdir -p /mnt && mount -t tmpfs -o size=900M tmpfs /mnt")?;
        self.write("kept", "urandom", KEPT)?;
        let kept = self.checksum()?;
        self.write("job", "zero", FREED)?;
        self.found.rss[0] = self.rss()?;
        self.guest.must("rm /mnt/job")?;
        self.found.rss[1] = self.rss()?;
        let text = format!("a job uses {} and frees it; nobody is told", Size(FREED));
        self.narrator.say("guest", text);
        let text = format!(
            "host: Ebb's resident memory (RSS) stays at {}",
            Size(self.found.rss[1])
        );
        self.narrator.more(text);
        Ok(kept)
    }

    /// A neighbour moves in, who takes a piece whenever there is one below the limit.
    fn neighbour_wants_memory(&mut self) -> Result<()> {
        self.mark_now("a neighbour on the host wants memory");
        // What the monitor has read of its files is the kernel's to drop, and no part of the story.
        std::fs::write("/proc/sys/vm/drop_caches", "1").context("drop_caches")?;
        let limit = self.cgroup.number("memory.current")? + HEADROOM;
        self.cgroup.set("memory.high", limit)?;
        let mut neighbour = Neighbour::within(&self.cgroup)?;
        // It waits for as long as any step of a test may take; what it has got by then is what the story is about.
        let served = until("the neighbour has what it wants", LONG, || {
            while self.cgroup.number("memory.current")? + PIECE <= limit {
                neighbour.grow()?;
                self.got.fetch_add(PIECE, Ordering::Relaxed);
                if self.got.load(Ordering::Relaxed) >= WANTED {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        });
        if let Err(error) = served {
            println!("{error}");
        }
        self.found.neighbour_got = self.got.load(Ordering::Relaxed);
        self.found.rss[2] = self.rss()?;
        self.found.taken_for_neighbour = self.free_pages()?["taken_bytes_total"];
        let text = format!(
            "a neighbour wants {} and gets {}: {} of it were free in the guest",
            Size(WANTED),
            Size(self.found.neighbour_got),
            Size(self.found.taken_for_neighbour)
        );
        self.narrator.say("host", text);
        drop(neighbour);
        self.got.store(0, Ordering::Relaxed);
        self.cgroup.set("memory.high", "max")
    }

    /// The operator asks for all.
    fn host_takes_the_rest(&mut self) -> Result<()> {
        self.mark_now("an operator asks for all that is free");
        let outcome = self.api.reclaim(GUEST_MEMORY);
        let outcome = outcome.map_err(|error| self.monitor.explain(error))?;
        self.found.rss[3] = self.rss()?;
        let state = self.free_pages()?;
        self.found.left = state["resident_bytes"];
        self.found.taken = state["taken_bytes_total"];
        let text = format!(
            "asks for all that is free and gets {} more; RSS is {}",
            Size(outcome.reclaimed_bytes),
            Size(self.found.rss[3])
        );
        self.narrator.say("host", text);
        Ok(())
    }

    fn guest_works_again(&mut self, kept: &str) -> Result<()> {
        self.mark_now("the guest uses its memory again");
        self.write("job", "zero", FREED)?;
        self.found.rss[4] = self.rss()?;
        self.found.intact = self.checksum()? == kept;
        let state = self.api.lazy()?;
        self.found.handed_over = state["freed_bytes_total"];
        let free_pages = state.part("free_pages");
        self.found.pauses = free_pages["pauses_total"];
        self.found.missed = free_pages["missed_total"];
        let text = if self.found.intact {
            "uses all its memory again; what it kept is what it was"
        } else {
            "has lost data"
        };
        self.narrator.say("guest", text);
        Ok(())
    }

    fn end(mut self) -> Result<Outcome> {
        self.guest.send("exit")?;
        self.monitor.wait()?;
        self.found.samples = self.sampler.finish();
        Ok(Outcome::new(self.found))
    }
}
