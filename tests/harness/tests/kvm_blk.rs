//! Disks whose requests are under way several at a time: what a guest writes is what it reads, also past all caches, after
//! the monitor was killed, and when the host changes the disk or pauses the machine.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ebb_harness::error::{Context, Result};
use ebb_harness::{Error, Guest, Launch, Monitor};
use rustix::process::Signal;
use serde_json::json;

/// Keys of each disk: `/dev/vda` and so on.
const DISKS: [(&str, &str); 3] = [
    ("vda", "engine=io_uring,queues=2"),
    ("vdb", "engine=io_uring,direct=on"),
    ("vdc", "engine=threads,direct=on"),
];

/// A file of `mib` MiB with holes only.
fn image(path: &Path, mib: u64) -> Result<()> {
    let file = File::create(path).context("disk")?;
    file.set_len(mib << 20).context("disk")
}

/// Bytes that the host has set aside for a file.
fn room(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).context(path.display())?.blocks() * 512)
}

/// Three disks that survive the machine, and one without content.
fn launch(folder: &Path) -> Result<Launch> {
    let mut launch = Launch::new()?.cpus(2);
    for (name, keys) in DISKS {
        let path = folder.join(name);
        launch = launch.option("--disk", &format!("path={},{keys}", path.display()));
    }
    let placeholder = folder.join("placeholder");
    image(&placeholder, 0)?;
    Ok(launch
        .disk(&placeholder, false)
        .option("--allow-paths", &folder.display().to_string()))
}

/// Four writers at once, each with a file of its own, and then all of it read again past the guest's cache.
fn write_and_verify(guest: &mut Guest, folder: &str) -> Result<()> {
    let said = guest.must(&format!(
        "cd {folder} && for n in 1 2 3 4; do \
         (dd if=/dev/urandom of=w$n bs=64k count=24 conv=fsync && sha256sum <w$n >sum$n) 2>/dev/null & done; wait; \
         for n in 1 2 3 4; do (dd if=w$n bs=4k iflag=direct 2>/dev/null | sha256sum >now$n) & done; wait; \
         for n in 1 2 3 4; do cmp sum$n now$n && echo same; done; cd /"
    ))?;
    if said.matches("same").count() == 4 {
        return Ok(());
    }
    Err(Error::new(format!("{folder}: {said}")))
}

/// The host gets back what a file system does not need any more.
fn trim(guest: &mut Guest, folder: &str, path: &Path) -> Result<()> {
    let before = room(path)?;
    guest.must(&format!("rm {folder}/w* && sync && fstrim {folder}"))?;
    let after = room(path)?;
    assert!(after + (3 << 20) < before, "{folder}: {before} to {after}");
    Ok(())
}

/// A disk gets content, and grows, while the machine runs.
fn fill_placeholder(monitor: &Monitor, guest: &mut Guest, folder: &Path) -> Result<()> {
    let other = folder.join("other");
    image(&other, 1)?;
    assert_eq!(guest.must("cat /sys/block/vdd/size")?, "0");
    let drive = json!({ "drive_id": "disk3", "path_on_host": other });
    monitor.api().must("PATCH", "/drives/disk3", &drive)?;
    guest.must("until [ $(cat /sys/block/vdd/size) = 2048 ]; do :; done")?;
    image(&other, 3)?;
    let asked = monitor.ctl(&["disk", "disk3"])?;
    assert!(asked.status.success(), "{asked:?}");
    guest.must("until [ $(cat /sys/block/vdd/size) = 6144 ]; do :; done")?;
    guest.must("dmesg | grep -q 'vdd.*new size'")?;
    guest.must("echo content | dd of=/dev/vdd conv=fsync 2>/dev/null")?;
    assert!(fs::read(&other).context("other")?.starts_with(b"content\n"));
    let outside = json!({ "path_on_host": "/etc/passwd" });
    let refused = monitor.api().must("PATCH", "/drives/disk3", &outside);
    assert!(
        format!("{refused:?}").contains("--allow-paths"),
        "{refused:?}"
    );
    Ok(())
}

#[test]
fn every_engine_keeps_data_gives_room_back_and_survives_a_kill() -> Result<()> {
    let folder = tempfile::tempdir().context("folder")?;
    let paths: Vec<PathBuf> = DISKS.map(|(name, _)| folder.path().join(name)).into();
    for path in &paths {
        image(path, 64)?;
    }
    let mut monitor = launch(folder.path())?.start()?;
    let mut guest = monitor.guest()?;
    assert_eq!(guest.must("ls /sys/block/vda/mq | wc -l")?, "2");
    fill_placeholder(&monitor, &mut guest, folder.path())?;
    for ((name, _), path) in DISKS.iter().zip(&paths) {
        let at = format!("/mnt/{name}");
        guest.must(&format!(
            "mke2fs -F -b 4096 /dev/{name} && mkdir -p {at} && mount -t ext4 /dev/{name} {at}"
        ))?;
        write_and_verify(&mut guest, &at).map_err(|error| monitor.explain(error))?;
        trim(&mut guest, &at, path)?;
        guest.must(&format!(
            "cd {at} && dd if=/dev/urandom of=kept bs=64k count=16 2>/dev/null && sha256sum kept >sum && sync && cd /"
        ))?;
    }
    // In the middle of further writes the machine rests, and is killed.
    guest.must(
        "for d in a b c; do (while dd if=/dev/zero of=/mnt/vd$d/more bs=64k count=64 conv=fsync; do :; done) \
         >/dev/null 2>&1 & done; until [ -s /mnt/vdc/more ]; do :; done",
    )?;
    let api = monitor.api();
    api.must("PATCH", "/vm", &json!({ "state": "Paused" }))?;
    let content = || -> Result<Vec<Vec<u8>>> {
        paths
            .iter()
            .map(|path| fs::read(path).context("read"))
            .collect()
    };
    let before = content()?;
    assert!(
        before == content()?,
        "a disk changes while the machine is paused"
    );
    api.must("PATCH", "/vm", &json!({ "state": "Resumed" }))?;
    guest.must("rm /mnt/vda/more && sync")?;
    monitor.signal(Signal::KILL)?;
    let killed = monitor.wait().expect_err("it was killed").to_string();
    assert!(killed.contains("SIGKILL"), "{killed}");
    // A successor gets the disks at once, with all that was synchronized.
    let mut monitor = launch(folder.path())?.start()?;
    let mut guest = monitor.guest()?;
    for (name, _) in DISKS {
        let at = format!("/mnt/{name}");
        guest.must(&format!(
            "mkdir -p {at} && mount -t ext4 /dev/{name} {at} && cd {at} && sha256sum -c sum && cd / && umount {at}"
        ))?;
    }
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
