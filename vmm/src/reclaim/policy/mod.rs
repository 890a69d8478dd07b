//! Decides how much to reclaim. Pure, so that tests can replay recorded samples.

mod ages;
mod balloon;
mod need;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use ages::Ages;
pub use balloon::{
    BalloonBounds, BalloonDoing, BalloonFigures, BalloonState, BalloonStep, GuestFigures,
    run_balloon,
};
pub use need::{Limit, Others, Room};

/// Minimum size in bytes of one answer to a stall that says nothing of its size.
const MIN_STEP: u64 = 64 << 20;

/// Maximum size in bytes of one answer. After it the host is looked at again: others answer at the same time.
const MAX_STEP: u64 = 1 << 30;

/// Pressure that has lasted for this many seconds is hard: fragments are taken, too.
const HARD_LEVEL: u32 = 2;

/// Pressure that lasts is looked at anew after this time: the level rises, and others may come into doubt.
const LEVEL_TIME: Duration = Duration::from_secs(1);

/// Pressure ends after this time without it: PSI reports at most once in 2 s.
const CALM_TIME: Duration = Duration::from_secs(3);

/// Time to the next sample while all is calm, or nothing is left to take.
const IDLE: Duration = Duration::from_secs(1);

/// Time to the next sample while memory is short or may soon be.
pub(super) const ALERT: Duration = Duration::from_millis(100);

/// The state of the host and of the machine at one moment. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time since some moment.
    pub at: Duration,
    /// PSI has reported since the last sample that tasks of the monitor's own cgroup are stalled for lack of memory. A stall
    /// of the whole host says nothing: a neighbour that thrashes within its own limit stalls the host, too.
    pub stalled: bool,
    /// The host: memory that can be allocated without swapping.
    pub host: Limit,
    /// The monitor's own cgroup.
    pub own: Limit,
    /// The tightest one of the cgroups above it.
    pub above: Limit,
    /// Lazily freed memory that could be invalidated and discarded.
    pub lazy: u64,
    /// Unmapped memory that could be discarded.
    pub unmapped: u64,
    /// Memory that the host holds and that is free by the guest's free lists; an estimate.
    pub free: u64,
    /// The part of it that has been free for the age of [`Mode::Age`]. Perhaps it was used in between.
    pub old_free: u64,
    /// Memory that this policy's decisions have given back until now.
    pub given: u64,
    /// The machine's generation.
    pub generation: u64,
    /// The latest generation that has reached the age of [`Mode::Age`].
    pub aged: u64,
}

impl Sample {
    /// Returns true if [`decide`] does nothing in [`Mode::Pressure`], however much memory is lazy.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        !self.stalled && self.limits().iter().all(Limit::is_calm)
    }

    const fn limits(&self) -> [Limit; 3] {
        [self.host, self.own, self.above]
    }

    /// What could be taken.
    #[must_use]
    pub const fn all(&self) -> u64 {
        self.tracked().saturating_add(self.free)
    }

    /// What could be taken and is tracked.
    const fn tracked(&self) -> u64 {
        self.lazy.saturating_add(self.unmapped)
    }
}

/// When lazily freed memory is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Under memory pressure of the host.
    #[default]
    Pressure,
    /// As soon as possible.
    Eager,
    /// After this time it is invalidated, and after the same time again it is discarded.
    Age(Duration),
    /// On request only.
    Off,
}

/// Settings of reclaim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReclaimTuning {
    /// When memory is taken.
    pub mode: Mode,
    /// Maximum time for which a vCPU is kept out of the guest at a time; the system call that is under way then is added to
    /// that.
    pub pause: Duration,
    /// Maximum number of ranges of a slice.
    pub slice: usize,
    /// Percentage of their time that vCPUs may lose, 1 to 50. A pause counts twice, because caches are cold after it.
    pub share: u32,
}

impl Default for ReclaimTuning {
    fn default() -> Self {
        Self {
            mode: Mode::Pressure,
            pause: Duration::from_micros(100),
            slice: 512,
            share: 1,
        }
    }
}

/// The state that the policy keeps from sample to sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyState {
    /// The pressure that lasts.
    pressure: Option<Pressure>,
}

impl PolicyState {
    /// Returns true if pressure has lasted for so long that small pieces are taken, too.
    #[must_use]
    pub fn is_hard(&self) -> bool {
        self.pressure.is_some_and(|pressure| pressure.is_hard())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressure {
    /// When the last sample showed it.
    last: Duration,
    /// For how many seconds it has lasted.
    level: u32,
    /// How often the others have given less than half of their part.
    doubt: u32,
    /// When the level last rose, what this monitor had given back then, and what the others had.
    mark: (Duration, u64, u64),
}

impl Pressure {
    const fn is_hard(&self) -> bool {
        self.level >= HARD_LEVEL
    }

    /// Goes on from `before` with a sample in which `limit` needs something.
    fn next(before: Option<Self>, sample: &Sample, limit: &Limit) -> Self {
        let mark = (sample.at, sample.given, limit.others.given);
        let Some(mut pressure) = before else {
            return Self {
                last: sample.at,
                level: 0,
                doubt: 0,
                mark,
            };
        };
        pressure.last = sample.at;
        let (then, given, others) = pressure.mark;
        if sample.at.saturating_sub(then) >= LEVEL_TIME {
            pressure.level = pressure.level.saturating_add(1);
            let given = sample.given.saturating_sub(given);
            let others = limit.others.given.saturating_sub(others);
            // What it has given for others that were in doubt is not its part.
            let part = given.checked_shr(pressure.doubt).unwrap_or(0);
            let late = pressure.level > 1 && limit.is_behind(part, others, sample.all());
            pressure.doubt = pressure.doubt.saturating_add(1) * u32::from(late);
            pressure.mark = mark;
        }
        pressure
    }
}

/// How small the pieces may be that a reclaim takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Whole blocks of 2 MiB only.
    Blocks,
    /// Fragments, too: ranges that are smaller than a block.
    Fragments,
    /// At the end a part of a block, too, if less than 2 MiB are still to be taken.
    Everything,
}

/// What to reclaim now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Maximum number of bytes to discard.
    pub bytes: u64,
    /// Maximum number of bytes to invalidate after that, ahead of need.
    pub invalidate: u64,
    /// Maximum number of bytes to take of what has been free by the guest's free lists for some time.
    pub old_free: u64,
    /// How small the pieces may be, for the first two.
    pub reach: Reach,
    /// Ranges of later generations are not taken.
    pub newest: u64,
    /// Memory is short: this is no precaution, and no matter of age.
    pub pressed: bool,
    /// Time to the next sample, unless the kernel reports something before.
    pub pause: Duration,
}

impl Decision {
    const NOTHING: Self = Self {
        bytes: 0,
        invalidate: 0,
        old_free: 0,
        reach: Reach::Blocks,
        newest: u64::MAX,
        pressed: false,
        pause: IDLE,
    };
}

/// Decides what to reclaim. Returns that and the next state.
#[must_use]
pub fn decide(mode: Mode, sample: Sample, state: PolicyState) -> (Decision, PolicyState) {
    match mode {
        Mode::Off => (Decision::NOTHING, state),
        Mode::Pressure => under_pressure(&sample, state),
        Mode::Eager => {
            let decision = Decision {
                bytes: sample.all(),
                reach: Reach::Fragments,
                pause: ALERT,
                ..Decision::NOTHING
            };
            (decision, state)
        }
        Mode::Age(_) => {
            let (pressed, state) = under_pressure(&sample, state);
            let aged = Decision {
                bytes: sample.unmapped,
                invalidate: sample.lazy,
                old_free: sample.old_free,
                reach: Reach::Fragments,
                newest: sample.aged,
                pause: pressed.pause,
                ..Decision::NOTHING
            };
            let decision = if pressed.bytes > 0 { pressed } else { aged };
            (decision, state)
        }
    }
}

/// The host, and a cgroup above the own one, need what is missing up to their low watermark ([`Room::low`]); this monitor
/// answers for its part ([`Limit::part`]). The own cgroup needs that, too. If PSI reports a stall there and nothing is
/// missing, it needs 1/16 of what can be taken, at least 64 MiB, and twice as much for each second that the pressure lasts.
///
/// The same amount is invalidated ahead of the next answer, because pressure seldom ends at once. If less than twice the
/// watermark is available, 1/16 of what can be taken is invalidated.
fn under_pressure(sample: &Sample, state: PolicyState) -> (Decision, PolicyState) {
    let all = sample.all();
    let step = (all / 16).max(MIN_STEP);
    let needs = sample.limits().map(|limit| (limit.missing(), limit));
    let largest = needs.into_iter().max_by_key(|need| need.0);
    let (missing, limit) = largest.unwrap_or_default();
    let near = needs.iter().any(|(_, limit)| limit.is_near());
    if missing == 0 && !sample.stalled {
        let lasts = |pressure: &Pressure| sample.at.saturating_sub(pressure.last) < CALM_TIME;
        let ahead = step.saturating_sub(sample.unmapped).min(sample.lazy);
        let decision = Decision {
            invalidate: if near { ahead } else { 0 },
            pause: pause(near, all),
            ..Decision::NOTHING
        };
        let pressure = state.pressure.filter(lasts);
        return (decision, PolicyState { pressure });
    }
    let limit = if missing == 0 { sample.own } else { limit };
    let pressure = Pressure::next(state.pressure, sample, &limit);
    let parts = needs.map(|(need, limit)| limit.part(need, all, pressure.doubt));
    let stall = if sample.stalled {
        let step = step.saturating_mul(1 << pressure.level.min(20));
        sample.own.part(step, all, pressure.doubt)
    } else {
        0
    };
    let wanted = parts.into_iter().fold(stall, u64::max).min(all);
    let bytes = wanted.min(MAX_STEP);
    let whole = bytes == wanted;
    let decision = Decision {
        bytes,
        invalidate: if whole {
            bytes.min(sample.tracked().saturating_sub(bytes))
        } else {
            0
        },
        reach: if pressure.is_hard() {
            Reach::Fragments
        } else {
            Reach::Blocks
        },
        pressed: true,
        pause: if whole {
            pause(true, all)
        } else {
            Duration::ZERO
        },
        ..Decision::NOTHING
    };
    let pressure = Some(pressure);
    (decision, PolicyState { pressure })
}

/// Time to the next sample, with `all` bytes to take.
const fn pause(alert: bool, all: u64) -> Duration {
    if alert && all > 0 { ALERT } else { IDLE }
}
