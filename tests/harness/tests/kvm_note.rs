//! How the monitor learns where a guest kernel's vmcoreinfo note is, and that the kernel has gone.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Launch, Monitor};

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
    let release = launch.images().release.clone();
    let mut monitor = launch.system().start()?;
    let ended = monitor.console.wait_for("EBB-SYSTEM end", PATIENCE);
    ended.map_err(|error| monitor.explain(error))?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    let read = format!("{READ} release=\"{release}\" source=FwCfg");
    assert_eq!(lines(&monitor, &read), 1, "{}", monitor.log());
    Ok(())
}

/// A guest with kexec, and the kernel that it is to start.
fn with_kexec(vmlinuz: &Path, initramfs: &Path) -> Result<(Monitor, Guest)> {
    let launch = Launch::new()?.memory("size=768M").cpus(2);
    let images = launch.images().clone();
    let (folder, archive) = (launch.folder().join("kexec"), launch.folder().join("tar"));
    fs::create_dir(&folder).context("make a folder")?;
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/kexec.py");
    let files = [
        (&*program, "kexec.py"),
        (vmlinuz, "vmlinuz"),
        (initramfs, "initramfs"),
    ];
    for (from, to) in files {
        fs::copy(from, folder.join(to)).context(from.display())?;
    }
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(&folder).arg(".");
    assert!(tar.status().context("tar")?.success());
    let launch = launch.disk(&images.root_disk, true).disk(&archive, true);
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    guest.must(
        "mkdir /debian && mount -t ext4 -o ro /dev/vda /debian && mount -t tmpfs tmpfs /debian/tmp \
         && mount -o bind /proc /debian/proc && mount -o bind /sys /debian/sys \
         && tar -xf /dev/vdb -C /debian/tmp",
    )?;
    Ok((monitor, guest))
}

/// The guest replaces its kernel. The note must be gone by then, and that of the new kernel counts.
fn replace_kernel(vmlinuz: &Path, initramfs: &Path, release: &str) -> Result<()> {
    let (mut monitor, mut guest) = with_kexec(vmlinuz, initramfs)?;
    let old = guest.must("uname -r")?;
    guest.must(LOAD)?;
    logged(&monitor, READ, 1)?;
    assert!(monitor.log().contains(old.trim_end_matches("\\n")));
    assert_eq!(lines(&monitor, LOST), 0, "{}", monitor.log());
    let kexec = "chroot /debian python3 /tmp/kexec.py /tmp/vmlinuz /tmp/initramfs";
    guest.send(&format!(
        "sh {kexec} \"$(cat /proc/cmdline)\" >/dev/console 2>&1"
    ))?;
    // The first line of the new kernel's first program.
    let started = guest.console.wait_for("EBB-GUEST-READY", PATIENCE);
    started.map_err(|error| monitor.explain(error))?;
    let log = monitor.log();
    let why = format!("{LOST} why=a vCPU has left the kernel");
    assert_eq!(log.matches(&why).count(), 1, "{log}");
    assert_eq!(log.matches(READ).count(), 1, "{log}");
    guest.console.wait_for("EBB-GUEST-OK ready", LONG)?;
    assert!(guest.must("uname -r")?.starts_with(release));
    assert_eq!(lines(&monitor, READ), 1, "{}", monitor.log());
    guest.must(LOAD)?;
    logged(&monitor, READ, 2)?;
    let log = monitor.log();
    let last = log.lines().rfind(|line| line.contains(READ));
    let read = format!("release=\"{release}");
    assert!(last.is_some_and(|line| line.contains(&read)), "{log}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    Ok(())
}

#[test]
fn kexec_into_the_same_kernel_ends_a_note() -> Result<()> {
    let images = Launch::new()?.images().clone();
    replace_kernel(&images.vmlinuz, &images.initramfs, &images.release)
}

#[test]
fn kexec_into_another_kernel_ends_a_note() -> Result<()> {
    let images = Launch::new()?.images().clone();
    replace_kernel(&images.other_vmlinuz, &images.other_initramfs, "6.1.")
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

#[test]
fn the_agent_tells_where_the_note_is() -> Result<()> {
    let launch = Launch::new()?;
    let release = launch.images().release.clone();
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let told = guest.must("ebb-guest note")?;
    let read = format!("{READ} release=\"{release}\" source=Hypercall");
    assert_eq!(lines(&monitor, &read), 1, "{told}\n{}", monitor.log());
    // Where the file is missing.
    let (status, said) = guest.shell("mount -t tmpfs tmpfs /sys && ebb-guest note 2>&1")?;
    assert_eq!(status, "1", "{said}");
    assert!(said.contains("CONFIG_VMCORE_INFO"), "{said}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    Ok(())
}

#[test]
fn strict_mode_reads_no_free_lists() -> Result<()> {
    let mut monitor = Launch::new()?.option("--lazy", "strict=on").start()?;
    let mut guest = monitor.guest()?;
    let (status, said) = guest.shell("ebb-guest note 2>&1")?;
    assert_eq!(status, "1", "{said}");
    assert!(said.contains("does not read free lists"), "{said}");
    guest.send("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.console.tail());
    Ok(())
}
