//! Machines that end in every way there is, and what is left of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ebb_harness::Images;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::host::kvm_counters;
use ebb_harness::idle::{Idle, Place, Relative, signal_to};
use ebb_harness::wait::{LONG, until, until_often};
use rustix::process::Signal;

/// Two batches, so that the reaper frees them.
const MEMORY: &str = "size=512M,thp=off,prefault=on";

/// How long something may be left of a killed machine; what is emulated is more than ten times as slow.
fn soon() -> Result<Duration> {
    let nested = Images::from_environment()?.platform == "nested";
    Ok(Duration::from_secs(if nested { 20 } else { 2 }))
}

/// The process of a machine that has this name.
fn find(place: &Place, name: &str) -> Result<u32> {
    let all = place.relatives()?;
    let one = all.iter().find(|relative| relative.name == name);
    Ok(one.context(format_args!("{name} among {all:?}"))?.pid)
}

fn names(all: &[Relative]) -> Vec<&str> {
    all.iter().map(|relative| relative.name.as_str()).collect()
}

fn teardowns(place: &Place) -> usize {
    place.text("log").matches("teardown: freed").count()
}

#[test]
fn a_stop_is_visible_before_memory_is_free() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running("size=1G,thp=off,prefault=on", "on")?;
    assert_eq!(
        names(&place.relatives()?),
        ["ebb", "ebb-guardian", "ebb-reaper"]
    );
    let guardian = find(&place, "ebb-guardian")?;
    let (own, all) = (
        ebb_harness::host::own(guardian)?,
        ebb_harness::host::rss(guardian)?,
    );
    println!("the guardian: {own} bytes of its own, {all} with those that it shares");
    // What it has in common with the monitor costs nothing, and how much that is is up to the page cache.
    assert!(own <= 512 << 10, "the guardian takes {own} bytes");
    assert!(place.ctl(&["stop"])?.status.success());
    assert_eq!(idle.wait()?, Some(0));
    assert!(!place.path("api").exists() && place.path("api.memory").exists());
    assert_eq!(teardowns(&place), 0, "the end is seen first");
    // The same machine starts beside what is being freed.
    let mut next = place.running(MEMORY, "on")?;
    next.signal(Signal::TERM);
    assert_eq!(next.wait()?, Some(0));
    assert!(place.ctl(&["wait", "--memory-free"])?.status.success());
    assert_eq!(place.relatives()?, []);
    place.vanished(soon()?)?;
    assert_eq!(place.text("stderr"), "");
    // Nothing to wait for is no error.
    assert!(place.ctl(&["wait", "--memory-free"])?.status.success());
    Ok(())
}

#[test]
fn the_teardown_is_tuned_while_the_machine_runs() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running(MEMORY, "on")?;
    for words in [
        ["teardown", "workers=0"],
        ["teardown", "batch=0"],
        ["teardown", "workers=65"],
    ] {
        let output = place.ctl(&words)?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    assert_eq!(
        place.ctl(&["teardown", "worker=2"])?.status.code(),
        Some(35)
    );
    assert!(
        place
            .ctl(&["teardown", "workers=3", "batch=64M"])?
            .status
            .success()
    );
    let said = String::from_utf8_lossy(&place.ctl(&["teardown"])?.stdout).into_owned();
    assert_eq!(
        said,
        "3 workers in batches of 64 MiB, behind the monitor's end\n"
    );
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    place.vanished(soon()?)?;
    let log = place.text("log");
    assert!(log.contains("with 3 workers"), "{log}");
    let freed = log.split("teardown: freed ").nth(1).context("a line")?;
    let freed: u64 = freed
        .split(' ')
        .next()
        .and_then(|it| it.parse().ok())
        .context("bytes")?;
    assert!(freed >= 500 << 20, "{log}");
    Ok(())
}

/// Files without a name, behind memory that others could share: gone with the machine, whoever ends it.
#[test]
fn memory_in_files_is_freed_as_fast_and_as_surely() -> Result<()> {
    const MEMORY: &str = "size=512M,thp=off,prefault=on,shared=on";
    let place = Place::new()?;
    let cgroup = Cgroup::new("files")?;
    for (guardian, end) in [
        ("on", Signal::TERM),
        ("on", Signal::KILL),
        ("off", Signal::TERM),
    ] {
        let case = format!("--guardian {guardian}, {end:?}");
        let mut idle = place.running_in(&cgroup, MEMORY, guardian)?;
        let touched = cgroup.shmem()?;
        assert!(touched >= 500 << 20, "{case}: {touched}");
        // Bigger than a file, and smaller: no two workers may meet in one.
        assert!(place.ctl(&["teardown", "batch=4M"])?.status.success());
        idle.signal(end);
        idle.wait()?;
        place.vanished(soon()?)?;
        let log = place.text("log");
        let line = log.split_once("teardown: freed ").context(&case)?.1;
        let bytes = line.split(' ').next().and_then(|it| it.parse().ok());
        let bytes: u64 = bytes.context(&case)?;
        assert!(bytes >= 500 << 20, "{case}: {log}");
        assert!(line.contains("with 2 workers"), "{case}: {log}");
        assert!(!log.contains("batches went"), "{case}: {log}");
        let left = cgroup.shmem()?;
        assert!(left < 64 << 20, "{case}: {left}");
    }
    Ok(())
}

#[test]
fn the_teardown_is_tuned_while_memory_is_being_freed() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running("size=1G,thp=off,prefault=on", "on")?;
    let slowly = ["teardown", "workers=2", "batch=4M"];
    assert!(place.ctl(&slowly)?.status.success());
    assert!(place.ctl(&["stop"])?.status.success());
    assert_eq!(idle.wait()?, Some(0));
    let asked = place.ctl(&["teardown", "workers=5"])?;
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert!(
        asked.status.success() && said.starts_with("the machine has ended"),
        "{asked:?} {}",
        place.text("log")
    );
    place.vanished(soon()?)?;
    let log = place.text("log");
    assert!(log.contains("with 5 workers"), "{log}");
    // Now there is nobody who could hear it.
    assert_eq!(
        place.ctl(&["teardown", "workers=5"])?.status.code(),
        Some(1)
    );
    Ok(())
}

/// Each thread of a process and the processors that it may run on.
fn affinities(pid: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let of = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let line = |name| status.lines().find_map(|line| line.strip_prefix(name));
        let processors = line("Cpus_allowed_list:")?.trim().to_owned();
        Some((task.file_name().into_string().ok()?, processors))
    };
    tasks.filter_map(|task| of(task.ok()?)).collect()
}

/// Where there are several memory nodes (`EBB_NESTED_NODES=2`), they are bound to one each; else to none.
#[test]
fn the_workers_of_a_killed_machine_are_spread_over_the_memory_nodes() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running("size=1G,thp=off,prefault=on", "on")?;
    assert!(
        place
            .ctl(&["teardown", "workers=8", "batch=2M"])?
            .status
            .success()
    );
    let allowed = affinities(std::process::id()).swap_remove(0).1;
    let reaper = find(&place, "ebb-reaper")?;
    let node = |node| format!("/sys/devices/system/node/node{node}");
    let nodes = (0..64).filter(|it| fs::exists(node(*it)).is_ok_and(|is_there| is_there));
    let nodes = nodes.count();
    idle.signal(Signal::KILL);
    // The last that was seen of each thread: one that has just begun is not bound yet.
    let mut seen = BTreeMap::new();
    until_often("the memory is free", LONG, || {
        let now = affinities(reaper);
        let is_over = now.is_empty();
        seen.extend(now);
        Ok(is_over.then_some(()))
    })?;
    assert!(seen.len() > 2, "{seen:?}");
    let lists: BTreeSet<_> = seen.values().collect();
    if nodes == 1 {
        assert_eq!(lists, BTreeSet::from([&allowed]), "{seen:?}");
    } else {
        let bound = lists.into_iter().filter(|list| **list != allowed);
        assert_eq!(bound.count(), nodes, "{allowed} {seen:?}");
    }
    assert_eq!(idle.wait()?, None);
    place.vanished(soon()?)
}

#[test]
fn without_a_guardian_the_monitor_frees_its_memory_itself() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running(MEMORY, "off")?;
    assert_eq!(names(&place.relatives()?), ["ebb"]);
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    assert_eq!(teardowns(&place), 1);
    place.vanished(Duration::ZERO)
}

#[test]
fn a_machine_survives_its_helpers() -> Result<()> {
    let place = Place::new()?;
    // Without its reaper the monitor frees its memory itself.
    let mut idle = place.running(MEMORY, "on")?;
    signal_to(find(&place, "ebb-reaper")?, Signal::KILL);
    sleep(Duration::from_millis(200));
    assert!(place.ctl(&["status"])?.status.success());
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    assert_eq!(teardowns(&place), 1);
    place.vanished(soon()?)?;
    // Without the guardian memory is freed, but nobody tells; the lock is nobody's and is removed by who waits.
    let mut idle = place.running(MEMORY, "on")?;
    signal_to(find(&place, "ebb-guardian")?, Signal::KILL);
    sleep(Duration::from_millis(200));
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    assert!(place.ctl(&["wait", "--memory-free"])?.status.success());
    place.vanished(soon()?)
}

#[test]
fn a_hundred_signals_are_one_teardown() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running(MEMORY, "on")?;
    let helpers = [find(&place, "ebb-reaper")?, find(&place, "ebb-guardian")?];
    for _ in 0..100 {
        idle.signal(Signal::TERM);
        helpers.iter().for_each(|pid| signal_to(*pid, Signal::TERM));
        sleep(Duration::from_millis(1));
    }
    assert_eq!(idle.wait()?, Some(0));
    place.vanished(soon()?)?;
    let log = place.text("log");
    assert_eq!(log.matches("machine ends").count(), 1, "{log}");
    assert_eq!(teardowns(&place), 1, "{log}");
    Ok(())
}

#[test]
fn a_killed_monitor_is_reported_and_freed() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running(MEMORY, "on")?;
    idle.signal(Signal::KILL);
    assert_eq!(idle.wait()?, None);
    place.vanished(soon()?)?;
    let (log, said) = (place.text("log"), place.text("stderr"));
    // With the signal's number, unless the parent has taken it before.
    assert!(log.contains("was killed"), "{log}");
    assert!(
        said.starts_with("ebb: machine ebb: ") && said.lines().count() == 1,
        "{said}"
    );
    assert_eq!(teardowns(&place), 1, "{log}");
    Ok(())
}

/// Else each piece of memory that is freed would first be taken out of the dead machine's second-level tables.
#[test]
fn the_machine_in_kvm_goes_before_its_memory() -> Result<()> {
    let place = Place::new()?;
    let mut idle = place.running("size=1G,thp=off,prefault=on", "on")?;
    let pid = find(&place, "ebb")?;
    let there = |pid| kvm_counters(pid).is_ok();
    until("the guest runs", LONG, || {
        Ok((kvm_counters(pid)?.exits > 0).then_some(()))
    })?;
    idle.signal(Signal::KILL);
    until_often("KVM destroys the machine", soon()?, || {
        Ok((!there(pid)).then_some(()))
    })?;
    let left = place.relatives()?;
    assert!(names(&left).contains(&"ebb-reaper"), "{left:?}");
    assert_eq!(idle.wait()?, None);
    place.vanished(soon()?)
}

/// A number below `most`, never the same sequence twice in a program's run.
fn random(most: u64) -> u64 {
    let mut bytes = [0; 8];
    let read = fs::File::open("/dev/urandom");
    read.and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .unwrap();
    u64::from_ne_bytes(bytes) % most.max(1)
}

/// Kills the monitor on its way to the end, and then the reaper, wherever it is by then. What else can be killed when, and
/// that the machine starts again at once, is `kvm_restart`'s.
#[test]
fn nothing_is_left_whenever_the_reaper_is_killed() -> Result<()> {
    const POINTS: u32 = 20;
    // In three batches the reaper frees it after a stop, too.
    const MEMORY: &str = "size=96M,thp=off,prefault=on";
    let (place, limit) = (Place::new()?, soon()?);
    let running = || -> Result<Idle> {
        let idle = place.running(MEMORY, "on")?;
        let output = place.ctl(&["teardown", "batch=32M"])?;
        assert!(output.status.success(), "{output:?}");
        Ok(idle)
    };
    let mut idle = running()?;
    let start = Instant::now();
    idle.signal(Signal::TERM);
    idle.wait()?;
    place.vanished(limit)?;
    let whole = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    for point in 0..POINTS {
        let mut idle = running()?;
        let reaper = find(&place, "ebb-reaper")?;
        idle.signal(Signal::TERM);
        sleep(Duration::from_micros(random(whole)));
        idle.signal(Signal::KILL);
        sleep(Duration::from_micros(random(whole / 2)));
        signal_to(reaper, Signal::KILL);
        idle.wait()?;
        place
            .vanished(limit)
            .context(format_args!("point {point}\n{}", place.text("log")))?;
    }
    // And it starts as if nothing had happened.
    let mut idle = running()?;
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    until_often("the log tells", LONG, || {
        Ok((teardowns(&place) == 1).then_some(()))
    })
}
