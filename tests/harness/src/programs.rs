//! A Debian with systemd and programs (resources/programs.txt), for a guest of any monitor.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::free_pages::{await_free_lists, counters};
use crate::size::MIB;
use crate::{Api, Guest, Images, Launch};

/// The mode of the guest's init.
pub const MODE: &str = "root";
/// More words for the guest's kernel.
pub const CMDLINE: &str = "ebb.root=overlay systemd.show_status=false";
/// Where the guest has the scripts of `tests/harness/programs`.
pub const FOLDER: &str = "/run/programs";

/// What is packed from there.
const SCRIPTS: [&str; 2] = ["footprint.sh", "programs.sh"];
/// The file system for what the guest writes.
const SCRATCH: u64 = 2048 * MIB;
/// More than there is.
const ALL: u64 = 1 << 40;
/// How long a part may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// The guest's disks, in their order: the Debian, what is written, the scripts, and a file to read.
#[derive(Clone, Debug)]
pub struct Disks {
    /// Path, and whether it is read-only.
    pub all: Vec<(PathBuf, bool)>,
}

impl Disks {
    /// Makes them in a folder, the last one with so many bytes of zeroes.
    ///
    /// # Errors
    /// There is no room, or a program is missing.
    pub fn make(images: &Images, folder: &Path, bytes: u64) -> Result<Self> {
        let [scratch, scripts, file] = ["scratch", "scripts", "file"].map(|it| folder.join(it));
        for (path, bytes) in [(&scratch, SCRATCH), (&file, bytes)] {
            let made = File::create(path).and_then(|file| file.set_len(bytes));
            made.context(path.display())?;
        }
        let mut format = Command::new("/sbin/mke2fs");
        format.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal"]);
        must(format.arg(&scratch))?;
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&scripts).arg("-C");
        tar.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("programs"));
        must(tar.args(SCRIPTS))?;
        let image = images.program_disk.clone();
        let all = vec![
            (image, true),
            (scratch, false),
            (scripts, true),
            (file, true),
        ];
        Ok(Self { all })
    }

    /// The same for Ebb.
    #[must_use]
    pub fn attach(&self, launch: Launch) -> Launch {
        let disks = self.all.iter();
        let launch = disks.fold(launch, |launch, (path, readonly)| {
            launch.disk(path, *readonly)
        });
        launch.mode(MODE).cmdline(CMDLINE)
    }
}

/// Gives the guest its scripts.
///
/// # Errors
/// The guest cannot read its disk.
pub fn unpack(guest: &mut Guest) -> Result<()> {
    let command = format!("mkdir {FOLDER} && tar -xf /dev/vdc -C {FOLDER}");
    guest.must(&command).map(drop)
}

fn must(command: &mut Command) -> Result<()> {
    let output = command.stdout(Stdio::null()).output();
    let output = output.context(format_args!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| Error::new(format!("{command:?}: {said}")))
}

/// A part of the checked programs: its name in `programs.sh`, and how much of it is one.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// How much it does in a short run.
    pub size: u32,
}

/// All of them.
pub const PARTS: [Part; 4] = [
    Part {
        name: "compile",
        size: 3,
    },
    Part {
        name: "redis",
        size: 6000,
    },
    Part {
        name: "apt",
        size: 2,
    },
    Part {
        name: "postgresql",
        size: 20,
    },
];

/// What a part has shown while the free lists were taken as fast as they can be.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The part.
    pub part: Part,
    /// What its programs have found wrong; `None` if all is as it should be.
    pub wrong: Option<String>,
    /// What they say they have checked.
    pub said: String,
    /// Orders to take everything.
    pub orders: u64,
    /// Bytes that were taken by the free lists.
    pub taken: u64,
    /// How long it took.
    pub time: Duration,
}

/// Runs the programs `times` as long as in a short run, in a machine of so many vCPUs, whose free lists are taken without a
/// break. `each` is told as soon as a part is done.
///
/// # Errors
/// The machine does not start, or ends otherwise than by a power-off; not for what the programs find.
pub fn run(
    parts: &[Part],
    (times, vcpus): (u32, u32),
    mut each: impl FnMut(&Checked),
) -> Result<Vec<Checked>> {
    let launch = Launch::new()?.memory("size=768M").cpus(vcpus);
    let disks = Disks::make(launch.images(), launch.folder(), MIB)?;
    let launch = disks.attach(launch);
    let launch = launch.option("--lazy", "mode=pressure,pause=20000,share=50");
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    unpack(&mut guest)?;
    // Its udev has loaded the driver that tells where the kernel's note is.
    await_free_lists(&monitor)?;
    let api = monitor.api();
    let mut all = Vec::new();
    for part in parts {
        let done = check(*part, part.size * times, &api, &mut guest);
        let done = done.map_err(|error| monitor.explain(error))?;
        each(&done);
        all.push(done);
    }
    guest.send("exit")?;
    match monitor.wait()? {
        0 => Ok(all),
        code => Err(Error::new(format!("ebb ends with {code}: {all:?}"))),
    }
}

fn check(part: Part, size: u32, api: &Api, guest: &mut Guest) -> Result<Checked> {
    let (start, before) = (Instant::now(), counters(api)?["taken_bytes_total"]);
    let (done, orders) = (AtomicBool::new(false), AtomicU64::new(0));
    let said = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // The machine may end before it answers.
                if api.reclaim(ALL).is_ok() {
                    orders.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let command = format!("bash {FOLDER}/programs.sh {} {size}", part.name);
        let said = guest.shell_within(&command, LIMIT);
        done.store(true, Ordering::Relaxed);
        said
    });
    let (status, said) = said?;
    let good = status == "0" && said.starts_with("ok");
    Ok(Checked {
        part,
        wrong: (!good).then(|| said.clone()),
        said,
        orders: orders.into_inner(),
        taken: counters(api)?["taken_bytes_total"] - before,
        time: start.elapsed(),
    })
}

impl Checked {
    /// Whether it proves anything, and nothing is wrong.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verdict(&self) -> Result<()> {
        let nothing = (self.taken == 0).then(|| "nothing was taken by the free lists".to_owned());
        match self.wrong.clone().or(nothing) {
            None => Ok(()),
            Some(what) => Err(Error::new(format!("{}: {what}; {self:?}", self.part.name))),
        }
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, said) = (self.part.name, self.wrong.as_deref().unwrap_or(&self.said));
        write!(
            f,
            "{name}: {said}; {} orders took {} MiB; {:.1} s",
            self.orders,
            self.taken / MIB,
            self.time.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_proves_nothing_is_refused() {
        let good = Checked {
            part: PARTS[0],
            wrong: None,
            said: "ok objects=4".to_owned(),
            orders: 3,
            taken: MIB,
            time: Duration::from_secs(1),
        };
        assert!(good.verdict().is_ok());
        let idle = Checked {
            taken: 0,
            ..good.clone()
        };
        assert!(idle.verdict().is_err());
        let wrong = Checked {
            wrong: Some("wrong: the sums".to_owned()),
            ..good
        };
        let said = wrong.verdict().unwrap_err().to_string();
        assert!(said.contains("compile: wrong: the sums"), "{said}");
    }
}
