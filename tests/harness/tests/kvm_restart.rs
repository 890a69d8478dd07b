//! A machine that dies in every way, at any moment, is started again at once, with the same id, socket and disk.
//!
//! `EBB_KILL_POINTS=200` changes the number of points, `EBB_KILL_SEED` which they are.

use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::restart::{Life, Random, Site, setting};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until_often};
use ebb_harness::{Error, figure};
use ebb_payload::Program;
use rustix::process::Signal;

/// Points in the suite.
const POINTS: u64 = 30;
const SEED: u64 = 16;

/// When a machine dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// While it is being built.
    Boot,
    /// While it runs.
    Running,
    /// While its memory is being taken.
    Reclaim,
    /// After it was told to stop.
    Stop,
}

/// How it dies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    /// SIGKILL for the monitor.
    Kill,
    /// SIGABRT: a thread has a fault, or no memory.
    Abort,
    /// SIGKILL for the guardian, then for the monitor.
    WithoutGuardian,
    /// SIGKILL for the reaper, then for the monitor.
    WithoutReaper,
    /// SIGKILL for all of them.
    Cgroup,
    /// The OOM killer, because its cgroup gets a limit.
    OutOfMemory,
    /// SIGTERM.
    Signal,
    /// An order over the API.
    Api,
    /// Its guest powers off.
    PowerOff,
    /// Its guest resets it.
    Reset,
    /// Its guest's kernel panics.
    Panic,
    /// Its guest has a triple fault.
    Crash,
}

use Death::{
    Abort, Api, Cgroup as AllKilled, Crash, Kill, OutOfMemory, Panic, PowerOff, Reset,
    WithoutGuardian, WithoutReaper,
};

impl Phase {
    const ALL: [Self; 4] = [Self::Boot, Self::Running, Self::Reclaim, Self::Stop];

    const fn deaths(self) -> &'static [Death] {
        match self {
            Self::Boot => &[Kill, AllKilled, Death::Signal, WithoutGuardian, OutOfMemory],
            Self::Running => &[
                Kill,
                Abort,
                WithoutGuardian,
                WithoutReaper,
                AllKilled,
                OutOfMemory,
                Death::Signal,
                Api,
                PowerOff,
                Reset,
                Panic,
                Crash,
            ],
            Self::Reclaim => &[Kill, Abort, AllKilled, OutOfMemory, Death::Signal, Api],
            Self::Stop => &[
                Kill,
                WithoutGuardian,
                WithoutReaper,
                AllKilled,
                Death::Signal,
            ],
        }
    }
}

impl Death {
    /// The name of the guest that it takes.
    const fn guest(self) -> &'static str {
        match self {
            PowerOff => "power-off",
            Reset => "reset",
            Panic => "panic",
            Crash => "crash",
            _ => "guest",
        }
    }

    /// The monitor's status, if it is the only possible one.
    const fn status(self) -> Option<i32> {
        match self {
            PowerOff | Death::Signal | Api => Some(0),
            Reset => Some(32),
            Crash => Some(33),
            Panic => Some(34),
            _ => None,
        }
    }
}

struct Course {
    site: Site,
    cgroup: Cgroup,
    random: Random,
    /// How long it takes until a machine runs.
    boot: Duration,
}

impl Course {
    fn new() -> Result<Self> {
        let site = Site::new()?;
        site.guest("guest", |_| {})?;
        site.guest("power-off", |guest| {
            guest.output_byte(0x600, 0x34, 1);
        })?;
        site.guest("reset", |guest| {
            guest.output_byte(0x602, 1, 1);
        })?;
        site.guest("panic", |guest| {
            guest.output_byte(0x505, 1, 1);
        })?;
        site.guest("crash", Program::crash)?;
        let mut course = Self {
            site,
            cgroup: Cgroup::new("restart")?,
            random: Random::new(setting("EBB_KILL_SEED", SEED)?),
            boot: Duration::ZERO,
        };
        let start = Instant::now();
        let mut first = course.start("guest")?;
        first.until_it_runs()?;
        course.boot = start.elapsed();
        Ok(course)
    }

    fn start(&self, guest: &str) -> Result<Life> {
        let command = self.cgroup.command(self.site.ebb());
        self.site.start(command, guest, &[])
    }

    /// Starts a machine, has it die in `phase` by `death`, starts it again at once, and returns that one.
    fn point(&mut self, living: Life, phase: Phase, death: Death) -> Result<Life> {
        let mut life = self.prepare(living, phase, death)?;
        thread::sleep(match phase {
            Phase::Boot => self.random.time(self.boot * 5 / 4),
            Phase::Running | Phase::Reclaim | Phase::Stop => self.random.time(self.boot / 2),
        });
        self.die(&life, death)?;
        let status = life.wait()?;
        let is_right = match (status.code(), death.status()) {
            (code, Some(due)) if phase != Phase::Stop && code.is_some() => code == Some(due),
            // A signal may come before the monitor has blocked it.
            (None, Some(_)) => phase == Phase::Boot,
            (code, _) => code.is_none_or(|code| code == 0),
        };
        if !is_right {
            return Err(Error::new(format!("{status}: {}", life.said())));
        }
        drop(life);
        let mut next = self.start("guest")?;
        next.until_it_runs()?;
        Ok(next)
    }

    /// The machine that will die, in that phase.
    fn prepare(&self, mut living: Life, phase: Phase, death: Death) -> Result<Life> {
        if phase == Phase::Boot || death.guest() != "guest" {
            living.signal(Signal::TERM);
            living.wait()?;
            living = self.start(death.guest())?;
        }
        if phase == Phase::Boot {
            return Ok(living);
        }
        living.until_it_runs()?;
        match phase {
            Phase::Boot | Phase::Running => {}
            Phase::Reclaim => {
                let api = living.api().clone();
                // It has no answer when the machine dies.
                thread::spawn(move || drop(api.reclaim(64 * MIB)));
            }
            Phase::Stop => living.signal(Signal::TERM),
        }
        Ok(living)
    }

    fn die(&self, life: &Life, death: Death) -> Result<()> {
        match death {
            Kill => life.signal(Signal::KILL),
            Abort => life.signal(Signal::ABORT),
            WithoutGuardian => self.kill_two("ebb-guardian", life)?,
            WithoutReaper => self.kill_two("ebb-reaper", life)?,
            AllKilled => {
                self.cgroup.set("cgroup.kill", 1)?;
                // It may not have joined the cgroup yet.
                life.signal(Signal::KILL);
            }
            OutOfMemory => {
                // The kernel has killed when this returns. A monitor that is smaller gets on.
                self.cgroup.set("memory.max", MIB)?;
                self.cgroup.set("memory.max", "max")?;
                life.signal(Signal::KILL);
            }
            Death::Signal => life.signal(Signal::TERM),
            Api => life.api().stop()?,
            // It ends when the host has taken what it has freed, which it may still be about to do.
            PowerOff | Reset | Panic | Crash => {
                until_often("the guest's memory is taken", LONG, || {
                    let taken = life.api().reclaim(64 * MIB);
                    let is_done = taken.map_or(true, |taken| taken.reclaimed_bytes > 0);
                    Ok(is_done.then_some(()))
                })?
            }
        }
        Ok(())
    }

    /// Kills the living machine's helper of this name, and then its monitor.
    fn kill_two(&self, name: &str, life: &Life) -> Result<()> {
        for helper in self.site.relatives()?.iter().filter(|it| it.name == name) {
            ebb_harness::idle::signal_to(helper.pid, Signal::KILL);
        }
        life.signal(Signal::KILL);
        Ok(())
    }
}

#[test]
fn a_machine_is_restarted_at_once_after_every_way_to_die() -> Result<()> {
    let points = setting("EBB_KILL_POINTS", POINTS)?;
    let mut course = Course::new()?;
    let mut living = course.start("guest")?;
    living.until_it_runs()?;
    for point in 0..points {
        let phase = Phase::ALL[point as usize % Phase::ALL.len()];
        let death = course.random.choose(phase.deaths());
        let what = format!("point {point}, {death:?} in {phase:?}");
        living = course.point(living, phase, death).context(&what)?;
        if point % 3 == 0 {
            // When all that looked after the dead ones is gone, the living one still has its socket.
            course.site.until_predecessors_are_gone().context(&what)?;
            assert!(living.api().is_running(living.pid()), "{what}");
        }
    }
    living.api().stop()?;
    assert_eq!(living.wait()?.code(), Some(0));
    course.site.vanished()?;
    figure("kill_points", points);
    Ok(())
}
