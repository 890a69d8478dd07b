//! What must stay as it is while a guest does harm: a neighbour, disks, and the monitor as its host sees it.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::until_often;
use ebb_payload::freestanding::map::TEST_MEMORY;
use ebb_payload::script::{Kind, Scripts};
use tempfile::TempDir;

use crate::cases::{arena_options, disk, vsock};
use crate::machine::{End, Machine, Observed, PATIENCE};

/// Memory that a monitor may take in all its cases together, beyond that of its guest, which has touched all of it.
const GROWTH: u64 = 4 << 20;
/// Bytes of log: eight lines for each kind of fault, and one a second.
const LOG: u64 = 16 << 10;
const LOG_EACH_SECOND: u64 = 4 << 10;

/// The number that the neighbour's pages begin with, and how many are looked at.
const MARK: u64 = 0x6e65_6967_6862_6f72;
const PAGES: u64 = 512;

/// A neighbour and disks, and what is known of the machine that is watched.
pub struct Watch {
    folder: TempDir,
    neighbour: Machine,
    ask: u8,
    before: Option<Before>,
}

/// What a machine was before its first case.
struct Before {
    observed: Observed,
    anonymous: u64,
    log: u64,
    since: Instant,
}

/// A program of the host that reads what the guest sends, until the tests are over.
fn serve(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path).context(path.display())?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut stream, &mut io::sink()));
        }
    });
    Ok(())
}

impl Watch {
    /// Starts a neighbour that has written to all of its memory.
    pub fn start() -> Result<Self> {
        let folder = TempDir::with_prefix("ebb-hostile-disks-").context("make a folder")?;
        for name in ["disk", "readonly"] {
            fs::write(folder.path().join(name), disk::content()).context(name)?;
        }
        let mut scripts = Scripts::default();
        let fill = scripts.add(|script| {
            script.step(Kind::Fill, TEST_MEMORY, 0, (PAGES, MARK));
        });
        let ask = scripts.add(|script| {
            script
                .step(Kind::CountFilled, TEST_MEMORY, 0, (PAGES, MARK))
                .expect(PAGES);
        });
        let mut neighbour = Machine::start(&scripts, 1, &["--lazy", "mode=eager"])?;
        neighbour.run(fill, PATIENCE)?;
        Ok(Self {
            folder,
            neighbour,
            ask,
            before: None,
        })
    }

    /// Starts a machine with two disks, a balloon, a vsock and an arena, which takes memory as soon as it is free, and `more`
    /// options.
    pub fn machine(&mut self, scripts: &Scripts, vcpus: u64, more: &[&str]) -> Result<Machine> {
        let disk = format!("path={}", self.path("disk").display());
        let readonly = format!("path={},readonly=on", self.path("readonly").display());
        let vsock = format!("cid={},path=v", vsock::CID);
        let options = [
            ["--disk", &disk],
            ["--disk", &readonly],
            [
                "--balloon",
                "statistics=1,reporting=eager,deflate_on_oom=on",
            ],
            ["--vsock", &vsock],
            ["--arena", arena_options()],
            ["--lazy", "mode=eager"],
        ];
        let mut options = [options.as_flattened(), more].concat();
        // Most cases write to the registers of virtio-mmio.
        if !more.contains(&"--transport") {
            options.extend(["--transport", "mmio"]);
        }
        let machine = Machine::start(scripts, vcpus, &options)?;
        serve(&machine.path(&format!("v_{}", vsock::SERVED)))?;
        self.before = Some(Before {
            observed: machine.observe()?,
            anonymous: machine.anonymous()?,
            log: machine.log().len() as u64,
            since: Instant::now(),
        });
        Ok(machine)
    }

    /// Nothing has changed but what may.
    pub fn check(&mut self, machine: &Machine, ended: bool) -> Result<()> {
        match self.neighbour.run(self.ask, PATIENCE)? {
            End::Passed(PAGES) => {}
            end => return Err(self.neighbour.explain(format!("the neighbour: {end:?}"))),
        }
        let clean = disk::content();
        let (written, readonly) = (self.bytes("disk")?, self.bytes("readonly")?);
        let kept = disk::KEPT as usize;
        if readonly != clean || written.len() != clean.len() || written[..kept] != clean[..kept] {
            return Err(Error::new("a disk has changed where nobody wrote"));
        }
        let before = self.before.as_ref().context("no machine is watched")?;
        let log = machine.log().len() as u64 - before.log;
        let bound = LOG + LOG_EACH_SECOND * before.since.elapsed().as_secs();
        if log > bound {
            return Err(machine.explain(format!("{log} bytes of log, at most {bound} expected")));
        }
        if ended {
            return Ok(());
        }
        // Threads of a request end a moment after it.
        let same = until_often("threads and descriptors are as before", PATIENCE, || {
            Ok(is_as_before(machine.observe()?, &before.observed).then_some(()))
        });
        let now = machine.observe()?;
        same.context(format_args!("{:?}, then {now:?}", before.observed))?;
        let (was, is) = (before.anonymous, machine.anonymous()?);
        if is > was + GROWTH {
            return Err(machine.explain(format!("{was} bytes resident, then {is}")));
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        fs::read(self.path(name)).context(name)
    }
}

/// Whether nothing is there that was not there before, but what a monitor opens once, when it first takes memory.
fn is_as_before(mut now: Observed, before: &Observed) -> bool {
    now.descriptors
        .retain(|target, _| !target.ends_with("/pagemap"));
    let pidfds = |observed: &mut Observed| observed.descriptors.remove("anon_inode:[pidfd]");
    let mut before = before.clone();
    let (is, was) = (pidfds(&mut now), pidfds(&mut before));
    now == before && is.unwrap_or(0) <= was.unwrap_or(0) + 1
}
