//! Traces of samples, and what is decided.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn limit(total: u64, available: u64) -> Limit {
    Limit {
        room: Room { total, available },
        ..Limit::default()
    }
}

/// A host of 16 GiB: the low watermark is 819.2 MiB.
fn sample(available: u64, lazy: u64) -> Sample {
    Sample {
        host: limit(16 * GIB, available),
        lazy,
        ..Sample::default()
    }
}

/// The own cgroup, without a limit, is stalled.
fn own_stall(lazy: u64) -> Sample {
    Sample {
        stalled: true,
        ..sample(8 * GIB, lazy)
    }
}

/// Replays samples, one each `apart`.
fn replay_each(apart: Duration, trace: &[Sample]) -> Vec<Decision> {
    let (mut state, mut at) = (PolicyState::default(), Duration::ZERO);
    let mut step = |&sample: &Sample| {
        let (decision, next) = decide(Mode::Pressure, Sample { at, ..sample }, state);
        (state, at) = (next, at + apart);
        assert!(decision.bytes <= sample.all());
        assert_eq!(
            decision.pressed,
            next.pressure.is_some_and(|it| it.last == at - apart)
        );
        decision
    };
    trace.iter().map(&mut step).collect()
}

/// Replays samples, one each second. Returns the decisions in MiB, with whether fragments were taken.
fn replay(trace: &[Sample]) -> Vec<(u64, bool)> {
    let decisions = replay_each(Duration::from_secs(1), trace).into_iter();
    let short = |it: Decision| (it.bytes / MIB, it.reach == Reach::Fragments);
    decisions.map(short).collect()
}

fn decide_first(sample: Sample) -> Decision {
    decide(Mode::Pressure, sample, PolicyState::default()).0
}

#[test]
fn without_pressure_nothing_is_taken() {
    assert_eq!(replay(&[sample(8 * GIB, 4 * GIB); 9]), [(0, false); 9]);
}

#[test]
fn without_lazy_memory_nothing_is_taken() {
    let decisions = replay_each(IDLE, &[own_stall(0), sample(0, 0)]);
    assert!(decisions.iter().all(|it| (it.bytes, it.pause) == (0, IDLE)));
}

#[test]
fn a_stall_in_the_own_cgroup_escalates_and_reports_may_skip_samples() {
    let (stall, quiet) = (own_stall(4 * GIB), sample(8 * GIB, 4 * GIB));
    let none = (0, false);
    assert_eq!(
        replay(&[stall, quiet, stall, quiet, stall, quiet, stall]),
        [
            (256, false),
            none,
            (512, false),
            none,
            (1024, true),
            none,
            (1024, true)
        ]
    );
    let later = replay(&[stall, stall, stall, quiet, quiet, quiet, stall]);
    assert_eq!(later.last(), Some(&(256, false)), "calm ends it");
    let quick = replay_each(Duration::from_millis(50), &[stall; 20]);
    assert!(
        quick
            .iter()
            .all(|it| it.bytes == 256 * MIB && it.reach == Reach::Blocks)
    );
}

#[test]
fn calm_is_calm_whatever_there_is_to_take() {
    for total in [0, MIB, 512 * MIB, 16 * GIB, 1 << 50] {
        let calm = Sample {
            host: limit(total, total / 2),
            lazy: u64::MAX,
            ..Sample::default()
        };
        assert!(calm.is_calm());
        assert_eq!(decide_first(calm), Decision::NOTHING, "{total}");
        let near = limit(4 * GIB, 300 * MIB);
        for near in [
            Sample { own: near, ..calm },
            Sample {
                above: near,
                ..calm
            },
            Sample { host: near, ..calm },
            Sample {
                stalled: true,
                ..calm
            },
        ] {
            assert!(!near.is_calm() && decide_first(near) != Decision::NOTHING);
        }
    }
}

#[test]
fn a_little_lazy_memory_goes_at_once() {
    assert_eq!(replay(&[own_stall(100 * MIB)]), [(64, false)]);
    assert_eq!(replay(&[own_stall(10 * MIB)]), [(10, false)]);
    assert_eq!(decide_first(own_stall(100 * MIB)).invalidate, 36 * MIB);
}

#[test]
fn below_the_watermark_what_is_missing_is_taken() {
    assert_eq!(replay(&[sample(219 * MIB, 4 * GIB)]), [(602, false)]);
    let almost = sample(817 * MIB, 4 * GIB);
    assert_eq!(replay(&[almost; 3]), [(4, false), (4, false), (4, true)]);
    let host = |total, available| Sample {
        host: limit(total, available),
        lazy: GIB,
        ..Sample::default()
    };
    let (roomy, short) = (host(512 * MIB, 130 * MIB), host(512 * MIB, 127 * MIB));
    assert_eq!(
        replay(&[roomy, short, host(0, 0)]),
        [(0, false), (2, false), (0, false)]
    );
}

#[test]
fn a_large_need_is_looked_at_again_after_each_step() {
    let large = Sample {
        host: limit(1 << 40, 0),
        lazy: 1 << 39,
        ..Sample::default()
    };
    let decision = decide_first(large);
    assert_eq!((decision.bytes, decision.pause), (MAX_STEP, Duration::ZERO));
    assert_eq!(decision.invalidate, 0, "the need comes first");
    let last = Sample {
        host: limit(1 << 40, (1 << 40) / 20 - MAX_STEP),
        ..large
    };
    let decision = decide_first(last);
    assert_eq!((decision.bytes, decision.pause), (MAX_STEP, ALERT));
    assert_eq!(decision.invalidate, MAX_STEP);
}

#[test]
fn endless_pressure_does_not_overflow() {
    let endless = Sample {
        host: limit(u64::MAX, 0),
        ..own_stall(u64::MAX)
    };
    let decisions = replay(&[endless; 100]);
    assert_eq!(decisions.last(), Some(&(MAX_STEP / MIB, true)));
}

#[test]
fn near_the_watermark_one_answer_is_invalidated_ahead() {
    let near = sample(GIB, 4 * GIB);
    let decision = decide_first(near);
    assert_eq!((decision.bytes, decision.invalidate), (0, 256 * MIB));
    assert_eq!((decision.pause, decision.pressed), (ALERT, false));
    let ahead = Sample {
        lazy: 4 * GIB - 256 * MIB,
        unmapped: 256 * MIB,
        ..near
    };
    let decision = decide_first(ahead);
    assert_eq!((decision.bytes, decision.invalidate), (0, 0));
    let stall = Sample {
        stalled: true,
        ..ahead
    };
    let decision = decide_first(stall);
    assert_eq!(
        (decision.bytes, decision.invalidate),
        (256 * MIB, 256 * MIB)
    );
}

#[test]
fn a_cgroup_that_runs_short_counts_like_a_host() {
    type Put = fn(Limit) -> Sample;
    let own: Put = |own| Sample {
        own,
        ..sample(8 * GIB, 4 * GIB)
    };
    let above: Put = |above| Sample {
        above,
        ..sample(8 * GIB, 4 * GIB)
    };
    for within in [own, above] {
        // A guest fills its cgroup of 2 GiB, whose watermark is 256 MiB, and gets some of it back.
        let available = [1024, 300, 200, 0, 600, 600, 600, 100];
        let trace = available.map(|mib| within(limit(2 * GIB, mib * MIB)));
        let taken = replay(&trace).into_iter().map(|(mib, _)| mib);
        assert!(taken.eq([0, 0, 56, 256, 0, 0, 0, 156]));
        let near = decide_first(trace[1]);
        assert_eq!((near.bytes, near.invalidate), (0, 256 * MIB));
    }
}

#[test]
fn the_largest_need_decides() {
    let sample = Sample {
        own: limit(2 * GIB, 200 * MIB),
        above: limit(2 * GIB, 100 * MIB),
        ..sample(820 * MIB, 4 * GIB)
    };
    assert_eq!(replay(&[sample]), [(156, false)]);
    let host = Sample {
        host: limit(16 * GIB, 0),
        ..sample
    };
    assert_eq!(replay(&[host]), [(820, false)]);
}

/// A host that is short of 400 MiB, this monitor with a GiB, and another one with three that has given back `given` bytes.
fn shared(own_given: u64, given: u64) -> Sample {
    let others = Others {
        before: 3 * GIB,
        after: 0,
        given,
    };
    let room = Room {
        total: 4 * GIB,
        available: 0,
    };
    Sample {
        host: Limit { room, others },
        lazy: GIB,
        given: own_given,
        ..Sample::default()
    }
}

#[test]
fn a_need_is_shared_and_a_stall_in_the_own_cgroup_is_not() {
    assert_eq!(replay(&[shared(0, 0)]), [(64, false)]);
    let own = Sample {
        stalled: true,
        lazy: 2 * GIB,
        ..shared(0, 0)
    };
    assert_eq!(replay(&[own]), [(128, false)]);
}

#[test]
fn others_that_give_nothing_come_into_doubt() {
    let deaf = [0, 64, 128, 192, 256].map(|given| shared(given * MIB, 7));
    let shares = |trace: &[Sample]| {
        let taken = replay(trace).into_iter().map(|(mib, _)| mib);
        taken.collect::<Vec<_>>()
    };
    assert_eq!(shares(&deaf), [64, 64, 102, 146, 186]);
    // They wake up, and give three times what the own part is.
    let mut trace = deaf.to_vec();
    trace.push(shared(442 * MIB, 180 * MIB));
    assert_eq!(shares(&trace)[5], 64);
    let fair = [0, 64, 128, 192, 256].map(|given| shared(given * MIB, 3 * given * MIB));
    assert_eq!(shares(&fair), [64; 5]);
    let quick = replay_each(Duration::from_millis(100), &deaf);
    assert!(
        quick.iter().all(|it| it.bytes == 64 * MIB),
        "too early to say"
    );
}

#[test]
fn modes_decide_what_is_taken_without_pressure() {
    let calm = Sample {
        lazy: 3 * MIB,
        unmapped: MIB,
        aged: 7,
        ..sample(8 * GIB, 0)
    };
    let decision = |mode| decide(mode, calm, PolicyState::default()).0;
    assert_eq!(decision(Mode::Off), Decision::NOTHING);
    let eager = decision(Mode::Eager);
    assert_eq!(
        (eager.bytes, eager.pause, eager.pressed),
        (4 * MIB, ALERT, false)
    );
    assert_eq!((eager.reach, eager.newest), (Reach::Fragments, u64::MAX));
    let mode = Mode::Age(Duration::from_secs(9));
    let aged = decision(mode);
    assert_eq!(
        (aged.bytes, aged.invalidate, aged.newest),
        (MIB, 3 * MIB, 7)
    );
    assert_eq!(
        (aged.reach, aged.pause, aged.pressed),
        (Reach::Fragments, IDLE, false)
    );
    let near = Sample {
        host: limit(16 * GIB, GIB),
        ..calm
    };
    assert_eq!(decide(mode, near, PolicyState::default()).0.pause, ALERT);
    let pressed = Sample {
        stalled: true,
        ..calm
    };
    let pressed = decide(mode, pressed, PolicyState::default()).0;
    assert_eq!(
        (pressed.bytes, pressed.newest, pressed.pressed),
        (4 * MIB, u64::MAX, true)
    );
}

#[test]
fn what_is_free_by_the_guests_lists_is_taken_but_not_prepared() {
    let with_free = |lazy, free| Sample {
        free,
        ..sample(0, lazy)
    };
    let decision = decide_first(with_free(300 * MIB, GIB));
    assert!(decision.bytes > 800 * MIB, "the whole shortage");
    assert_eq!(decision.invalidate, 0);
    let decision = decide_first(with_free(0, 100 * MIB));
    assert_eq!((decision.bytes, decision.invalidate), (100 * MIB, 0));
    assert_eq!(decision.pause, ALERT);
    let eager = decide(Mode::Eager, with_free(0, GIB), PolicyState::default()).0;
    assert_eq!(eager.bytes, GIB);
}

#[test]
fn pressure_that_lasts_is_hard() {
    let (mut state, short) = (PolicyState::default(), sample(0, GIB));
    let mut hard = Vec::new();
    for second in 0..4 {
        let at = Duration::from_secs(second);
        state = decide(Mode::Pressure, Sample { at, ..short }, state).1;
        hard.push(state.is_hard());
    }
    assert_eq!(hard, [false, false, true, true]);
}

#[test]
fn what_has_been_free_for_long_goes_by_age_unless_memory_is_short() {
    let mode = Mode::Age(Duration::from_secs(1));
    let decide = |available| {
        let sample = Sample {
            free: GIB,
            old_free: MIB,
            ..sample(available, 0)
        };
        decide(mode, sample, PolicyState::default()).0
    };
    let calm = decide(8 * GIB);
    assert_eq!((calm.bytes, calm.old_free), (0, MIB));
    let short = decide(0);
    assert!(short.bytes > 0 && short.old_free == 0);
}
