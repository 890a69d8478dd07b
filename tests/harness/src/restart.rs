//! Machines that are started again and again with the same id, socket and disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use ebb_payload::{FREE_START, Program, Transport};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::host::{Relative, relatives};
use crate::idle::signal_to;
use crate::wait::until_often;
use crate::{Api, Images};

/// A machine that has not followed after this time hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Pages that the guest of [`Site::guest`] fills and frees lazily.
pub const LAZY_PAGES: u64 = 2048;
/// MiB of memory that the machines have.
pub const MIB: u64 = 64;
/// Where the guest's query block is, see `ebb_hypercall_abi::Query`, and the word of it that counts discarded pages.
const BLOCK: u64 = 0x40_0000;
const DISCARDED: u64 = 8;

/// Where one machine after the other lives.
pub struct Site {
    ebb: PathBuf,
    folder: TempDir,
    /// More words of `ebb run`.
    more: Vec<String>,
}

/// A running monitor; killed when this is dropped.
pub struct Life {
    child: Child,
    api: Api,
    stderr: PathBuf,
}

/// A number in an environment variable, or else the `default`.
///
/// # Errors
/// It is no number.
pub fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().context(name),
        Err(_) => Ok(default),
    }
}

/// A sequence of numbers that a seed determines (SplitMix64).
pub struct Random(u64);

impl Random {
    /// Begins the sequence of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, below `most` (at least 1).
    pub fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % most.max(1)
    }

    /// One of them.
    pub fn choose<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// The next time, below `most`.
    pub fn time(&mut self, most: Duration) -> Duration {
        let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.below(micros))
    }
}

impl Site {
    /// A new one, with an empty disk.
    ///
    /// # Errors
    /// When the environment lacks the monitor, or there is no room.
    pub fn new() -> Result<Self> {
        let ebb = Images::from_environment()?.ebb;
        let folder = TempDir::with_prefix("ebb-site-").context("make a temporary folder")?;
        fs::write(folder.path().join("disk"), [0; 4096]).context("make a disk")?;
        let more = Vec::new();
        Ok(Self { ebb, folder, more })
    }

    /// Its monitors filter no system calls, if they can at all: a filter would see the call that strace puts in the place
    /// of one that shall fail.
    ///
    /// # Errors
    /// When the monitor cannot be asked.
    pub fn without_filters(mut self) -> Result<Self> {
        let help = Command::new(&self.ebb).args(["run", "--help"]).output();
        let help = help.context("ask for help")?.stdout;
        if String::from_utf8_lossy(&help).contains("--seccomp") {
            self.more = ["--seccomp", "off"].map(str::to_owned).into();
        }
        Ok(self)
    }

    /// The monitor's program.
    pub fn ebb(&self) -> &Path {
        &self.ebb
    }

    /// The monitor's program in a debug build, which can panic on purpose.
    ///
    /// # Errors
    /// When the environment lacks it.
    pub fn debug_ebb(&self) -> Result<PathBuf> {
        Images::debug_ebb()
    }

    /// A path in it: `api`, `log`, `stderr`, `disk`, or the name of a guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What stands in a file of it.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Writes a guest called `name` that fills memory, frees it lazily, and waits until the host has taken it all; then
    /// it does what `end` adds, and halts. An `end` that ends the machine decides how.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn guest(&self, name: &str, end: impl FnOnce(&mut Program)) -> Result<()> {
        let mut guest = Program::kernel();
        guest.words(BLOCK, &[FREE_START, 0]);
        guest.fill(FREE_START, LAZY_PAGES, 0x5eed_0000_0000_0000);
        let free = ebb_hypercall_abi::Operation::LazyFree;
        guest.call(Transport::Port, free, FREE_START, LAZY_PAGES);
        guest.query_until(BLOCK, DISCARDED, LAZY_PAGES);
        end(&mut guest);
        guest.halt();
        guest.write(&self.path(name)).context("write the guest")
    }

    /// Writes a guest called `name` that only halts.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn halting_guest(&self, name: &str) -> Result<()> {
        let mut guest = Program::kernel();
        guest.halt();
        guest.write(&self.path(name)).context("write the guest")
    }

    /// The words of `ebb run` for the guest called `name`, without those that say where its output goes.
    fn words(&self, name: &str) -> Vec<String> {
        let words = format!(
            "run -v --id again --memory size={MIB}M,thp=off --disk path=disk --api-socket api --kernel"
        );
        let words = words.split(' ').map(str::to_owned);
        words
            .chain([self.path(name).display().to_string()])
            .collect()
    }

    /// Starts the monitor by `command`, which may put another program before it, for the guest called `name`. The words of
    /// `output` say where output goes; without any, the guest's goes nowhere, and the log to a file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, mut command: Command, name: &str, output: &[&str]) -> Result<Life> {
        let stderr = self.path("stderr");
        // The helpers of the machine before may still write to theirs.
        let _ = fs::remove_file(&stderr);
        command
            .args(self.words(name))
            .args(&self.more)
            .args(if output.is_empty() {
                &["--serial", "null", "--log-file", "log"]
            } else {
                output
            })
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).context("make stderr")?);
        let child = command.spawn().context("start the monitor")?;
        let api = Api::new(&self.path("api"));
        Ok(Life { child, api, stderr })
    }

    /// Starts the monitor for the guest called `name`, and waits until the machine runs.
    ///
    /// # Errors
    /// When it does not.
    pub fn running(&self, name: &str) -> Result<Life> {
        let mut life = self.start(Command::new(&self.ebb), name, &[])?;
        life.until_it_runs()?;
        Ok(life)
    }

    /// The living processes of its machines, monitors and helpers, by name.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn relatives(&self) -> Result<Vec<Relative>> {
        relatives(self.folder.path())
    }

    /// Waits until the helpers of all machines but a running one have ended.
    ///
    /// # Errors
    /// When they do not.
    pub fn until_predecessors_are_gone(&self) -> Result<()> {
        until_often("only one guardian is left", LIMIT, || {
            let all = self.relatives()?;
            let guardians = all.iter().filter(|it| it.name == "ebb-guardian");
            Ok((guardians.count() <= 1).then_some(()))
        })
    }

    /// Waits until neither a process nor a socket or lock is left.
    ///
    /// # Errors
    /// What is left.
    pub fn vanished(&self) -> Result<()> {
        let files = ["api", "api.memory"].map(|name| self.path(name));
        let done = until_often("everything is gone", LIMIT, || {
            let is_gone = !files.iter().any(|file| file.exists()) && self.relatives()?.is_empty();
            Ok(is_gone.then_some(()))
        });
        let left = files.map(|file| file.exists());
        done.context(format_args!(
            "{:?}, socket and lock {left:?}",
            self.relatives()?
        ))
    }
}

impl Life {
    /// Its process id; that of another program which starts it, if there is one.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client of its API.
    pub const fn api(&self) -> &Api {
        &self.api
    }

    /// Sends it a signal; nothing happens when it has ended.
    pub fn signal(&self, signal: Signal) {
        signal_to(self.pid(), signal);
    }

    /// What it wrote to standard error.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits until the machine runs.
    ///
    /// # Errors
    /// When it does not, or the monitor ends.
    pub fn until_it_runs(&mut self) -> Result<()> {
        let pid = self.pid();
        until_often("the machine runs", LIMIT, || {
            if let Some(status) = self.ended()? {
                let said = self.said();
                return Err(Error::new(format!(
                    "the monitor has ended: {status}: {said}"
                )));
            }
            Ok(self.api.is_running(pid).then_some(()))
        })
    }

    /// Waits until the machine runs, or the monitor has ended.
    ///
    /// # Errors
    /// When neither happens.
    pub fn until_it_runs_or_ends(&mut self) -> Result<()> {
        until_often("the machine runs, or its monitor ends", LIMIT, || {
            let is_done = self.ended()?.is_some() || self.api.is_running(self.pid());
            Ok(is_done.then_some(()))
        })
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    /// wait(2)'s.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("wait")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until_often("the monitor ends", LIMIT, || self.ended())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // Both fail when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
