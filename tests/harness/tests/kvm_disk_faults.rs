//! Disks that fail a stock guest: the guest sees errors, or waits, and everything else goes on.
//!
//! | The disk | Outcome |
//! |---|---|
//! | fails each read and write (`EIO`) | the guest's request fails; when the disk is well again, so are requests |
//! | is full (`ENOSPC`) | the guest's write fails, what it had written is there |
//! | answers nothing for 5 s | the guest's request takes as long; other disks, the API and the console go on |
//! | answers nothing, and the machine is told to stop | its vCPUs stop at once; the monitor ends when the host's kernel has the answer, and leaves nothing |
//!
//! In the last case nothing can end sooner: the host's kernel holds the thread that waits for the disk, also if it is
//! killed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use ebb_harness::error::{Context, Result};
use ebb_harness::small::SmallFileSystem;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Error, Guest, Launch, figure};
use rustix::process::Signal;

const SIZE: u64 = 16 << 20;
/// How long the disk answers nothing.
const STALL: Duration = Duration::from_secs(5);
/// What the guest reads and writes, past its caches.
const READ: &str = "bs=4k count=1 iflag=direct of=/dev/null";
const WRITE: &str = "bs=4k count=1 oflag=direct if=/dev/zero conv=notrunc,fsync";

/// Runs a program of the host's that must succeed, and returns what it printed.
fn host(words: &[&str]) -> Result<String> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.context(words[0])?;
    if !output.status.success() {
        return Err(Error::new(format!("{words:?}: {output:?}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A disk that can be made to fail: a mapped device over a file.
struct BadDisk {
    name: String,
    under: String,
}

impl BadDisk {
    fn new(file: &Path) -> Result<Self> {
        File::create(file)
            .and_then(|file| file.set_len(SIZE))
            .context(file.display())?;
        let under = host(&["losetup", "--find", "--show", &file.to_string_lossy()])?;
        let name = format!("ebb-test-{}", std::process::id());
        let disk = Self { name, under };
        disk.dm(&["create", "--table", &disk.well()])?;
        Ok(disk)
    }

    /// The kernel itself makes this path, where there is no udev, too.
    fn path(&self) -> Result<PathBuf> {
        let ask = "dmsetup info --columns --noheadings -o blkdevname";
        let words: Vec<&str> = ask.split(' ').chain([self.name.as_str()]).collect();
        Ok(Path::new("/dev").join(host(&words)?))
    }

    /// `dmsetup` for it. There is no udev that would answer.
    fn dm(&self, words: &[&str]) -> Result<()> {
        let (verb, rest) = words.split_first().context("no words")?;
        let words = [&["dmsetup", verb, "--noudevsync", &self.name], rest].concat();
        host(&words).map(drop)
    }

    fn well(&self) -> String {
        format!("0 {} linear {} 0", SIZE / 512, self.under)
    }

    /// From now on it is as this table says.
    fn becomes(&self, table: &str) -> Result<()> {
        self.dm(&["load", "--table", table])?;
        self.dm(&["resume"])
    }

    fn stalls(&self) -> Result<()> {
        self.dm(&["suspend", "--noflush", "--nolockfs"])
    }

    fn goes_on(&self) -> Result<()> {
        self.dm(&["resume"])
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        // What waits for it must not do so for ever.
        let _ = self.goes_on();
        let _ = self.dm(&["remove", "--retry"]);
        let _ = host(&["losetup", "--detach", &self.under]);
    }
}

/// A disk for whose content there is less room than it needs.
fn disk_without_room(room: &SmallFileSystem) -> Result<PathBuf> {
    let path = room.path().join("disk");
    let file = File::create(&path).context(path.display())?;
    file.set_len(SIZE).context(path.display())?;
    Ok(path)
}

fn fails(guest: &mut Guest, command: &str) -> Result<()> {
    let (status, said) = guest.shell(command)?;
    assert_ne!(status, "0", "{command}: {said}");
    Ok(())
}

fn good_disk_works(guest: &mut Guest) -> Result<()> {
    guest.must(&format!("dd if=/dev/vdb {READ}"))?;
    guest.must(&format!("dd of=/dev/vdb {WRITE}")).map(drop)
}

#[test]
fn a_guest_survives_its_disks_faults() -> Result<()> {
    let (launch, small) = (Launch::new()?, SmallFileSystem::new(SIZE / 4)?);
    let bad = BadDisk::new(&launch.folder().join("under"))?;
    let (good, full) = (launch.folder().join("good"), disk_without_room(&small)?);
    fs::write(&good, vec![0; SIZE as usize]).context("make a disk")?;
    let (bad_path, full_path) = (bad.path()?, full.clone());
    let launch = launch.disk(&bad_path, false).disk(&good, false);
    let mut monitor = launch.disk(&full_path, false).start()?;
    let mut guest = monitor.guest()?;
    let (read, write) = (
        format!("dd if=/dev/vda {READ}"),
        format!("dd of=/dev/vda {WRITE}"),
    );
    guest.must(&read)?;
    guest.must(&write)?;

    bad.becomes(&format!("0 {} error", SIZE / 512))?;
    fails(&mut guest, &format!("{read} skip=100"))?;
    fails(&mut guest, &format!("{write} seek=100"))?;
    good_disk_works(&mut guest)?;
    bad.becomes(&bad.well())?;
    guest.must(&format!("{read} skip=200"))?;
    guest.must(&format!("{write} seek=200"))?;

    let fill = "dd if=/dev/zero of=/dev/vdc bs=1M oflag=direct conv=notrunc,fsync";
    guest.must(&format!("{fill} count=2"))?;
    fails(&mut guest, &format!("{fill} count=8 seek=2"))?;
    guest.must("dd if=/dev/vdc of=/dev/null bs=1M count=2 iflag=direct")?;
    good_disk_works(&mut guest)?;

    bad.stalls()?;
    guest.must(&format!(
        "({read} skip=300; echo $? >/tmp/stalled) >/dev/null 2>&1 &"
    ))?;
    thread::sleep(STALL);
    fails(&mut guest, "test -e /tmp/stalled")?;
    good_disk_works(&mut guest)?;
    monitor.api().get("/")?;
    bad.goes_on()?;
    let ended = "while ! test -s /tmp/stalled; do sleep 0.1; done; cat /tmp/stalled";
    assert_eq!(guest.must(ended)?, "0");

    bad.stalls()?;
    guest.must(&format!("{read} skip=400 >/dev/null 2>&1 &"))?;
    guest.must("sleep 1")?;
    monitor.signal(Signal::TERM)?;
    until("its vCPU has stopped", LONG, || {
        let tasks = fs::read_dir(format!("/proc/{}/task", monitor.pid())).context("threads")?;
        let mut names = tasks
            .flatten()
            .map(|it| fs::read_to_string(it.path().join("comm")));
        let runs = names.any(|name| name.is_ok_and(|name| name.starts_with("ebb-vcpu")));
        Ok((!runs).then_some(()))
    })?;
    bad.goes_on()?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert!(!monitor.socket().exists());
    figure("disk_faults", 4);
    Ok(())
}
