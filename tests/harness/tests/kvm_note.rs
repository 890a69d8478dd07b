//! How the monitor learns where a guest kernel's vmcoreinfo note is, and that the kernel has gone.

use std::time::Duration;

use ebb_harness::error::Result;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor};

/// An emulated processor takes 20 s to boot a Debian, and minutes if it has other work.
const PATIENCE: Duration = Duration::from_secs(400);
/// Loads the driver that udev loads in a Debian.
const LOAD: &str = "while read -r module; do insmod $module; done </etc/modules.note";
const READ: &str = "free lists are read";
const LOST: &str = "free lists are not read any more";

/// Number of lines with `part` in the monitor's log.
fn lines(monitor: &Monitor, part: &str) -> usize {
    monitor.log().matches(part).count()
}

/// Waits until the monitor has logged `count` lines with `part`.
fn logged(monitor: &Monitor, part: &str, count: usize) -> Result<()> {
    let what = format!("{count} times {part:?} in the log");
    let seen = until(what, LONG, || {
        Ok((lines(monitor, part) >= count).then_some(()))
    });
    seen.map_err(|error| monitor.explain(error))
}

#[test]
fn a_stock_debian_tells_by_itself() -> Result<()> {
    let launch = Launch::new()?;
    let (disk, initramfs, release) = {
        let images = launch.images();
        let (disk, initramfs) = (&images.system_disk, &images.system_initramfs);
        (disk.clone(), initramfs.clone(), images.release.clone())
    };
    let launch = launch.initramfs(&initramfs).disk(&disk, true);
    let launch = launch.cmdline("root=/dev/vda ro").memory("size=768M");
    let mut monitor = launch.start()?;
    let ended = monitor.console.wait_for("EBB-SYSTEM end", PATIENCE);
    ended.map_err(|error| monitor.explain(error))?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    let read = format!("{READ} release=\"{release}\" source=FwCfg");
    assert_eq!(lines(&monitor, &read), 1, "{}", monitor.log());
    Ok(())
}

#[test]
fn a_cpu_that_comes_back_ends_a_note() -> Result<()> {
    let mut monitor = Launch::new()?.cpus(4).start()?;
    let mut guest = monitor.guest()?;
    guest.must(LOAD)?;
    logged(&monitor, READ, 1)?;
    let online = "/sys/devices/system/cpu/cpu3/online";
    guest.must(&format!("echo 0 >{online}"))?;
    guest.must(&format!("echo 1 >{online}"))?;
    logged(&monitor, LOST, 1)?;
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    Ok(())
}
