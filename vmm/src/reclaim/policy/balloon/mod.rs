//! Decides how large a balloon that runs itself should be. Pure, so that tests can replay samples.
//!
//! It inflates for two reasons. A guest that could still grow past a limit of the monitor's cgroup, or of one above it,
//! loses, in quick steps, the free memory that it could do so with: the kernel would kill the monitor before. And when
//! memory stays short and the other sources have nothing left, the guest's caches are squeezed, in slow steps. It
//! deflates in big steps when the guest suffers, and slowly when there has been plenty for a while.

#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Room, Sample};

/// Older statistics say nothing: the balloon does not grow by them.
const FRESH: Duration = Duration::from_secs(5);

/// Time between two steps that inflate; between two that follow from plenty it is [`SLOW_PACE`].
const PACE: Duration = Duration::from_secs(1);

/// Time between two steps by which the balloon shrinks because there is plenty.
const SLOW_PACE: Duration = Duration::from_secs(2);

/// Memory must have been short for so long before the guest's caches are squeezed.
const LASTING: Duration = Duration::from_secs(3);

/// There must have been plenty for so long before the balloon shrinks.
const PLENTY: Duration = Duration::from_secs(10);

/// A guest that has come no nearer to the target for so long cannot reach it.
const STUCK: Duration = Duration::from_secs(10);

/// Faults count as ours for so long after caches were squeezed.
const BLAME: Duration = Duration::from_secs(30);

/// Major faults a second that are no harm.
const FAULTS: u64 = 100;

/// The balloon does not grow for so long after the guest took pages back by itself.
const TAKEN_BACK_REST: Duration = Duration::from_secs(300);

/// The first rest after another back-off; each further one is twice as long, up to [`TAKEN_BACK_REST`].
const REST: Duration = Duration::from_secs(10);

/// After this time without a back-off the next rest is short again.
const FORGIVEN: Duration = Duration::from_secs(900);

/// The guest has followed if its balloon is as near to the target as this.
const SLACK: u64 = 1 << 20;

/// Unit of all steps.
const MIB: u64 = 1 << 20;

/// What the guest says of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestFigures {
    /// How old this is.
    pub age: Duration,
    /// Unused memory in bytes.
    pub free: u64,
    /// Memory in bytes that is available without swapping.
    pub available: u64,
    /// Number of major page faults since the guest started.
    pub major_faults: u64,
    /// Number of processes that the guest's kernel has killed for lack of memory.
    pub oom_kills: u64,
}

/// The balloon and its guest at one moment. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonFigures {
    /// A driver is bound, and tells before it uses a page again.
    pub bound: bool,
    /// What an operator has asked for.
    pub floor: u64,
    /// What the guest is asked for: not below the floor.
    pub target: u64,
    /// What the guest says it has handed back.
    pub actual: u64,
    /// What it says of its memory.
    pub guest: Option<GuestFigures>,
    /// What the guest could touch without a call and the host holds no page for.
    pub untouched: u64,
    /// What is lazily free and the host still holds.
    pub left: u64,
    /// What is free by the guest's free lists and the host holds.
    pub listed: u64,
}

/// The bounds of a balloon, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonBounds {
    /// The guest's memory.
    pub memory: u64,
    /// What shall stay available to the guest.
    pub reserve: u64,
}

impl BalloonBounds {
    /// Maximum of a step that squeezes caches, and of one for plenty.
    const fn step(self) -> u64 {
        whole(self.memory / 32)
    }

    /// Maximum of a step that takes free memory which the guest must not fill.
    const fn quick(self) -> u64 {
        whole(self.memory / 8)
    }

    /// Minimum of a step by which the balloon shrinks for the guest's sake.
    const fn relief(self) -> u64 {
        whole(self.memory / 16)
    }

    /// What is less is not worth a step.
    const fn least(self) -> u64 {
        whole(self.memory / 256)
    }
}

/// `bytes` in whole MiB, at least one.
const fn whole(bytes: u64) -> u64 {
    if bytes < MIB { MIB } else { bytes / MIB * MIB }
}

/// What a balloon that runs itself does, or what keeps it from growing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalloonDoing {
    /// Nothing is needed.
    #[default]
    Idle,
    /// It grows.
    Inflating,
    /// It shrinks because there has been plenty for a while.
    Deflating,
    /// No driver is bound, or one that does not tell before it uses a page again.
    NoDriver,
    /// The guest has sent no statistics for 5 s.
    NoStatistics,
    /// The guest has not yet followed the last step, or has sent no statistics since.
    Following,
    /// Memory that the guest does not use is taken first.
    OtherSources,
    /// Memory has not been short for long enough.
    NotLasting,
    /// The guest has no more available than its reserve.
    Reserve,
    /// The guest has had to read pages from disk again.
    Faults,
    /// The guest's kernel has killed a process for lack of memory.
    OutOfMemory,
    /// The guest took pages back by itself.
    TakenBack,
    /// The guest did not hand over what it was asked for.
    Stuck,
}

/// What the policy keeps from look to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonState {
    /// The target at the last look.
    target: u64,
    /// When it last changed.
    changed: Duration,
    /// The largest size since then.
    largest: u64,
    /// The size at the last look, and when it last changed.
    actual: (u64, Duration),
    /// When the guest was first seen to have followed.
    followed: Option<Duration>,
    /// Since when memory has been short, and since when there has been plenty.
    short: Option<Duration>,
    plenty: Option<Duration>,
    /// Until when the balloon does not grow, and why.
    rest: Option<(Duration, BalloonDoing)>,
    /// How many rests came one after the other, and when the last one began.
    rests: (u32, Duration),
    faults: Faults,
}

/// The guest's faults, and what is usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Faults {
    /// When the last statistics were made, and their counts.
    last: Option<(Duration, u64, u64)>,
    /// Major faults a second while nothing was squeezed, averaged.
    usual: u64,
    /// When caches were last squeezed.
    squeezed: Option<Duration>,
}

impl Faults {
    /// Takes note of statistics made at `at`. Says why the guest suffers, if it does and if that may be our doing.
    fn note(&mut self, now: Duration, at: Duration, guest: &GuestFigures) -> Option<BalloonDoing> {
        let counts = (at, guest.major_faults, guest.oom_kills);
        let (then, faults, kills) = self.last.replace(counts)?;
        let millis = at.saturating_sub(then).as_millis();
        if millis < 500 {
            // The same statistics: their time is known to some milliseconds only.
            self.last = Some((then, faults, kills));
            return None;
        }
        let faults = u128::from(guest.major_faults.saturating_sub(faults));
        let rate = u64::try_from(faults * 1000 / millis).unwrap_or(u64::MAX);
        let ours = |at: Duration| now.saturating_sub(at) < BLAME;
        if !self.squeezed.is_some_and(ours) {
            self.usual = self.usual / 4 * 3 + rate / 4;
            return None;
        }
        if guest.oom_kills > kills {
            return Some(BalloonDoing::OutOfMemory);
        }
        let harm = FAULTS.max(self.usual.saturating_mul(2));
        (rate >= harm).then_some(BalloonDoing::Faults)
    }
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStep {
    /// The target in bytes from now on; the present one if nothing changes.
    pub target: u64,
    /// What that is, or why nothing changes.
    pub doing: BalloonDoing,
}

/// Decides the balloon's target. Returns that and the next state.
#[must_use]
pub fn run_balloon(
    sample: &Sample,
    figures: &BalloonFigures,
    bounds: BalloonBounds,
    state: BalloonState,
) -> (BalloonStep, BalloonState) {
    let mut look = Look {
        now: sample.at,
        rooms: sample.limits().map(|limit| limit.room),
        figures,
        bounds,
        state,
    };
    let step = look.run();
    let mut state = look.state;
    if step.target != figures.target {
        state.changed_to(step.target, figures.actual, sample.at);
    }
    (step, state)
}

impl BalloonState {
    /// Begins to wait for the guest to follow a new target.
    fn changed_to(&mut self, target: u64, actual: u64, now: Duration) {
        self.target = target;
        self.changed = now;
        self.largest = actual;
        self.actual = (actual, now);
        self.followed = None;
    }

    /// Does not let the balloon grow for a while, because of `why`.
    fn rest(&mut self, why: BalloonDoing, now: Duration) {
        let (before, then) = self.rests;
        let before = if now.saturating_sub(then) < FORGIVEN {
            before
        } else {
            0
        };
        let time = match why {
            BalloonDoing::TakenBack => TAKEN_BACK_REST,
            _ => REST.saturating_mul(1 << before.min(5)).min(TAKEN_BACK_REST),
        };
        self.rests = (before.saturating_add(1), now);
        self.rest = Some((now.saturating_add(time), why));
    }
}

/// One look.
struct Look<'a> {
    now: Duration,
    /// Of the host, the own cgroup, and the tightest one above it.
    rooms: [Room; 3],
    figures: &'a BalloonFigures,
    bounds: BalloonBounds,
    state: BalloonState,
}

impl Look<'_> {
    fn run(&mut self) -> BalloonStep {
        let BalloonFigures {
            bound,
            floor,
            target,
            ..
        } = *self.figures;
        if !bound {
            self.state = BalloonState::default();
            return BalloonStep {
                target: floor,
                doing: BalloonDoing::NoDriver,
            };
        }
        if target != self.state.target {
            self.state.changed_to(target, self.figures.actual, self.now);
        }
        let suffers = self.note_guest();
        let (shortage, lasting) = self.note_shortage();
        if let Some(step) = self.give_up() {
            return step;
        }
        if let Some(step) = suffers.and_then(|why| self.relieve(why)) {
            return step;
        }
        match self.wanted(shortage, lasting) {
            Ok(0) => self.shrink(),
            Ok(wanted) => self.grow(wanted),
            Err(doing) => self.stay(doing),
        }
    }

    const fn stay(&self, doing: BalloonDoing) -> BalloonStep {
        BalloonStep {
            target: self.figures.target,
            doing,
        }
    }

    /// When the guest made its statistics.
    fn made(&self, guest: &GuestFigures) -> Duration {
        self.now.saturating_sub(guest.age)
    }

    /// The guest's figures, if they are not too old.
    fn fresh(&self) -> Option<GuestFigures> {
        self.figures.guest.filter(|guest| guest.age < FRESH)
    }

    /// Takes note of how the guest is. Says why it suffers, if it does.
    fn note_guest(&mut self) -> Option<BalloonDoing> {
        let (actual, target) = (self.figures.actual, self.figures.target);
        if actual != self.state.actual.0 {
            self.state.actual = (actual, self.now);
        }
        self.state.largest = self.state.largest.max(actual);
        if actual.abs_diff(target) <= SLACK {
            self.state.followed.get_or_insert(self.now);
        }
        let guest = self.fresh()?;
        let made = self.made(&guest);
        let faults = self.state.faults.note(self.now, made, &guest);
        let short = guest.available < self.bounds.reserve;
        faults.or(short.then_some(BalloonDoing::Reserve))
    }

    /// What is missing when the other sources have given all, and whether memory has been short for a while.
    fn note_shortage(&mut self) -> (u64, bool) {
        let missing = self.rooms.iter().map(missing).max().unwrap_or(0);
        if missing == 0 {
            self.state.short = None;
            return (0, false);
        }
        let since = *self.state.short.get_or_insert(self.now);
        let shortage = missing.saturating_sub(self.figures.left);
        // What is taken of it can grow again, so it counts here only.
        let shortage = shortage.saturating_sub(self.figures.listed);
        (shortage, self.now.saturating_sub(since) >= LASTING)
    }

    /// What the guest took back by itself, or does not hand over, is not asked for any more.
    fn give_up(&mut self) -> Option<BalloonStep> {
        let BalloonFigures {
            floor,
            target,
            actual,
            ..
        } = *self.figures;
        if actual.saturating_add(SLACK) >= target {
            return None;
        }
        let why = if actual.saturating_add(SLACK) < self.state.largest {
            BalloonDoing::TakenBack
        } else if target > floor && self.now.saturating_sub(self.state.actual.1) >= STUCK {
            BalloonDoing::Stuck
        } else {
            return None;
        };
        self.state.rest(why, self.now);
        // Not a page more than it has: it would hand more over.
        Some(BalloonStep {
            target: actual.max(floor),
            doing: why,
        })
    }

    /// Gives the guest back what it lacks, as far as the limits have it: beyond them the kernel would kill the monitor.
    fn relieve(&mut self, why: BalloonDoing) -> Option<BalloonStep> {
        let guest = self.fresh()?;
        let since = self.made(&guest);
        if since < self.state.changed {
            // It says nothing of what the last step has done.
            return None;
        }
        let lacks = self.bounds.reserve.saturating_sub(guest.available);
        let wanted = whole(lacks).saturating_add(MIB).max(self.bounds.relief());
        let step = wanted
            .min(self.spare(|room| room.low() / 2))
            .min(self.extra());
        let step = whole_or_nothing(step);
        if step > 0 || why != BalloonDoing::Reserve {
            self.state.rest(why, self.now);
        }
        Some(BalloonStep {
            target: self.figures.target - step,
            doing: why,
        })
    }

    /// What the balloon is larger than an operator asked for.
    const fn extra(&self) -> u64 {
        self.figures.target.saturating_sub(self.figures.floor)
    }

    /// What host and limits have above `keep`, and limits also above what the guest may still fill.
    fn spare(&self, keep: impl Fn(Room) -> u64) -> u64 {
        let [host, own, above] = self.rooms;
        let limits = [(host, 0), (own, self.growth()), (above, self.growth())];
        let limits = limits.into_iter().filter(|(room, _)| room.total > 0);
        let spare = limits.map(|(room, grows)| {
            room.available
                .saturating_sub(keep(room).saturating_add(grows))
        });
        spare.min().unwrap_or(u64::MAX)
    }

    /// How much free memory the guest could fill that the host would have to find.
    fn growth(&self) -> u64 {
        let free = self.figures.guest.map_or(u64::MAX, |guest| guest.free);
        free.min(self.figures.untouched)
    }

    /// By how much the guest could grow past the watermark of a cgroup's limit: memory that it must not fill.
    fn overhang(&self) -> u64 {
        let [_, own, above] = self.rooms;
        let over = |room: Room| {
            let kept = room.low().saturating_add(self.growth());
            kept.saturating_sub(room.available.saturating_add(self.figures.left))
        };
        let limits = [own, above].into_iter().filter(|room| room.total > 0);
        limits.map(over).max().unwrap_or(0)
    }

    /// How much larger the balloon should be, or why it must not grow although something is needed.
    fn wanted(&self, shortage: u64, lasting: bool) -> Result<u64, BalloonDoing> {
        let overhang = self.overhang().min(self.growth());
        // A guest hands over what is free before it squeezes its caches.
        let free = self.figures.guest.map_or(0, |guest| guest.free);
        let least = self.bounds.least();
        let squeezed = if lasting && shortage >= least {
            shortage.saturating_add(free)
        } else {
            0
        };
        let wanted = overhang.max(squeezed);
        match wanted {
            _ if wanted >= least => Ok(wanted),
            _ if shortage >= least => Err(BalloonDoing::NotLasting),
            _ if self.rooms.iter().map(missing).any(|bytes| bytes >= least) => {
                Err(BalloonDoing::OtherSources)
            }
            _ => Ok(0),
        }
    }

    fn grow(&mut self, wanted: u64) -> BalloonStep {
        self.state.plenty = None;
        if let Some((until, why)) = self.state.rest {
            if self.now < until {
                return self.stay(why);
            }
            self.state.rest = None;
        }
        let Some(guest) = self.fresh() else {
            return self.stay(BalloonDoing::NoStatistics);
        };
        let (made, changed) = (self.made(&guest), self.state.changed);
        let near = self.figures.actual.abs_diff(self.figures.target) <= SLACK;
        let followed = near && self.state.followed.is_some_and(|at| made >= at);
        if !followed || self.now.saturating_sub(changed) < PACE {
            return self.stay(BalloonDoing::Following);
        }
        let quick = self.overhang().min(self.growth()).min(self.bounds.quick());
        let most = quick.max(self.bounds.step());
        let spare = guest.available.saturating_sub(self.bounds.reserve);
        let room = self.bounds.memory.saturating_sub(self.bounds.reserve);
        let room = room.saturating_sub(self.figures.target);
        let step = whole_or_nothing(wanted.min(most).min(spare).min(room));
        if step < self.bounds.least() {
            return self.stay(BalloonDoing::Reserve);
        }
        if guest.free < step.saturating_add(self.bounds.memory / 64) {
            self.state.faults.squeezed = Some(self.now);
        }
        BalloonStep {
            target: self.figures.target + step,
            doing: BalloonDoing::Inflating,
        }
    }

    /// Shrinks if there has been plenty for a while: more than twice the watermark. So it is not needed again at once.
    fn shrink(&mut self) -> BalloonStep {
        let step = self.bounds.step().min(self.extra());
        let spare = self.spare(|room| room.low().saturating_mul(2));
        if step == 0 || spare < step || self.state.followed.is_none() {
            self.state.plenty = None;
            return self.stay(BalloonDoing::Idle);
        }
        let since = *self.state.plenty.get_or_insert(self.now);
        let waited = self.now.saturating_sub(since) >= PLENTY;
        let paced = self.now.saturating_sub(self.state.changed) >= SLOW_PACE;
        if !waited || !paced {
            return self.stay(BalloonDoing::Idle);
        }
        BalloonStep {
            target: self.figures.target - step,
            doing: BalloonDoing::Deflating,
        }
    }
}

/// What is missing up to the watermark.
fn missing(room: &Room) -> u64 {
    room.low().saturating_sub(room.available)
}

/// `bytes` in whole MiB, rounded down.
const fn whole_or_nothing(bytes: u64) -> u64 {
    bytes / MIB * MIB
}
