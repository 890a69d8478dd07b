//! A Debian in a guest that has an arena, and programs of its own that run there with their heap in it.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::wait::LONG;
use crate::{Guest, Launch, Monitor};

/// Where the guest has the Debian.
const ROOT: &str = "/debian";
/// What is packed from the folder of the binaries.
const BINARIES: [&str; 4] = ["libebb_malloc.so", "ebb-blocks", "ebb-cases", "ebb-churn"];
/// What is packed from `tests/harness/programs`.
const SCRIPTS: [&str; 6] = [
    "redis-client.py",
    "redis-demo.sh",
    "redis-speed.sh",
    "redis.sh",
    "suites.py",
    "vsock.py",
];

/// A running machine, and its Debian.
pub struct Debian {
    /// The monitor.
    pub monitor: Monitor,
    /// The guest's shell, outside the Debian.
    pub guest: Guest,
}

impl Debian {
    /// Starts a machine with an arena of 8 GiB, and makes it ready for programs.
    ///
    /// # Errors
    /// The machine does not start, or the guest cannot do what is needed.
    pub fn start(vcpus: u32) -> Result<Self> {
        let launch = Launch::new()?.memory("size=1G").cpus(vcpus);
        let mut debian = Self::boot(launch.option("--arena", "size=8G"))?;
        debian.guest.must("ebb-guest setup --mode 0666")?;
        Ok(debian)
    }

    /// Starts a machine as it is described, with the Debian in it.
    ///
    /// # Errors
    /// As for [`Debian::start`].
    pub fn boot(launch: Launch) -> Result<Self> {
        let (images, archive) = (launch.images(), launch.folder().join("programs"));
        pack(&images.ebb, &archive)?;
        let disk = images.root_disk.clone();
        let mut monitor = launch.disk(&disk, true).disk(&archive, true).start()?;
        let mut guest = monitor.guest()?;
        guest.must(&format!(
            "mkdir -p {ROOT} && mount -t ext4 -o ro /dev/vda {ROOT} && mount -t tmpfs tmpfs {ROOT}/tmp"
        ))?;
        for folder in ["dev", "proc", "sys"] {
            guest.must(&format!("mount -o bind /{folder} {ROOT}/{folder}"))?;
        }
        guest.must(&format!(
            "tar -xf /dev/vdb -C {ROOT}/tmp && cp /bin/ebb-guest {ROOT}/tmp"
        ))?;
        Ok(Self { monitor, guest })
    }

    /// A path of the Debian as the guest's own shell sees it.
    #[must_use]
    pub fn path(path: &str) -> String {
        format!("{ROOT}{path}")
    }

    /// Runs a program of the Debian's; what it printed, with `\n` for line ends.
    ///
    /// # Errors
    /// It fails, or the guest does.
    pub fn run(&mut self, program: &str) -> Result<String> {
        self.run_within(program, LONG)
    }

    /// As [`Debian::run`], for programs that may take as long as `limit`.
    ///
    /// # Errors
    /// The same.
    pub fn run_within(&mut self, program: &str, limit: Duration) -> Result<String> {
        let command = format!("chroot {ROOT} {program} 2>&1");
        let output = self.guest.must_within(&command, limit);
        let output = output.map_err(|error| self.monitor.explain(error))?;
        Ok(output.trim_end_matches("\\n").to_owned())
    }

    /// Does `work` while the monitor is asked for all that is free, again and again; how often it was.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn under_reclaim<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<(T, u64)> {
        let (done, asked, api) = (
            AtomicBool::new(false),
            AtomicU64::new(0),
            self.monitor.api(),
        );
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // It may end before it hears us.
                    if api.reclaim(8 << 30).is_ok() {
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                    thread::sleep(Duration::from_millis(50));
                }
            });
            let result = work(self);
            done.store(true, Ordering::Relaxed);
            Ok((result?, asked.load(Ordering::Relaxed)))
        })
    }

    /// As [`Debian::run`], for a program that never forks, with its heap in the arena.
    ///
    /// # Errors
    /// The same.
    pub fn run_on_arena(&mut self, program: &str) -> Result<String> {
        self.run(&format!("/tmp/ebb-guest run --no-fork -- {program}"))
    }

    /// Powers the guest off.
    ///
    /// # Errors
    /// The machine does not end as it should.
    pub fn end(mut self) -> Result<()> {
        self.guest.send("exit")?;
        match self.monitor.wait()? {
            0 => Ok(()),
            code => Err(Error::new(format!("ebb ends with {code}"))),
        }
    }
}

/// Packs what the guest needs beside Debian, to be read from a disk.
fn pack(monitor: &Path, archive: &Path) -> Result<()> {
    let folder = monitor.parent().context("a folder of binaries")?;
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(archive);
    tar.arg("-C").arg(folder).args(BINARIES);
    tar.arg("-C").arg(programs).args(SCRIPTS);
    let output = tar.output().context("run tar")?;
    let said = String::from_utf8_lossy(&output.stderr);
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| Error::new(format!("tar: {said}")))
}
