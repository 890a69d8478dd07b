//! The monitor in an ordinary container: podman and crun, no privileges, /dev/kvm passed in.

use ebb_harness::container::{Container, USER};
use ebb_harness::error::{Context, Result};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Images, Launch};

/// The container's limit.
const LIMIT: u64 = 288 * MIB;
/// What the guest uses and hands over, twice. With what it keeps and its kernel it is more than the limit.
const EACH: u64 = 128 * MIB;
const ROUNDS: u64 = 2;

/// A value of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).context("status")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    Ok(line.context(format_args!("no {name}"))?.to_owned())
}

#[test]
fn a_container_without_privileges_runs_a_guest_whose_lazy_memory_makes_room_below_its_limit()
-> Result<()> {
    let ebb = Images::from_environment()?.ebb;
    let container = Container::new(&ebb, LIMIT)?;
    let launch = Launch::new()?.contained(&container)?;
    let launch = launch.memory("size=512M").option("--balloon", "size=0");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let pid = container.pid()?;
    assert!(status(pid, "Uid")?.starts_with(&USER.to_string()));
    assert_eq!(status(pid, "CapBnd")?, "0000000000000000");
    assert_eq!(status(pid, "NoNewPrivs")?, "1");
    assert_eq!(
        container.cgroup_file("memory.max")?.trim(),
        LIMIT.to_string()
    );

    let api = monitor.api();
    let checksum = guest.checksum("keep 32M")?;
    for round in 1..=ROUNDS {
        guest.ask("fill 128M")?;
        guest.ask("drop")?;
        api.set_balloon(round * EACH)?;
        until("the guest hands its memory over", LONG, || {
            Ok((api.balloon()?.actual_mib == round * EACH / MIB).then_some(()))
        })?;
    }
    let (state, events) = (api.lazy()?, container.cgroup_file("memory.events")?);
    let explained = format!("{state:?}\n{events}{}", monitor.log());
    assert!(events.contains("\noom_kill 0\n"), "{explained}");
    assert!(state["reclaimed_bytes_total"] > 0, "{explained}");
    assert!(state["pressure_events_total"] > 0, "{explained}");
    assert_eq!(guest.checksum("verify")?, checksum);
    container.stop()?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    container.vanished()
}
