//! virtio-blk with the stock driver.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ebb_harness::error::{Context, Result};
use ebb_harness::strace::Watching;
use ebb_harness::{Guest, Launch, Monitor};

const DISK: usize = 16 << 20;

/// Bytes that differ from sector to sector.
fn pattern(seed: usize) -> Vec<u8> {
    (0..DISK)
        .map(|at| ((at / 512 + seed) % 251) as u8)
        .collect()
}

/// A disk's content, read in the guest past its caches.
fn sum(guest: &mut Guest, device: &str) -> Result<String> {
    guest.must(&format!(
        "dd if={device} bs=1M iflag=direct 2>/dev/null | sha256sum"
    ))
}

/// A file's checksum, by the host's own program.
fn host_sum(path: &Path) -> Result<String> {
    let file = File::open(path).context(path.display())?;
    let mut command = std::process::Command::new("sha256sum");
    let output = command.stdin(file).output().context("sha256sum")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn disks_are_read_written_flushed_and_fail() -> Result<()> {
    let launch = Launch::new()?;
    let (writable, readonly) = (launch.folder().join("rw"), launch.folder().join("ro"));
    fs::write(&writable, pattern(0)).context("write a disk")?;
    fs::write(&readonly, pattern(1)).context("write a disk")?;
    // By threads, whose system calls can be watched.
    let threads = format!("path={},engine=threads", writable.display());
    let launch = launch.option("--disk", &threads).disk(&readonly, true);
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;

    assert_eq!(
        guest.must("cat /sys/block/vda/size")?,
        (DISK / 512).to_string()
    );
    assert_eq!(
        guest.must("cat /sys/block/vda/queue/write_cache")?,
        "write back"
    );
    assert_eq!(sum(&mut guest, "/dev/vda")?, host_sum(&writable)?);
    assert_eq!(sum(&mut guest, "/dev/vdb")?, host_sum(&readonly)?);

    write_and_flush(&mut guest, &writable)?;
    flush_reaches_the_host(&monitor, &mut guest)?;
    refuse_to_write(&mut guest, &readonly)?;
    fail_beyond_the_end(&mut guest, &writable)?;

    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

/// Scattered and big writes arrive, and a file system lives on the disk.
fn write_and_flush(guest: &mut Guest, path: &Path) -> Result<()> {
    let small = "dd if=/dev/urandom of=/dev/vda bs=512 count=1 conv=fsync,notrunc";
    for seek in [0, 1, 4097, DISK / 512 - 1] {
        guest.must(&format!("{small} seek={seek}"))?;
    }
    let big = "dd if=/dev/urandom of=/dev/vda bs=1M seek=3 count=8 conv=fsync,notrunc oflag=direct";
    guest.must(big)?;
    assert_eq!(sum(guest, "/dev/vda")?, host_sum(path)?);
    let (file, mounted) = ("/mnt/file", "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt");
    guest.must(&format!("mke2fs -F /dev/vda && {mounted}"))?;
    let before = guest.must(&format!(
        "dd if=/dev/urandom of={file} bs=64k count=50 conv=fsync && sha256sum {file}"
    ))?;
    guest.must("umount /mnt")?;
    let after = guest.must(&format!("{mounted} && sha256sum {file} && umount /mnt"))?;
    assert!(
        before.ends_with(&after) && after.contains(file),
        "{before} / {after}"
    );
    Ok(())
}

/// What the guest has flushed is in the host's page cache in any case: only the system call tells that it was flushed.
fn flush_reaches_the_host(monitor: &Monitor, guest: &mut Guest) -> Result<()> {
    let write = "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct";
    for (flags, flushed) in [("conv=notrunc", false), ("conv=notrunc,fsync", true)] {
        let watching = Watching::start(monitor.pid(), monitor.folder(), "fdatasync")?;
        guest.must(&format!("{write} {flags}"))?;
        let calls = watching.finish(&[])?;
        let of_disk = |call: &String| call.contains("/rw>) ") && call.ends_with("= 0");
        assert_eq!(calls.iter().any(of_disk), flushed, "{flags}: {calls:?}");
    }
    Ok(())
}

fn refuse_to_write(guest: &mut Guest, path: &Path) -> Result<()> {
    assert_eq!(guest.must("cat /sys/block/vdb/ro")?, "1");
    let (status, output) = guest.shell("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync")?;
    assert_ne!(status, "0", "{output}");
    assert!(
        fs::read(path).context(path.display())? == pattern(1),
        "a read-only disk was written"
    );
    Ok(())
}

/// The host takes half of the disk away: what is gone fails, the rest works on.
fn fail_beyond_the_end(guest: &mut Guest, path: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .context(path.display())?;
    file.write_all_at(b"still here", 0)
        .context("write to the disk")?;
    file.set_len(DISK as u64 / 2).context("cut the disk")?;
    let read = "dd if=/dev/vda bs=4k count=1 iflag=direct";
    let (status, output) = guest.shell(&format!("{read} skip=3000 of=/dev/null"))?;
    assert!(
        status != "0" && output.contains("Input/output error"),
        "{status} {output}"
    );
    assert_eq!(
        guest.must(&format!("{read} 2>/dev/null | head -c 10"))?,
        "still here"
    );
    Ok(())
}
