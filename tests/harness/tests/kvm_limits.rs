//! Ends that helpers cannot outlive, or not all of them: what is left of the machine then, and that its memory is free.

use std::time::{Duration, Instant};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::idle::{Place, signal_to};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until_often};
use rustix::process::Signal;

/// Two batches, so that the reaper would free them.
const MEMORY: &str = "size=512M,thp=off,prefault=on";

/// Waits until the cgroup's processes have given their memory back, and says how long it took.
fn until_free(cgroup: &Cgroup, what: &str, start: Instant) -> Result<()> {
    until_often("the memory is free", LONG, || {
        Ok((cgroup.number("memory.current")? < 64 * MIB).then_some(()))
    })?;
    println!("{what}: 512 MiB are free after {:?}", start.elapsed());
    Ok(())
}

/// What is left in the place of a machine, by name.
fn litter(place: &Place) -> Result<Vec<String>> {
    let name = |path: &std::path::PathBuf| Some(path.file_name()?.to_string_lossy().into_owned());
    let mut names: Vec<_> = place.litter()?.iter().filter_map(name).collect();
    names.sort();
    Ok(names)
}

/// The same machine starts in the place of what was left, and ends without a trace.
fn starts_again(place: &Place) -> Result<()> {
    assert!(place.ctl(&["wait", "--memory-free"])?.status.success());
    let mut idle = place.running(MEMORY, "on")?;
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    place.vanished(LONG)
}

/// A machine that outgrows its limit: the OOM killer ends the monitor and the reaper, which share the memory. The guardian has
/// memory of its own.
#[test]
fn the_guardian_outlives_an_oom_kill_and_cleans_up() -> Result<()> {
    let (place, cgroup) = (Place::new()?, Cgroup::new("oom")?);
    cgroup.set("memory.max", 300 * MIB)?;
    let start = Instant::now();
    let mut idle = place.start_in(&cgroup, MEMORY, "on")?;
    assert_eq!(idle.wait()?, None);
    until_free(&cgroup, "start and OOM kill", start)?;
    place.vanished(LONG)?;
    let (events, log) = (cgroup.text("memory.events")?, place.text("log"));
    assert!(!events.contains("oom_kill 0\n"), "{events}");
    assert!(log.contains("was killed"), "{log}");
    starts_again(&place)
}

/// Nobody is left who could remove the socket and the lock's file, and nobody tells. The next machine takes their place.
#[test]
fn a_killed_cgroup_leaves_two_files() -> Result<()> {
    let (place, cgroup) = (Place::new()?, Cgroup::new("kill")?);
    let mut idle = place.running_in(&cgroup, MEMORY, "on")?;
    let start = Instant::now();
    cgroup.set("cgroup.kill", 1)?;
    assert_eq!(idle.wait()?, None);
    until_free(&cgroup, "cgroup.kill", start)?;
    until_often("all are dead", LONG, || {
        Ok(place.relatives()?.is_empty().then_some(()))
    })?;
    assert_eq!(litter(&place)?, ["api", "api.memory"]);
    assert!(!place.text("log").contains("was killed"));
    starts_again(&place)
}

/// `KillMode=control-group`: SIGTERM for every process of the unit. It has ended when its cgroup is empty.
#[test]
fn a_unit_that_ends_as_a_control_group_leaves_nothing() -> Result<()> {
    let (place, cgroup) = (Place::new()?, Cgroup::new("unit")?);
    let mut idle = place.running_in(&cgroup, MEMORY, "on")?;
    let start = Instant::now();
    for pid in cgroup.members()? {
        signal_to(pid, Signal::TERM);
    }
    assert_eq!(idle.wait()?, Some(0));
    until_often("the unit has ended", LONG, || {
        Ok(cgroup.members()?.is_empty().then_some(()))
    })?;
    until_free(&cgroup, "KillMode=control-group", start)?;
    let log = place.text("log");
    assert!(log.contains("teardown: freed"), "{log}");
    place.vanished(Duration::ZERO)
}

/// `KillMode=mixed`: SIGTERM for the monitor, and once that has ended SIGKILL for the others.
#[test]
fn a_unit_whose_helpers_are_killed_leaves_the_lock() -> Result<()> {
    let (place, cgroup) = (Place::new()?, Cgroup::new("mixed")?);
    let mut idle = place.running_in(&cgroup, MEMORY, "on")?;
    let mut helpers = cgroup.members()?;
    helpers.retain(|pid| *pid != idle.pid());
    let to_helpers = |signal| helpers.iter().for_each(|pid| signal_to(*pid, signal));
    // So they have not done their work before they are killed.
    to_helpers(Signal::STOP);
    let start = Instant::now();
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait()?, Some(0));
    to_helpers(Signal::KILL);
    until_free(&cgroup, "KillMode=mixed", start)?;
    until_often("all are dead", LONG, || {
        Ok(place.relatives()?.is_empty().then_some(()))
    })?;
    assert_eq!(litter(&place)?, ["api.memory"]);
    let log = place.text("log");
    assert!(!log.contains("teardown: freed"), "{log}");
    starts_again(&place)
}
