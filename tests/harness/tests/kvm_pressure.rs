//! A host that is short of memory takes what the guest has handed over, and nothing else.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ebb_harness::api::Metrics;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::host::meminfo;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Api, Guest, Launch, Monitor};
use serde_json::json;

/// The guest hands 160 MiB over, lazily. Returns what the API says then.
fn hand_over(guest: &mut Guest, api: &Api) -> Result<Metrics> {
    guest.ask("fill 160M")?;
    guest.ask("drop")?;
    api.set_balloon(160 * MIB)?;
    until("the guest hands its memory over", LONG, || {
        Ok(Some(api.lazy()?).filter(|state| state["lazy_bytes"] == 160 * MIB))
    })
}

/// The monitor's own cgroup is over its limit: lazy memory goes, first while the guest rests, then while it needs more.
#[test]
fn a_cgroup_over_its_limit_takes_lazy_memory() -> Result<()> {
    let cgroup = Cgroup::new("over")?;
    let launch = Launch::new()?
        .within(&cgroup)
        .memory("size=512M")
        .option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    assert!(cgroup.members()?.contains(&monitor.pid()));
    let api = monitor.api();
    let checksum = guest.checksum("keep 64M")?;
    let before = hand_over(&mut guest, &api)?;
    // The guest rests, so nothing stalls: the monitor must see by itself that the limit is reached. Only a little over
    // it, because far over it the kernel makes every thread of a cgroup sleep, those that free memory too.
    let limit = cgroup.number("memory.current")? - 4 * MIB;
    cgroup.set("memory.high", limit)?;
    let taken = until("the host takes lazy memory", LONG, || {
        Ok(Some(api.lazy()?["reclaimed_bytes_total"]).filter(|taken| *taken >= 64 * MIB))
    })?;
    guest.ask("fill 96M")?;
    let after = until("the host takes more of it", LONG, || {
        Ok(Some(api.lazy()?).filter(|state| state["reclaimed_bytes_total"] > taken))
    })?;
    assert!(
        after["pressure_events_total"] > before["pressure_events_total"],
        "{before:?} {after:?}"
    );
    assert_eq!(after["discard_failures_total"], 0, "{after:?}");

    cgroup.set("memory.high", 4096 * MIB)?;
    guest.ask("drop")?;
    api.set_balloon(0)?;
    until("the guest takes its memory back", LONG, || {
        let state = api.lazy()?;
        Ok((state["lazy_bytes"] + state["discarded_bytes"] == 0).then_some(()))
    })?;
    assert_eq!(guest.checksum("verify")?, checksum);
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// A limit of 60 % of what the guest uses over time, and more than it uses at any one time: it lives, because what it has
/// handed over is taken before the OOM killer comes. (Beyond the limit it is killed: `kvm_limits`.)
#[test]
fn a_guest_lives_with_less_memory_than_it_uses_over_time() -> Result<()> {
    const ROUNDS: u64 = 3;
    let cgroup = Cgroup::new("less")?;
    let launch = Launch::new()?
        .within(&cgroup)
        .memory("size=1G")
        .option("--balloon", "size=0");
    let folder = launch.folder().canonicalize().context("the folder")?;
    let launch = launch.option("--allow-paths", &folder.to_string_lossy());
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let checksum = guest.checksum("keep 32M")?;
    let need = cgroup.number("memory.current")? + ROUNDS * EACH;
    cgroup.set("memory.max", need / 10 * 6)?;
    for round in 1..=ROUNDS {
        use_and_hand_over(&mut guest, &api, round)?;
    }
    let (state, events) = (api.lazy()?, cgroup.text("memory.events")?);
    assert!(events.contains("\noom_kill 0\n"), "{events}");
    let must_go = need - need / 10 * 6;
    assert!(
        state["reclaimed_bytes_total"] >= must_go,
        "{state:?} of {need}, {events}"
    );
    cgroup.set("memory.max", "max")?;
    api.set_balloon(0)?;
    assert_eq!(guest.checksum("verify")?, checksum);
    guest.ask("fill 320M")?;
    restored_with_less(&mut monitor, &checksum)?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

const EACH: u64 = 160 * MIB;

/// The guest uses [`EACH`] for the time number `round`, and hands it over.
fn use_and_hand_over(guest: &mut Guest, api: &Api, round: u64) -> Result<()> {
    guest.ask("fill 160M")?;
    guest.ask("drop")?;
    api.set_balloon(round * EACH)?;
    until("the guest hands its memory over", LONG, || {
        Ok((api.balloon()?.actual_mib == round * EACH / MIB).then_some(()))
    })
}

/// The guest goes on from a snapshot, in a cgroup that may have less than is in the memory file, and lives: what it hands
/// over is taken, also what it has not read since.
fn restored_with_less(monitor: &mut Monitor, checksum: &str) -> Result<()> {
    let path = |name: &str| monitor.folder().join(name);
    let (state, memory) = (path("state"), path("memory"));
    let [to_state, to_memory] = [&state, &memory].map(|it| it.to_string_lossy());
    let saved = monitor.ctl(&["snapshot", "--state", &to_state, "--memory", &to_memory])?;
    assert!(saved.status.success(), "{saved:?}");
    let file = fs::metadata(&memory).context("the memory file")?.blocks() * 512;
    monitor.kill_and_restore(&[])?;
    let api = monitor.api();
    until("it is restored", LONG, || {
        Ok(api
            .get("/")
            .is_ok_and(|it| it["state"] == "Paused")
            .then_some(()))
    })?;
    let cgroup = Cgroup::new("restored")?;
    cgroup.set("cgroup.procs", monitor.pid())?;
    let limit = file / 10 * 7;
    cgroup.set("memory.max", limit)?;
    let resumed = api.must("PATCH", "/vm", &json!({ "state": "Resumed" }));
    resumed.map_err(|error| {
        let events = cgroup.text("memory.events");
        monitor.explain(Error::new(format!("{error}, {file}, {events:?}")))
    })?;
    let mut guest = monitor.restored_guest()?;
    guest.ask("drop")?;
    for round in 2..=5 {
        use_and_hand_over(&mut guest, &api, round)?;
    }
    let (state, events) = (api.lazy()?, cgroup.text("memory.events")?);
    assert!(events.contains("\noom_kill 0\n"), "{events}");
    assert!(
        state["reclaimed_bytes_total"] >= 4 * EACH - limit,
        "{state:?} {file}"
    );
    cgroup.set("memory.max", "max")?;
    api.set_balloon(0)?;
    assert_eq!(guest.checksum("verify")?, checksum);
    guest.ask("exit").map(drop)
}

/// A limit above the monitor's own cgroup comes near: lazy memory goes before anything stalls.
#[test]
fn a_cgroup_near_its_limit_takes_lazy_memory_before_anything_stalls() -> Result<()> {
    let above = Cgroup::new("above")?;
    let own = above.below("own")?;
    let launch = Launch::new()?
        .within(&own)
        .memory("size=512M")
        .option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    assert!(own.members()?.contains(&monitor.pid()));
    let api = monitor.api();
    let before = hand_over(&mut guest, &api)?;
    assert_eq!(before["pressure_events_total"], 0, "{before:?}");

    // The watermark is a quarter of such a limit: more than what is left.
    above.set("memory.high", above.number("memory.current")? + 16 * MIB)?;
    let after = until("the host takes lazy memory", LONG, || {
        Ok(Some(api.lazy()?).filter(|state| state["reclaimed_bytes_total"] >= 32 * MIB))
    })?;
    assert!(after["pressure_events_total"] > 0, "{after:?}");
    let events = above.text("memory.events")?;
    assert!(
        events.contains("\nhigh 0\n"),
        "nobody was over the limit: {events}"
    );

    above.set("memory.high", 4096 * MIB)?;
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Another process in the monitor's cgroup takes memory up to the limit for a moment, far shorter than the time between
/// two samples. The kernel says so, and the monitor hears it.
#[test]
fn a_spike_to_the_limit_is_heard_whenever_samples_are_taken() -> Result<()> {
    let cgroup = Cgroup::new("spike")?;
    let launch = Launch::new()?
        .within(&cgroup)
        .memory("size=512M")
        .option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let before = hand_over(&mut guest, &api)?;
    assert_eq!(before["limit_events_total"], 0, "{before:?}");
    cgroup.set("memory.high", cgroup.number("memory.current")? + 16 * MIB)?;
    // So near its limit the monitor may take all of the lazy memory first: the spike is larger than that and the room together.
    let mut spike = cgroup.command(Path::new("dd"));
    let spike = spike.args(["if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"]);
    assert!(spike.status().context("dd")?.success());
    let after = until("the monitor hears of it", LONG, || {
        Ok(Some(api.lazy()?).filter(|state| state["limit_events_total"] > 0))
    });
    let after = after.context(format_args!(
        "{:?}\n{before:?}\n{}{}{}",
        api.lazy(),
        cgroup.text("memory.events")?,
        cgroup.text("memory.high")?,
        cgroup.text("memory.current")?
    ))?;
    println!("{after:?} {}", cgroup.text("memory.pressure")?);
    until("the host takes lazy memory", LONG, || {
        Ok((api.lazy()?["reclaimed_bytes_total"] >= 16 * MIB).then_some(()))
    })?;
    cgroup.set("memory.high", 4096 * MIB)?;
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Pages of 2 MiB that the host keeps for hugetlb; as before at the end.
struct HugePages(String);

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(count: u64) -> Result<Self> {
        let before = fs::read_to_string(NR_HUGEPAGES).context(NR_HUGEPAGES)?;
        let reserved = Self(before);
        let free = Self::free()?;
        let total: u64 = reserved.0.trim().parse().ok().context(NR_HUGEPAGES)?;
        fs::write(
            NR_HUGEPAGES,
            (total + count.saturating_sub(free)).to_string(),
        )
        .context(NR_HUGEPAGES)?;
        Ok(reserved)
    }

    fn free() -> Result<u64> {
        meminfo("HugePages_Free")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The host may refuse, and then keeps the pages: nothing that a test can mend.
        let _ = fs::write(NR_HUGEPAGES, &self.0);
    }
}

/// A stock guest whose memory is in files hands memory over, loses it, takes it back, and misses nothing.
#[test]
fn memory_in_files_is_taken_and_given_back() -> Result<()> {
    // The host's own count of such memory moves with the files of other tests.
    let cgroup = Cgroup::new("files")?;
    let launch = Launch::new()?
        .within(&cgroup)
        .memory("size=384M,shared=on,thp=off")
        .option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let checksum = guest.checksum("keep 64M")?;
    guest.ask("fill 160M")?;
    guest.ask("drop")?;
    let touched = cgroup.shmem()?;
    api.set_balloon(160 * MIB)?;
    until("the guest hands its memory over", LONG, || {
        Ok((api.lazy()?["lazy_bytes"] == 160 * MIB).then_some(()))
    })?;
    assert!(
        cgroup.shmem()? + 16 * MIB >= touched,
        "lazily: nothing is gone"
    );
    let taken = api.reclaim(160 * MIB)?.reclaimed_bytes;
    assert_eq!(taken, 160 * MIB);
    let freed = touched.saturating_sub(cgroup.shmem()?);
    assert!(freed >= 128 * MIB, "{freed} bytes are free again");
    api.set_balloon(0)?;
    until("the guest takes its memory back", LONG, || {
        let state = api.lazy()?;
        Ok((state["lazy_bytes"] + state["discarded_bytes"] == 0).then_some(()))
    })?;
    guest.ask("fill 160M")?;
    assert_eq!(guest.checksum("verify")?, checksum);
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// hugetlb pages go back to the host's pool whole, and come back zeroed and usable.
#[test]
fn hugetlb_pages_are_taken_and_given_back() -> Result<()> {
    let _reserved = HugePages::reserve(192)?;
    let free = HugePages::free()?;
    assert!(free >= 192, "the host has only {free} free pages of 2 MiB");
    let launch = Launch::new()?
        .memory("size=384M,hugepages=on")
        .option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let api = monitor.api();
    let checksum = guest.checksum("keep 64M")?;
    guest.ask("fill 160M")?;
    guest.ask("drop")?;
    let touched = HugePages::free()?;
    api.set_balloon(160 * MIB)?;
    until("the guest hands its memory over", LONG, || {
        Ok((api.lazy()?["lazy_bytes"] == 160 * MIB).then_some(()))
    })?;
    // The guest may touch a page for the first time meanwhile.
    let lazy = HugePages::free()?;
    assert!(lazy <= touched, "lazily: nothing is back in the pool");
    let taken = api.reclaim(160 * MIB)?.reclaimed_bytes;
    let freed = HugePages::free()?.saturating_sub(lazy) * 2 * MIB;
    assert!(
        freed >= 96 * MIB && freed <= taken,
        "{taken} bytes taken, {freed} in the pool"
    );
    api.set_balloon(0)?;
    until("the guest takes its memory back", LONG, || {
        let state = api.lazy()?;
        Ok((state["lazy_bytes"] + state["discarded_bytes"] == 0).then_some(()))
    })?;
    guest.ask("fill 160M")?;
    assert_eq!(guest.checksum("verify")?, checksum);
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    let end = HugePages::free()?;
    assert_eq!(end, free, "every page is back in the pool");
    Ok(())
}
