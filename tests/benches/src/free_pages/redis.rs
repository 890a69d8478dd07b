//! Redis as Debian ships it: it fills its heap and forgets everything. How much of what the guest has free, and the host
//! holds, does one order get? At once, and after the guest has compacted its memory once.

use std::time::Duration;

use ebb_harness::debian::Debian;
use ebb_harness::error::Result;
use ebb_harness::free_pages::{counters, read_free_lists};
use ebb_harness::host::rss;
use ebb_harness::wait::settled;
use ebb_harness::{Guest, Launch};

use super::Arguments;
use crate::results::{Metric, Results};

/// The guest's RAM.
const RAM: u64 = 1 << 30;
const PAGE_SIZE: u64 = 4096;
/// More than there is.
const ALL: u64 = 1 << 40;
/// Redis gives memory back to its kernel for so long after it has forgotten.
const QUIET: Duration = Duration::from_secs(12);

const SYSTEM: &str = "redis";

/// One scene for each run.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    for run in 1..=arguments.runs.div_ceil(2) {
        scene(arguments.keys, results)?;
        eprintln!("free-pages: redis, run {run}");
    }
    let share = |case| results.median(SYSTEM, case, SHARE.0).unwrap_or(0.0);
    let (at_once, compacted) = (share("at once"), share("compacted"));
    let blocks = results.median(SYSTEM, "flushed", "free-in-blocks");
    results.higher("redis_taken_share_at_once", at_once);
    results.higher("redis_taken_share", compacted);
    results.higher("redis_free_in_blocks", blocks.unwrap_or(0.0));
    results.note(
        "redis: shares of the memory that is free in the guest after FLUSHALL and that the host held before the order",
    );
    Ok(())
}

const SHARE: Metric = ("taken-share", "");

fn scene(keys: u32, results: &mut Results) -> Result<()> {
    let launch = Launch::new()?.memory("size=1G").cpus(2);
    let mut debian = Debian::boot(launch.option("--lazy", "pause=20000,share=50"))?;
    read_free_lists(&debian.monitor, &mut debian.guest)?;
    debian.run("bash /tmp/redis-demo.sh start")?;
    debian.run(&format!("python3 /tmp/redis-client.py fill a {keys}"))?;
    debian.run("bash /tmp/redis-demo.sh flush")?;
    let free = settled("the guest's free memory", QUIET, || {
        // What changes by less is not Redis.
        Ok(debian.guest.number("meminfo", "MemFree")? >> 22)
    })? << 22;
    let (pid, api) = (debian.monitor.pid(), debian.monitor.api());
    let held = rss(pid)?;
    // Free in the guest, and held by the host: all but what the host never gave, or has already.
    let held_free = free.saturating_sub(RAM.saturating_sub(held));
    let blocks = Free::read(&mut debian.guest)?.in_blocks();
    let mut add = |case, metric: Metric, value: f64| results.add((SYSTEM, case), metric, value);
    add("flushed", ("guest-free", "bytes"), free as f64);
    add("flushed", ("rss", "bytes"), held as f64);
    add("flushed", ("free-in-blocks", ""), blocks);
    let share = |rss: u64| held.saturating_sub(rss) as f64 / held_free as f64;
    api.reclaim(ALL)?;
    let left = rss(pid)?;
    add("at once", ("rss", "bytes"), left as f64);
    add("at once", SHARE, share(left));
    debian.guest.must("echo 1 >/proc/sys/vm/compact_memory")?;
    let blocks = Free::read(&mut debian.guest)?.in_blocks();
    add("compacted", ("free-in-blocks", ""), blocks);
    api.reclaim(ALL)?;
    let left = rss(pid)?;
    // What the order cannot take, as parts of what it could have taken at most.
    let rest = Free::read(&mut debian.guest)?;
    let part = |pages: u64| (pages * PAGE_SIZE) as f64 / held_free as f64;
    add("compacted", ("free-below-64-KiB", ""), part(rest.small));
    add("compacted", ("free-on-CPU-lists", ""), part(rest.on_cpus));
    add("compacted", ("free-from-64-KiB", ""), part(rest.pieces));
    // An order ends early when the vCPUs are not out in time.
    let missed = counters(&api)?["missed_total"] as f64;
    add("compacted", ("missed-pauses", ""), missed);
    add("compacted", ("rss", "bytes"), left as f64);
    add("compacted", SHARE, share(left));
    debian.run("bash /tmp/redis-demo.sh end")?;
    debian.end()
}

/// Free pages by where they are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Free {
    /// In pieces below 64 KiB.
    small: u64,
    /// In pieces from 64 KiB on that are smaller than 2 MiB.
    pieces: u64,
    /// In blocks of 2 MiB and more.
    blocks: u64,
    /// On the lists of single CPUs.
    on_cpus: u64,
}

impl Free {
    fn read(guest: &mut Guest) -> Result<Self> {
        let mut free = Self::from_buddyinfo(&guest.must("cat /proc/buddyinfo")?);
        free.on_cpus = on_cpus(&guest.must("grep count: /proc/zoneinfo")?);
        Ok(free)
    }

    fn from_buddyinfo(text: &str) -> Self {
        let mut free = Self::default();
        for line in lines(text) {
            let Some((_, counts)) = line.split_once("zone") else {
                continue;
            };
            // The zone's name comes first.
            for (order, count) in counts.split_whitespace().skip(1).enumerate() {
                let pages = count.parse::<u64>().unwrap_or(0) << order;
                match order {
                    0..4 => free.small += pages,
                    4..9 => free.pieces += pages,
                    _ => free.blocks += pages,
                }
            }
        }
        free
    }

    /// The share of blocks.
    fn in_blocks(&self) -> f64 {
        self.blocks as f64 / f64::max((self.small + self.pieces + self.blocks) as f64, 1.0)
    }
}

/// Pages on the lists of single CPUs, by the lines `count: N` of /proc/zoneinfo.
fn on_cpus(zoneinfo: &str) -> u64 {
    let counts = lines(zoneinfo).filter_map(|line| line.split_once("count:"));
    counts
        .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
        .sum()
}

/// The guest's answers have their line ends as `\n`.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split(['\n']).flat_map(|line| line.split("\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buddyinfo_tells_what_is_free_in_which_sizes() {
        let text = "Node 0, zone   DMA   512  0 0 0 2 0 0 0 0 1 1\\nNode 0, zone DMA32  512 0 0 0 0 0 0 0 0 0 1\\n";
        let free = Free::from_buddyinfo(text);
        let want = Free {
            small: 1024,
            pieces: 32,
            blocks: 2560,
            on_cpus: 0,
        };
        assert_eq!(free, want);
        assert!((free.in_blocks() - 2560.0 / 3616.0).abs() < 1e-9);
        assert!(Free::default().in_blocks() < 1e-9);
    }

    #[test]
    fn zoneinfo_tells_what_is_on_the_lists_of_cpus() {
        let text = "              count: 12\\n              count: 30\\nhigh_count: x";
        assert_eq!(on_cpus(text), 42);
    }
}
