//! Blocks that are mapped by huge pages: taken by the guest's free lists, and as lazily freed blocks from the balloon; as
//! much of each, from one guest, in turn.

use ebb_harness::error::{Context, Result};
use ebb_harness::free_pages::{counters, read_free_lists};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Api, Guest, Launch};

use super::Arguments;
use crate::results::{Metric, Results};

const MEMORY: &str = "size=1G";
/// What the guest touches and frees.
const TOUCHED_MIB: u64 = 640;
/// What is taken at a time.
const TAKEN_MIB: u64 = 256;
/// More than that: the balloon does not consist of whole blocks only.
const BALLOON_MIB: u64 = 384;

const RATE: Metric = ("rate", "MiB/s");
const CASE: &str = "blocks";

/// Measures both in turn; another one is first each time.
pub fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    let launch = Launch::new()?.memory(MEMORY).cpus(1);
    let launch = launch.option("--balloon", "size=0");
    let launch = launch.option("--lazy", "pause=20000,share=50");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    read_free_lists(&monitor, &mut guest)?;
    let api = monitor.api();
    for run in 0..arguments.runs {
        for way in 0..2 {
            if (run + way) % 2 == 0 {
                by_free_lists(&api, &mut guest, results)?;
            } else {
                by_blocks(&api, &mut guest, results)?;
            }
        }
        eprintln!("free-pages: speed, run {} of {}", run + 1, arguments.runs);
    }
    let rates = |system| [system, CASE, RATE.0];
    results.divide_rounds("take_speed", rates("free-lists"), rates("lazy-blocks"))
}

/// Has the guest touch and free its memory.
fn touch(guest: &mut Guest) -> Result<()> {
    guest.ask(&format!("fill {TOUCHED_MIB}M"))?;
    guest.ask("drop").map(drop)
}

/// Takes, and adds the rate. `by_lists`: all of it must come from the free lists, or nothing.
fn take(system: &str, by_lists: bool, api: &Api, results: &mut Results) -> Result<()> {
    let before = counters(api)?["taken_bytes_total"];
    let done = api.reclaim(TAKEN_MIB * MIB)?;
    let taken = counters(api)?["taken_bytes_total"] - before;
    let expected = if by_lists { done.reclaimed_bytes } else { 0 };
    let is_so = taken == expected && done.reclaimed_bytes >= TAKEN_MIB * MIB;
    is_so.then_some(()).context(format_args!(
        "{system}: {done:?}, {taken} bytes by free lists"
    ))?;
    let rate = done.reclaimed_bytes as f64 / done.duration_us as f64 * 1e6 / MIB as f64;
    results.add((system, CASE), RATE, rate);
    Ok(())
}

fn by_free_lists(api: &Api, guest: &mut Guest, results: &mut Results) -> Result<()> {
    touch(guest)?;
    let before = counters(api)?;
    take("free-lists", true, api, results)?;
    let after = counters(api)?;
    let pauses = after["pauses_total"] - before["pauses_total"];
    results.add(("free-lists", CASE), ("pauses", ""), pauses as f64);
    Ok(())
}

fn by_blocks(api: &Api, guest: &mut Guest, results: &mut Results) -> Result<()> {
    touch(guest)?;
    set_balloon(api, BALLOON_MIB)?;
    take("lazy-blocks", false, api, results)?;
    set_balloon(api, 0)
}

fn set_balloon(api: &Api, mib: u64) -> Result<()> {
    api.set_balloon(mib * MIB)?;
    until("the balloon", LONG, || {
        Ok((api.balloon()?.actual_mib == mib).then_some(()))
    })
}
