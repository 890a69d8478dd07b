//! Guests that check every byte of their memory while the host takes what their free lists hold.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::api::{Api, Metrics};
use crate::error::{Context, Error, Result};
use crate::host::rss;
use crate::size::MIB;
use crate::wait::{LONG, until};
use crate::{Guest, Launch, Monitor};

/// One machine of a run.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// For people.
    pub name: &'static str,
    /// vCPUs.
    pub vcpus: u32,
    /// Transparent huge pages.
    pub thp: bool,
    /// More words for the guest's kernel.
    pub cmdline: &'static str,
    /// The disk reads past the caches of host and guest, straight into memory that the guest has just taken.
    pub direct: bool,
    /// `--balloon`.
    pub balloon: Option<&'static str>,
    /// The balloon is filled and emptied all the time.
    pub balloon_moves: bool,
    /// Rounds, in each of which something must be taken.
    pub rounds: u64,
    /// Operations of the guest in each.
    pub operations: u64,
    /// Seed of everything that is random.
    pub seed: u64,
}

/// RAM of each machine in MiB.
const RAM_MIB: u64 = 512;
/// Most that the guest's program has in use.
const HELD_MIB: u64 = 160;
/// What the balloon takes.
const BALLOON_MIB: u64 = 96;
/// More than there is.
const ALL: u64 = 1 << 40;

/// The machines of a run of `operations` in all.
#[must_use]
pub fn cases(operations: u64, seed: u64) -> Vec<Case> {
    let plain = |name, vcpus, share: u64| Case {
        name,
        vcpus,
        thp: true,
        cmdline: "",
        direct: false,
        balloon: None,
        balloon_moves: false,
        rounds: 2,
        operations: (operations * share).div_ceil(200),
        seed: seed + u64::from(vcpus),
    };
    vec![
        Case {
            cmdline: "init_on_free=1 init_on_alloc=0",
            direct: true,
            ..plain("cleared when freed", 1, 30)
        },
        Case {
            thp: false,
            cmdline: "movablecore=256M",
            ..plain("small pages, half of the memory movable", 2, 20)
        },
        Case {
            balloon: Some("size=0,deflate_on_oom=on,reporting=lazy"),
            balloon_moves: true,
            ..plain("reporting, the balloon in and out", 2, 30)
        },
        Case {
            balloon: Some("size=0,reporting=eager"),
            ..plain("reporting at once", 4, 20)
        },
    ]
}

/// What one machine has shown.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it was.
    pub case: Case,
    /// Operations of the guest's program.
    pub operations: u64,
    /// What it has read and compared.
    pub checked_mib: u64,
    /// Files that the disk has read straight into memory that the guest had just taken.
    pub direct: u64,
    /// Words that were wrong.
    pub lost: u64,
    /// Blocks of memory that were off line for a moment.
    pub offline: u64,
    /// Blocks of memory that the guest's kernel tried for seconds to take off line, in vain.
    pub stopped: u64,
    /// Times that the balloon was full.
    pub balloons: u64,
    /// Orders to take everything.
    pub orders: u64,
    /// Bytes that were taken by the free lists, in each round.
    pub taken: Vec<u64>,
    /// Pauses in which something was looked at.
    pub pauses: u64,
    /// Candidates that were in use again when the vCPUs were out.
    pub stale: u64,
    /// Resident bytes of the monitor after the last round, and after the last order.
    pub rss: (u64, u64),
    /// How long it took.
    pub time: Duration,
}

impl Outcome {
    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<()> {
        let case = &self.case;
        let faults = [
            (self.lost != 0, "words are lost"),
            (
                self.operations < case.rounds * case.operations,
                "operations are missing",
            ),
            (self.checked_mib == 0, "nothing was checked"),
            (
                case.direct && self.direct == 0,
                "no file was read past the caches",
            ),
            (self.taken.is_empty(), "there were no rounds"),
            (
                self.taken.contains(&0),
                "nothing was taken by the free lists in a round",
            ),
            (
                case.balloon_moves && self.balloons == 0,
                "the balloon never was full",
            ),
        ];
        match faults.iter().find(|(is_so, _)| *is_so) {
            None => Ok(()),
            Some((_, what)) => Err(Error::new(format!("{what}: {self:?}"))),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken: Vec<u64> = self.taken.iter().map(|bytes| bytes / MIB).collect();
        write!(
            f,
            "{} vCPUs, {}: {} operations, {} MiB checked, {} files read past the caches, lost {}; {} orders took {taken:?} MiB in {} pauses, {} candidates \
             were in use again; off line {}, in vain {}, balloon full {}; RSS {} to {} MiB; {:.1} s",
            self.case.vcpus,
            self.case.name,
            self.operations,
            self.checked_mib,
            self.direct,
            self.lost,
            self.orders,
            self.pauses,
            self.stale,
            self.offline,
            self.stopped,
            self.balloons,
            self.rss.0 / MIB,
            self.rss.1 / MIB,
            self.time.as_secs_f64(),
        )
    }
}

/// The counters of free pages.
///
/// # Errors
/// The monitor does not answer.
pub fn counters(api: &Api) -> Result<Metrics> {
    Ok(api.lazy()?.part("free_pages"))
}

/// Loads the guest's driver that tells where its kernel's note is, and waits until the monitor reads the free lists of that
/// kernel: its release.
///
/// # Errors
/// It does not; with why.
pub fn read_free_lists(monitor: &Monitor, guest: &mut Guest) -> Result<String> {
    guest.must("insmod /modules/qemu_fw_cfg.ko")?;
    await_free_lists(monitor)
}

/// Waits until the monitor reads the free lists of the guest's kernel: its release.
///
/// # Errors
/// It does not; with why.
pub fn await_free_lists(monitor: &Monitor) -> Result<String> {
    let api = monitor.api();
    let mut state = serde_json::Value::Null;
    let known = until("the guest's kernel is known", LONG, || {
        state = api.get("/lazy-memory")?["free_pages"].clone();
        Ok(state["kernel"].as_str().map(str::to_owned))
    });
    known.map_err(|error| monitor.explain(Error::new(format!("{error}: {state}"))))
}

/// A disk that the guest may write to.
fn scratch_disk(path: &Path) -> Result<()> {
    let made = Command::new("/sbin/mke2fs")
        // Past the host's cache, its pages may be the unit.
        .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
        .arg(path)
        .arg("128M")
        .stdout(Stdio::null())
        .status()
        .context("mke2fs")?;
    made.success()
        .then_some(())
        .context("mke2fs has made no file system")
}

/// Runs one machine to its end.
///
/// # Errors
/// When it does not come to its end; not for what the guest has found.
pub fn run(case: Case, limit: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let launch = Launch::new()?;
    let disk = launch.folder().join("scratch");
    scratch_disk(&disk)?;
    let keys = if case.direct {
        "engine=io_uring,direct=on"
    } else {
        "readonly=off"
    };
    let thp = if case.thp { "on" } else { "off" };
    let mut launch = launch
        .memory(&format!("size={RAM_MIB}M,thp={thp}"))
        .cpus(case.vcpus)
        .cmdline(case.cmdline)
        .option("--disk", &format!("path={},{keys}", disk.display()))
        .option("--lazy", "mode=pressure,pause=20000,share=50");
    if let Some(balloon) = case.balloon {
        launch = launch.option("--balloon", balloon);
    }
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    read_free_lists(&monitor, &mut guest)?;
    guest.must(
        "mkdir -p /disk /shm && mount -t ext4 /dev/vda /disk && mount -t tmpfs -o size=96M tmpfs /shm",
    )?;
    let mut outcome = Outcome {
        case,
        operations: 0,
        checked_mib: 0,
        direct: 0,
        lost: 0,
        offline: 0,
        stopped: 0,
        balloons: 0,
        orders: 0,
        taken: Vec::new(),
        pauses: 0,
        stale: 0,
        rss: (0, 0),
        time: Duration::ZERO,
    };
    for round in 0..case.rounds {
        let left = limit.saturating_sub(start.elapsed());
        let done = outcome.round(&monitor, &mut guest, round, left);
        done.map_err(|error| monitor.explain(error))?;
    }
    let (api, pid) = (monitor.api(), monitor.pid());
    outcome.rss.0 = rss(pid)?;
    api.reclaim(ALL)?;
    outcome.rss.1 = rss(pid)?;
    let counters = counters(&api)?;
    (outcome.pauses, outcome.stale) = (counters["pauses_total"], counters["stale_total"]);
    outcome.time = start.elapsed();
    guest.send("exit")?;
    match monitor.wait()? {
        0 => Ok(outcome),
        code => Err(Error::new(format!("ebb ends with {code}: {outcome:?}"))),
    }
}

impl Outcome {
    fn round(
        &mut self,
        monitor: &Monitor,
        guest: &mut Guest,
        round: u64,
        limit: Duration,
    ) -> Result<()> {
        let (case, api) = (self.case, monitor.api());
        let before = counters(&api)?["taken_bytes_total"];
        let (done, orders, balloons) =
            (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let goes_on = || !done.load(Ordering::Relaxed);
        let said = thread::scope(|scope| {
            scope.spawn(|| {
                while goes_on() {
                    // The machine may end before it answers.
                    if api.reclaim(ALL).is_ok() {
                        orders.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            if case.balloon_moves {
                scope.spawn(|| {
                    while goes_on() {
                        let full = move_balloon(&api, BALLOON_MIB, goes_on);
                        balloons.fetch_add(u64::from(full), Ordering::Relaxed);
                        move_balloon(&api, 0, goes_on);
                    }
                });
            }
            let command = format!(
                "ebb-guest exercise --threads {} --operations {} --seconds {} --mib {HELD_MIB} --seed {} --folder /shm \
                 --folder /disk --kernel{}",
                case.vcpus.max(2),
                case.operations,
                limit.as_secs(),
                case.seed + 1000 * round,
                if case.direct { " --direct" } else { "" },
            );
            let said = guest.must_within(&command, limit + LONG);
            done.store(true, Ordering::Relaxed);
            said
        })?;
        // The program has freed most of what it held at its very end: an order that begins before does not find it.
        api.reclaim(ALL)?;
        self.operations += number(&said, "operations")?;
        self.checked_mib += number(&said, "checked_mib")?;
        self.direct += number(&said, "direct")?;
        self.lost += number(&said, "lost")?;
        self.offline += number(&said, "offline")?;
        self.stopped += number(&said, "stopped")?;
        self.orders += orders.into_inner() + 1;
        self.balloons += balloons.into_inner();
        self.taken
            .push(counters(&api)?["taken_bytes_total"] - before);
        Ok(())
    }
}

/// Asks for a balloon of this size and waits for it; whether it came.
fn move_balloon(api: &Api, mib: u64, goes_on: impl Fn() -> bool) -> bool {
    if api.set_balloon(mib * MIB).is_err() {
        return false;
    }
    while goes_on() {
        if api.balloon().is_ok_and(|balloon| balloon.actual_mib == mib) {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

/// The number behind `name=`.
fn number(text: &str, name: &str) -> Result<u64> {
    let words = text.split([' ', '\\', '\n']);
    let mut values = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = values.next().and_then(|value| value.parse().ok());
    value.context(format_args!("no number {name} in {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_report() {
        let text = "exercise: operations=12 lost=0 offline=3 kernel_refused=4\\nmore";
        assert_eq!(number(text, "operations").unwrap(), 12);
        assert_eq!(number(text, "kernel_refused").unwrap(), 4);
        assert!(number(text, "none").is_err());
    }

    #[test]
    fn an_outcome_that_proves_nothing_is_refused() {
        let good = Outcome {
            case: cases(1000, 1)[0],
            operations: 1000,
            checked_mib: 1,
            direct: 1,
            lost: 0,
            offline: 0,
            stopped: 0,
            balloons: 0,
            orders: 1,
            taken: vec![1, 1],
            pauses: 1,
            stale: 0,
            rss: (0, 0),
            time: Duration::ZERO,
        };
        assert!(good.check().is_ok());
        let bad: [fn(&mut Outcome); 6] = [
            |outcome| outcome.direct = 0,
            |outcome| outcome.lost = 1,
            |outcome| outcome.taken[1] = 0,
            |outcome| outcome.taken.clear(),
            |outcome| outcome.operations = 1,
            |outcome| outcome.checked_mib = 0,
        ];
        for spoil in bad {
            let mut outcome = good.clone();
            spoil(&mut outcome);
            assert!(outcome.check().is_err(), "{outcome:?}");
        }
    }
}
