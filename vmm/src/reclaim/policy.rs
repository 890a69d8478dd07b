//! Decides how much to reclaim. Pure, so that tests can replay recorded samples.

use std::collections::VecDeque;
use std::time::Duration;

/// Minimum size in bytes of one answer to pressure.
const MIN_STEP: u64 = 64 << 20;

/// After this many answers, lasting pressure is hard: fragments are taken, too.
const HARD_LEVEL: u32 = 2;

/// Pressure ends after this many samples in a row without it. Samples are taken each second, and PSI reports at most once
/// in 2 s.
const CALM_SAMPLES: u32 = 3;

/// Minimum low watermark in bytes, unless that is more than a quarter of the memory.
const LOW_WATERMARK: u64 = 256 << 20;

/// The state of the host and of the machine at one moment. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// A PSI trigger has fired since the last sample: tasks are stalled for lack of memory.
    pub stalled: bool,
    /// Memory of the host that can be allocated without swapping.
    pub available: u64,
    /// Total memory of the host. 0 if unknown: then only `stalled` counts.
    pub total: u64,
    /// The tightest limit of the monitor's cgroup and its ancestors; [`Room::default`] if there is none.
    pub cgroup: Room,
    /// Lazily freed memory that could be invalidated and discarded.
    pub lazy: u64,
    /// Unmapped memory that could be discarded.
    pub unmapped: u64,
    /// The machine's generation.
    pub generation: u64,
    /// The latest generation that has reached the age of [`Mode::Age`].
    pub aged: u64,
}

/// Total and available memory of the host or of a cgroup with a limit, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Total memory. 0 if unknown or not limited.
    pub total: u64,
    /// Memory that can be allocated without reclaim.
    pub available: u64,
}

impl Room {
    /// The one whose available memory is farthest below its low watermark, or else closest to it.
    #[must_use]
    pub fn tightest(rooms: impl Iterator<Item = Self>) -> Self {
        let over = |room: &Self| i128::from(room.available) - i128::from(room.low());
        rooms.min_by_key(over).unwrap_or_default()
    }

    /// The low watermark: 5 % of the total, at least 256 MiB, at most a quarter.
    fn low(self) -> u64 {
        (self.total / 20).max(LOW_WATERMARK).min(self.total / 4)
    }

    fn missing(self) -> u64 {
        self.low().saturating_sub(self.available)
    }

    fn is_near(self) -> bool {
        self.total > 0 && self.available < self.low().saturating_mul(2)
    }
}

impl Sample {
    /// Returns true if [`decide`] does nothing in [`Mode::Pressure`], however much memory is lazy.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        let host = Room {
            total: self.total,
            available: self.available,
        };
        let roomy = |room: Room| room.missing() == 0 && !room.is_near();
        !self.stalled && roomy(host) && roomy(self.cgroup)
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

/// Remembers when each generation was current, so that ranges need no time stamp.
#[derive(Clone, Debug, Default)]
pub struct Ages {
    /// Times since some moment, and the generation at each. Ascending in both.
    marks: VecDeque<(Duration, u64)>,
    aged: u64,
}

impl Ages {
    /// At `now` the machine's generation is `current`. Returns the latest generation that was current `age` ago or longer.
    /// Times are kept at distances of at least 1/16 of `age`, so the answer is late by at most that, and at most 17 are kept.
    pub fn aged(&mut self, now: Duration, current: u64, age: Duration) -> u64 {
        let apart = self.marks.back().map(|&(last, _)| now.saturating_sub(last));
        if apart.is_none_or(|apart| apart >= age / 16) {
            self.marks.push_back((now, current));
        }
        while let Some(&(then, generation)) = self.marks.front()
            && now.saturating_sub(then) >= age
        {
            self.aged = generation;
            self.marks.pop_front();
        }
        self.aged
    }
}

/// The state that the policy keeps from sample to sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyState {
    /// Number of answers since pressure began.
    level: u32,
    /// Number of samples without pressure since the last answer.
    calm: u32,
}

impl PolicyState {
    /// Returns true if the last sample showed pressure.
    pub(super) const fn is_pressed(self) -> bool {
        self.level > 0 && self.calm == 0
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
    /// How small the pieces may be, for both.
    pub reach: Reach,
    /// Ranges of later generations are not taken.
    pub newest: u64,
}

impl Decision {
    const NOTHING: Self = Self {
        bytes: 0,
        invalidate: 0,
        reach: Reach::Blocks,
        newest: u64::MAX,
    };
}

/// Decides what to reclaim. Returns that and the next state.
#[must_use]
pub fn decide(mode: Mode, sample: Sample, state: PolicyState) -> (Decision, PolicyState) {
    match mode {
        Mode::Off => (Decision::NOTHING, state),
        Mode::Pressure => under_pressure(sample, state),
        Mode::Eager => {
            let decision = Decision {
                bytes: sample.lazy.saturating_add(sample.unmapped),
                reach: Reach::Fragments,
                ..Decision::NOTHING
            };
            (decision, state)
        }
        Mode::Age(_) => {
            let (pressed, state) = under_pressure(sample, state);
            let aged = Decision {
                bytes: sample.unmapped,
                invalidate: sample.lazy,
                reach: Reach::Fragments,
                newest: sample.aged,
            };
            let decision = if pressed.bytes > 0 { pressed } else { aged };
            (decision, state)
        }
    }
}

/// There is pressure if PSI reports a stall, or if less memory is available than the low watermark ([`Room::low`]) of the
/// host or of a cgroup. The first answer is 1/16 of what can be taken, at least 64 MiB, and at least what is missing up to the
/// watermark. Each further answer to lasting pressure is twice as large.
///
/// The same amount is invalidated ahead of the next answer, because pressure seldom ends at once. If less than twice the
/// watermark is available, the amount of a first answer is invalidated.
fn under_pressure(sample: Sample, state: PolicyState) -> (Decision, PolicyState) {
    let host = Room {
        total: sample.total,
        available: sample.available,
    };
    let missing = host.missing().max(sample.cgroup.missing());
    let all = sample.lazy.saturating_add(sample.unmapped);
    let step = (all / 16).max(MIN_STEP);
    if !sample.stalled && missing == 0 {
        let calm = state.calm.saturating_add(1);
        let level = if calm < CALM_SAMPLES { state.level } else { 0 };
        let near = host.is_near() || sample.cgroup.is_near();
        let ahead = step.saturating_sub(sample.unmapped).min(sample.lazy);
        let decision = Decision {
            invalidate: if near { ahead } else { 0 },
            ..Decision::NOTHING
        };
        return (decision, PolicyState { level, calm });
    }
    let step = step.saturating_mul(1 << state.level.min(20));
    let reach = if state.level < HARD_LEVEL {
        Reach::Blocks
    } else {
        Reach::Fragments
    };
    let bytes = step.max(missing).min(all);
    let decision = Decision {
        bytes,
        invalidate: bytes.min(all - bytes),
        reach,
        ..Decision::NOTHING
    };
    let next = PolicyState {
        level: state.level.saturating_add(1),
        calm: 0,
    };
    (decision, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// A host of 16 GiB: the low watermark is 819 MiB.
    fn sample(stalled: bool, available: u64, lazy: u64) -> Sample {
        Sample {
            stalled,
            available,
            total: 16 * GIB,
            lazy,
            ..Sample::default()
        }
    }

    /// Replays samples and returns the decisions in MiB, with whether fragments were taken.
    fn replay(trace: &[Sample]) -> Vec<(u64, bool)> {
        let mut state = PolicyState::default();
        let mut decisions = Vec::new();
        for &sample in trace {
            let (decision, next) = decide(Mode::Pressure, sample, state);
            state = next;
            assert!(decision.bytes <= sample.lazy);
            decisions.push((decision.bytes / MIB, decision.reach == Reach::Fragments));
        }
        decisions
    }

    #[test]
    fn without_pressure_nothing_is_taken() {
        assert_eq!(
            replay(&[sample(false, 8 * GIB, 4 * GIB); 9]),
            [(0, false); 9]
        );
    }

    #[test]
    fn without_lazy_memory_nothing_is_taken() {
        let decisions = replay(&[sample(true, 0, 0); 30]);
        assert!(decisions.iter().all(|&(bytes, _)| bytes == 0));
    }

    #[test]
    fn pressure_that_lasts_escalates_and_reports_may_skip_samples() {
        let (stall, quiet) = (
            sample(true, 8 * GIB, 4 * GIB),
            sample(false, 8 * GIB, 4 * GIB),
        );
        assert_eq!(
            replay(&[stall, quiet, stall, quiet, stall, quiet, stall]),
            [
                (256, false),
                (0, false),
                (512, false),
                (0, false),
                (1024, true),
                (0, false),
                (2048, true)
            ]
        );
        let later = replay(&[stall, stall, stall, quiet, quiet, quiet, stall]);
        assert_eq!(later.last(), Some(&(256, false)), "calm ends it");
    }

    #[test]
    fn calm_is_calm_whatever_there_is_to_take() {
        for total in [0, MIB, 512 * MIB, 16 * GIB, 1 << 50] {
            let calm = Sample {
                total,
                available: total / 2,
                lazy: u64::MAX,
                ..Sample::default()
            };
            assert!(calm.is_calm());
            let decide = |sample| decide(Mode::Pressure, sample, PolicyState::default()).0;
            assert_eq!(decide(calm), Decision::NOTHING, "{total}");
            let near = Room {
                total: 4 * GIB,
                available: 300 * MIB,
            };
            let near = Sample {
                cgroup: near,
                lazy: GIB,
                ..calm
            };
            assert!(!near.is_calm() && decide(near) != Decision::NOTHING);
        }
    }

    #[test]
    fn a_little_lazy_memory_goes_at_once() {
        assert_eq!(replay(&[sample(true, 8 * GIB, 100 * MIB)]), [(64, false)]);
        assert_eq!(replay(&[sample(true, 8 * GIB, 10 * MIB)]), [(10, false)]);
    }

    #[test]
    fn below_the_watermark_what_is_missing_is_taken() {
        let missing = sample(false, 219 * MIB, 4 * GIB);
        assert_eq!(replay(&[missing]), [(600, false)]);
        let almost = sample(false, 800 * MIB, 4 * GIB);
        assert_eq!(replay(&[almost, almost]), [(256, false), (512, false)]);
    }

    #[test]
    fn small_hosts_have_a_lower_watermark_and_unknown_ones_none() {
        let host = |total, available| Sample {
            stalled: false,
            available,
            total,
            lazy: GIB,
            ..Sample::default()
        };
        assert_eq!(replay(&[host(512 * MIB, 130 * MIB)]), [(0, false)]);
        assert_eq!(replay(&[host(512 * MIB, 127 * MIB)]), [(64, false)]);
        assert_eq!(replay(&[host(0, 0)]), [(0, false)]);
    }

    #[test]
    fn endless_pressure_does_not_overflow() {
        let decisions = replay(&[sample(true, 0, u64::MAX); 100]);
        assert_eq!(decisions.last(), Some(&(u64::MAX / MIB, true)));
    }

    #[test]
    fn near_the_watermark_one_answer_is_invalidated_ahead() {
        let near = sample(false, GIB, 4 * GIB);
        let decision = decide(Mode::Pressure, near, PolicyState::default()).0;
        assert_eq!((decision.bytes, decision.invalidate), (0, 256 * MIB));
        let ahead = Sample {
            lazy: 4 * GIB - 256 * MIB,
            unmapped: 256 * MIB,
            ..near
        };
        let decision = decide(Mode::Pressure, ahead, PolicyState::default()).0;
        assert_eq!((decision.bytes, decision.invalidate), (0, 0));
        let stalled = Sample {
            stalled: true,
            ..ahead
        };
        let decision = decide(Mode::Pressure, stalled, PolicyState::default()).0;
        assert_eq!(
            (decision.bytes, decision.invalidate),
            (256 * MIB, 256 * MIB)
        );
    }

    #[test]
    fn a_cgroup_that_runs_short_counts_like_a_host() {
        let within = |total, available| Sample {
            cgroup: Room { total, available },
            ..sample(false, 8 * GIB, 4 * GIB)
        };
        // A guest fills its cgroup of 2 GiB, whose watermark is 256 MiB, and gets some of it back.
        let trace = [
            within(2 * GIB, GIB),
            within(2 * GIB, 300 * MIB),
            within(2 * GIB, 200 * MIB),
            within(2 * GIB, 0),
            within(2 * GIB, 600 * MIB),
            within(2 * GIB, 600 * MIB),
            within(2 * GIB, 600 * MIB),
            within(2 * GIB, 100 * MIB),
        ];
        let (none, first) = ((0, false), (256, false));
        let decisions = [none, none, first, (512, false), none, none, none, first];
        assert_eq!(replay(&trace), decisions);
        let near = decide(Mode::Pressure, trace[1], PolicyState::default()).0;
        assert_eq!((near.bytes, near.invalidate), (0, 256 * MIB));
        // Small limits have small watermarks; no limit has none.
        assert_eq!(replay(&[within(400 * MIB, 120 * MIB)]), [none]);
        assert_eq!(replay(&[within(400 * MIB, 99 * MIB)]), [first]);
        assert_eq!(replay(&[within(0, 0)]), [none]);
        // What is missing to the watermark of a big limit is taken at once.
        assert_eq!(replay(&[within(64 * GIB, 2 * GIB)]), [(1228, false)]);
    }

    #[test]
    fn the_tightest_of_several_limits_counts() {
        let room = |total, available| Room { total, available };
        let (own, above) = (room(GIB, 200 * MIB), room(64 * GIB, GIB));
        assert_eq!(Room::tightest([own, above].into_iter()), above);
        let above = room(64 * GIB, 5 * GIB);
        assert_eq!(Room::tightest([own, above].into_iter()), own);
        assert_eq!(Room::tightest([].into_iter()), Room::default());
    }

    #[test]
    fn the_other_modes() {
        let calm = Sample {
            unmapped: MIB,
            aged: 7,
            ..sample(false, 9 * GIB, 3 * MIB)
        };
        let decision = |mode| decide(mode, calm, PolicyState::default()).0;
        assert_eq!(decision(Mode::Off), Decision::NOTHING);
        assert_eq!(decision(Mode::Eager).bytes, 4 * MIB);
        let aged = decision(Mode::Age(Duration::from_secs(9)));
        assert_eq!(
            (aged.bytes, aged.invalidate, aged.newest),
            (MIB, 3 * MIB, 7)
        );
        let pressed = Sample {
            stalled: true,
            ..calm
        };
        let mode = Mode::Age(Duration::from_secs(9));
        let pressed = decide(mode, pressed, PolicyState::default()).0;
        assert_eq!((pressed.bytes, pressed.newest), (4 * MIB, u64::MAX));
    }

    #[test]
    fn ages_tell_the_generation_of_some_time_ago() {
        let mut ages = Ages::default();
        let age = Duration::from_secs(10);
        let mut at = |seconds, generation| ages.aged(Duration::from_secs(seconds), generation, age);
        assert_eq!((at(0, 5), at(3, 8), at(9, 9)), (0, 0, 0));
        assert_eq!((at(10, 9), at(12, 20), at(13, 20)), (5, 5, 8));
        assert_eq!(at(100, 99), 20);
        for second in 100..100_000 {
            at(second, second);
        }
        assert!(ages.marks.len() <= 17);
    }
}
