//! Traces of samples, and a simulated guest whose caches and programs grow and shrink.

use proptest::prelude::*;

use super::super::Limit;
use super::*;

const GIB: u64 = 1 << 30;

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn limit(total: u64, available: u64) -> Limit {
    Limit {
        room: Room { total, available },
        ..Limit::default()
    }
}

/// A guest, in MiB, whose driver follows its targets. Its host takes what is lazily free as soon as the cgroup needs it.
#[derive(Clone, Debug)]
struct World {
    second: u64,
    memory: u64,
    /// Limit of the monitor's cgroup; 0: none.
    limit: u64,
    /// Available memory of a host of 64 GiB, before this guest has used any.
    host: u64,
    programs: u64,
    caches: u64,
    /// Free memory that the host has pages for.
    freed: u64,
    /// Balloon pages that the host still holds, and all others.
    held: u64,
    gone: u64,
    faults: u64,
    floor: u64,
    target: u64,
    /// Seconds since the last statistics; `None`: they come each second.
    silent: Option<u64>,
    state: BalloonState,
    bounds: BalloonBounds,
    /// Each target that differed from the one before, and when.
    targets: Vec<(u64, u64)>,
    doing: BalloonDoing,
}

/// What the monitor needs for itself.
const OVERHEAD: u64 = 64;

impl World {
    fn new(memory: u64, limit: u64) -> Self {
        let bounds = BalloonBounds {
            memory: memory * MIB,
            reserve: memory * MIB / 8,
        };
        Self {
            second: 0,
            memory,
            limit,
            host: 32 << 10,
            programs: memory / 16,
            caches: memory / 32,
            freed: 0,
            held: 0,
            gone: 0,
            faults: 0,
            floor: 0,
            target: 0,
            silent: None,
            state: BalloonState::default(),
            bounds,
            targets: Vec::new(),
            doing: BalloonDoing::Idle,
        }
    }

    const fn free(&self) -> u64 {
        self.memory - self.programs - self.caches - self.held - self.gone
    }

    fn host_room(&self) -> Room {
        Room {
            total: 64 * GIB,
            available: self.host.saturating_sub(self.used()) * MIB,
        }
    }

    const fn available(&self) -> u64 {
        self.free() + self.caches / 8 * 7
    }

    const fn used(&self) -> u64 {
        OVERHEAD + self.programs + self.caches + self.freed + self.held
    }

    fn room(&self) -> Room {
        Room {
            total: self.limit * MIB,
            available: self.limit.saturating_sub(self.used()) * MIB,
        }
    }

    /// Programs or caches change by so much; what does not fit is taken from the caches.
    fn use_more(&mut self, programs: i64, caches: i64) {
        let shift = |value: u64, by: i64| value.saturating_add_signed(by);
        let before = self.programs + self.caches;
        self.programs = shift(self.programs, programs).min(self.memory - self.held - self.gone);
        let most = self.memory - self.held - self.gone - self.programs;
        self.caches = shift(self.caches, caches).min(most);
        let after = self.programs + self.caches;
        if after < before {
            self.freed += before - after;
        }
        self.freed = self
            .freed
            .saturating_sub(after.saturating_sub(before))
            .min(self.free());
    }

    /// The driver follows: free memory first, then caches.
    fn follow(&mut self) {
        let size = self.held + self.gone;
        if self.target >= size {
            let more = (self.target - size).min(self.free() + self.caches);
            let untouched = (self.free() - self.freed).min(more);
            let freed = self.freed.min(more - untouched);
            let squeezed = more - untouched - freed;
            self.gone += untouched;
            self.freed -= freed;
            self.caches -= squeezed;
            self.held += freed + squeezed;
        } else {
            let less = size - self.target;
            let gone = less.min(self.gone);
            self.gone -= gone;
            self.held -= less - gone;
            self.freed += less - gone;
        }
        // The host takes what it needs of what is lazily free.
        let missing = |room: Room| room.low().saturating_sub(room.available).div_ceil(MIB);
        let most = missing(self.room()).max(missing(self.host_room()));
        let taken = most.min(self.held);
        self.held -= taken;
        self.gone += taken;
    }

    fn figures(&self) -> BalloonFigures {
        BalloonFigures {
            bound: true,
            floor: self.floor * MIB,
            target: self.target * MIB,
            actual: (self.held + self.gone) * MIB,
            guest: Some(GuestFigures {
                age: seconds(self.silent.unwrap_or(0)),
                free: self.free() * MIB,
                available: self.available() * MIB,
                major_faults: self.faults,
                oom_kills: 0,
            }),
            untouched: (self.free() - self.freed) * MIB,
            left: self.held * MIB,
            listed: 0,
        }
    }

    fn look(&mut self) {
        let sample = Sample {
            at: seconds(self.second),
            host: limit(64 * GIB, self.host_room().available),
            own: limit(self.limit * MIB, self.room().available),
            ..Sample::default()
        };
        let before = self.target;
        let (step, state) = run_balloon(&sample, &self.figures(), self.bounds, self.state);
        (self.state, self.doing, self.target) = (state, step.doing, step.target / MIB);
        if self.target != before {
            self.targets.push((self.second, self.target));
        }
        if self.target > before {
            let step = (self.target - before) * MIB;
            assert!(step <= self.bounds.quick(), "{self:?}");
            assert!((self.target * MIB) <= self.bounds.memory - self.bounds.reserve);
        }
        self.second += 1;
    }

    /// Runs for so many seconds with so much more of programs and caches in each. The limit must hold.
    fn run(&mut self, count: u64, programs: i64, caches: i64) {
        for _ in 0..count {
            self.use_more(programs, caches);
            self.follow();
            if self.limit > 0 {
                assert!(self.used() < self.limit, "the kernel kills it: {self:?}");
            }
            self.look();
        }
    }

    /// How often growing and shrinking took turns.
    fn turns(&self) -> usize {
        let sizes: Vec<u64> = std::iter::once(0)
            .chain(self.targets.iter().map(|it| it.1))
            .collect();
        let ups: Vec<bool> = sizes.windows(2).map(|pair| pair[0] < pair[1]).collect();
        ups.windows(2).filter(|pair| pair[0] != pair[1]).count()
    }
}

/// A guest of 8 GiB in a cgroup of 6 GiB reads files, a GiB a second.
#[test]
fn a_cache_that_grows_never_reaches_the_limit() {
    let mut world = World::new(8192, 6144);
    world.run(5, 0, 0);
    let early = world.target;
    assert!(
        (2300..3000).contains(&early),
        "before it is needed: {world:?}"
    );
    world.run(600, 0, 1024);
    assert!(world.target < early + 256, "{world:?}");
    assert!(world.caches > 4500, "the guest keeps what fits: {world:?}");
    assert!(world.turns() == 0 && world.room().available > 0);
    let before = world.target;
    world.run(3000, 0, 1024);
    assert_eq!(world.target, before, "it stays");
}

/// The limit is that of a cgroup above the monitor's, as of a pod. A host that has less than the guest could fill is no
/// reason: its memory is everybody's, and only what is missing there counts.
#[test]
fn a_limit_above_the_own_cgroup_counts_too() {
    let guest = figures(0, 0);
    let step = |host, above| {
        let sample = Sample {
            at: seconds(10),
            host,
            above,
            ..Sample::default()
        };
        let bounds = BalloonBounds {
            memory: 8 * GIB,
            reserve: GIB,
        };
        run_balloon(&sample, &guest, bounds, BalloonState::default()).0
    };
    let (none, tight) = (limit(0, 0), limit(6 * GIB, 5 * GIB / 2));
    let expected = 3 * GIB - (5 * GIB / 2 - 6 * GIB / 20);
    let inflated = step(none, tight);
    assert_eq!(inflated.doing, BalloonDoing::Inflating);
    assert_eq!(inflated.target, expected / MIB * MIB);
    assert_eq!(step(tight, none).doing, BalloonDoing::Idle);
}

#[test]
fn a_limit_that_is_lifted_gives_all_back_slowly() {
    let mut world = World::new(8192, 6144);
    world.run(100, 0, 512);
    let (start, size) = (world.second, world.target);
    assert!(size > 2048);
    world.limit = 0;
    world.run(10, 0, 512);
    assert_eq!(world.target, size, "it may be short again");
    world.run(120, 0, 512);
    assert_eq!((world.target, world.turns()), (0, 1));
    let steps: Vec<_> = world.targets.iter().filter(|it| it.0 >= start).collect();
    for pair in steps.windows(2) {
        assert!(
            pair[1].0 - pair[0].0 >= 2 && pair[0].1 - pair[1].1 <= 256,
            "{pair:?}"
        );
    }
}

/// A guest of 8 GiB whose host has so many MiB less than its watermark when the guest has read files of 6 GiB.
fn short_host(missing: u64) -> World {
    let mut world = World::new(8192, 0);
    world.run(60, 0, 200);
    assert_eq!(world.target, 0, "there is plenty");
    world.host = world.used() + (64 << 10) / 20 - missing;
    world
}

#[test]
fn a_short_host_squeezes_caches_slowly_until_it_has_enough() {
    let mut world = short_host(2000);
    world.run(3, 0, 0);
    assert_eq!((world.target, world.doing), (0, BalloonDoing::NotLasting));
    world.run(1, 0, 0);
    assert_eq!((world.target, world.doing), (256, BalloonDoing::Inflating));
    world.run(60, 0, 0);
    let size = world.target;
    assert!(
        size >= 2000 + world.free() && world.doing == BalloonDoing::Idle,
        "{world:?}"
    );
    for pair in world.targets.windows(2) {
        assert!(pair[1].0 > pair[0].0 && pair[1].1 - pair[0].1 <= 256);
    }
    // More than the watermark, but not twice as much: it would be short again.
    (world.host, world.targets) = (world.host + 3000, Vec::new());
    world.run(1000, 0, 0);
    assert!(world.targets.is_empty(), "{world:?}");
    world.host += 8000;
    world.run(200, 0, 0);
    assert_eq!(world.target, 0);
}

#[test]
fn the_guest_keeps_its_reserve_and_gets_it_back_at_once() {
    let mut world = short_host(9000);
    world.run(100, 0, 0);
    assert_eq!(world.doing, BalloonDoing::Reserve);
    assert!((1024..1100).contains(&world.available()), "{world:?}");
    world.host += 8000;
    world.run(1, 700, 0);
    let (before, size) = (world.targets[world.targets.len() - 2].1, world.target);
    assert_eq!(world.doing, BalloonDoing::Reserve);
    assert!(before - size >= 512, "{world:?}");
    assert!(world.available() + before - size >= 1024, "{world:?}");
    world.host -= 8000;
    world.run(9, 0, 0);
    assert_eq!(world.target, size, "it rests");
    world.run(30, -40, 0);
    assert!(world.target > size);
}

#[test]
fn what_the_limit_has_not_is_not_given() {
    let mut world = World::new(1024, 768);
    world.run(100, 0, 100);
    let (before, low) = (world.target, world.room().low() / MIB);
    world.run(60, 60, 0);
    assert!(before - world.target <= low / 2 + 8, "{world:?}");
    assert_eq!(world.doing, BalloonDoing::Reserve);
}

#[test]
fn faults_after_a_squeeze_are_a_reason_to_give_back_and_to_rest() {
    let run = |world: &mut World, count, faults| {
        for _ in 0..count {
            world.faults += faults;
            world.run(1, 0, 0);
        }
    };
    let mut world = short_host(4000);
    world.programs = 2000;
    run(&mut world, 14, 90);
    let before = world.target;
    assert!(
        before >= 2048 && world.doing == BalloonDoing::Inflating,
        "a few are no harm"
    );
    world.host += 2000;
    run(&mut world, 1, 1000);
    assert_eq!(
        (world.doing, before - world.target),
        (BalloonDoing::Faults, 512)
    );
    world.host -= 3000;
    let size = world.target;
    run(&mut world, 9, 0);
    assert_eq!((world.target, world.doing), (size, BalloonDoing::Faults));
    run(&mut world, 2, 0);
    assert!(world.target > size, "{world:?}");
    // Faults that were usual before are not its doing.
    let mut world = World::new(8192, 0);
    world.programs = 6000;
    run(&mut world, 60, 2000);
    assert_eq!(world.target, 0);
    world.host = world.used() + 1000;
    run(&mut world, 15, 2000);
    assert!(world.target > 1000, "{world:?}");
}

#[test]
fn without_fresh_statistics_it_shrinks_but_does_not_grow() {
    let mut world = World::new(8192, 6144);
    world.silent = Some(5);
    world.run(20, 0, 0);
    assert_eq!((world.target, world.doing), (0, BalloonDoing::NoStatistics));
    world.silent = Some(4);
    world.run(20, 0, 0);
    let size = world.target;
    assert!(size > 2048, "{world:?}");
    (world.silent, world.limit) = (Some(100), 0);
    world.run(100, 0, 0);
    assert_eq!(world.target, 0);
}

/// Programs that come and go, files that are read, and a host that is short now and then: an hour of each. It follows the
/// host, and nothing else.
#[test]
fn it_does_not_swing() {
    for (limit, period, most) in [(6144, 0, 1), (6144, 300, 24), (0, 300, 24), (0, 0, 0)] {
        let mut world = World::new(8192, limit);
        for second in 0..3600_u64 {
            let programs = if second / 20 % 2 == 0 { 150 } else { -150 };
            if second > 0 && period > 0 && second.is_multiple_of(period) {
                let short = (second / period) % 2 == 1;
                world.host = if short { world.used() + 2000 } else { 32 << 10 };
            }
            world.run(1, programs, 300);
        }
        println!(
            "{limit} {period}: {} turns, {} steps",
            world.turns(),
            world.targets.len()
        );
        assert!(
            world.turns() <= most,
            "{limit} {period}: {} turns",
            world.turns()
        );
    }
}

#[test]
fn a_guest_whose_need_comes_and_goes_makes_it_rest_longer_and_longer() {
    let mut world = short_host(6000);
    for second in 0..3600_u64 {
        // Always short, but not so much that the guest cannot be helped.
        world.host = world.used() + 2400;
        let programs = if second / 15 % 2 == 0 { 250 } else { -250 };
        world.run(1, programs, 100);
    }
    println!("{} turns", world.turns());
    assert!((2..=30).contains(&world.turns()), "{} turns", world.turns());
}

/// One look at `figures`, at the second `at`, with a cgroup of 6 GiB that has 1 GiB left.
fn look(at: u64, figures: BalloonFigures, state: BalloonState) -> (BalloonStep, BalloonState) {
    let sample = Sample {
        at: seconds(at),
        own: limit(6 * GIB, GIB),
        ..Sample::default()
    };
    let bounds = BalloonBounds {
        memory: 8 * GIB,
        reserve: GIB,
    };
    run_balloon(&sample, &figures, bounds, state)
}

/// A guest with 3 GiB free, all of it untouched.
fn figures(target: u64, actual: u64) -> BalloonFigures {
    BalloonFigures {
        bound: true,
        target,
        actual,
        guest: Some(GuestFigures {
            free: 3 * GIB,
            available: 4 * GIB,
            ..GuestFigures::default()
        }),
        untouched: 3 * GIB,
        ..BalloonFigures::default()
    }
}

#[test]
fn the_next_step_waits_until_the_guest_has_followed_and_said_so() {
    let (first, state) = look(10, figures(0, 0), BalloonState::default());
    assert_eq!((first.target, first.doing), (GIB, BalloonDoing::Inflating));
    let (step, state) = look(12, figures(GIB, GIB / 2), state);
    assert_eq!((step.target, step.doing), (GIB, BalloonDoing::Following));
    let mut old = figures(GIB, GIB);
    if let Some(guest) = &mut old.guest {
        guest.age = seconds(2);
    }
    let (step, state) = look(13, old, state);
    assert_eq!(
        step.doing,
        BalloonDoing::Following,
        "those statistics are older"
    );
    let (step, _) = look(14, figures(GIB, GIB), state);
    assert_eq!(
        (step.target, step.doing),
        (2 * GIB, BalloonDoing::Inflating)
    );
}

#[test]
fn pages_that_the_guest_took_back_stay_with_it() {
    let (_, state) = look(10, figures(2 * GIB, 2 * GIB), BalloonState::default());
    let taken = 2 * GIB - 100 * MIB;
    let (step, state) = look(11, figures(2 * GIB, taken), state);
    assert_eq!((step.target, step.doing), (taken, BalloonDoing::TakenBack));
    for at in [12, 100, 310] {
        let (step, _) = look(at, figures(taken, taken), state);
        assert_eq!(
            (step.target, step.doing),
            (taken, BalloonDoing::TakenBack),
            "{at}"
        );
    }
    let (step, _) = look(312, figures(taken, taken), state);
    assert!(
        step.doing == BalloonDoing::Following || step.target > taken,
        "{step:?}"
    );
    // What an operator asked for stays asked for.
    let floor = BalloonFigures {
        floor: 2 * GIB,
        ..figures(2 * GIB, 2 * GIB)
    };
    let (_, state) = look(10, floor, BalloonState::default());
    let floor = BalloonFigures {
        actual: taken,
        ..floor
    };
    let (step, _) = look(11, floor, state);
    assert_eq!(
        (step.target, step.doing),
        (2 * GIB, BalloonDoing::TakenBack)
    );
}

#[test]
fn what_the_guest_cannot_hand_over_is_not_asked_for_any_more() {
    let (_, mut state) = look(10, figures(GIB, 0), BalloonState::default());
    for at in 11..=20 {
        let (step, next) = look(at, figures(GIB, 300 * MIB), state);
        assert_eq!(
            (step.target, step.doing),
            (GIB, BalloonDoing::Following),
            "{at}"
        );
        state = next;
    }
    let (step, state) = look(21, figures(GIB, 300 * MIB), state);
    assert_eq!((step.target, step.doing), (300 * MIB, BalloonDoing::Stuck));
    let (step, _) = look(25, figures(300 * MIB, 300 * MIB), state);
    assert_eq!(
        (step.target, step.doing),
        (300 * MIB, BalloonDoing::Stuck),
        "it rests"
    );
}

#[test]
fn the_operators_size_is_the_floor() {
    let asked = BalloonFigures {
        floor: GIB,
        ..figures(GIB, GIB)
    };
    let (_, state) = look(10, asked, BalloonState::default());
    let (step, _) = look(11, asked, state);
    assert_eq!(step.target, 2 * GIB, "it adds to it");
    let unbound = BalloonFigures {
        bound: false,
        target: 3 * GIB,
        ..asked
    };
    let (step, state) = look(10, unbound, BalloonState::default());
    assert_eq!((step.target, step.doing), (GIB, BalloonDoing::NoDriver));
    assert_eq!(
        state,
        BalloonState {
            target: GIB,
            changed: seconds(10),
            actual: (GIB, seconds(10)),
            largest: GIB,
            ..BalloonState::default()
        }
    );
    let mut world = World::new(8192, 6144);
    (world.floor, world.target) = (1024, 1024);
    world.run(60, 0, 500);
    world.limit = 0;
    world.run(200, 0, 0);
    assert_eq!(world.target, 1024);
}

#[test]
fn memory_that_others_can_give_comes_first() {
    let mut state = BalloonState::default();
    for at in 10..30 {
        let sample = Sample {
            at: seconds(at),
            host: limit(64 * GIB, GIB),
            ..Sample::default()
        };
        let left = BalloonFigures {
            left: GIB,
            listed: 2 * GIB,
            ..figures(0, 0)
        };
        let bounds = BalloonBounds {
            memory: 8 * GIB,
            reserve: GIB,
        };
        let (step, next) = run_balloon(&sample, &left, bounds, state);
        assert_eq!((step.target, step.doing), (0, BalloonDoing::OtherSources));
        state = next;
    }
}

prop_compose! {
    fn any_figures()(
        bound in prop::bool::weighted(0.9),
        sizes in prop::array::uniform3(0..16 * GIB),
        amounts in prop::array::uniform4(prop_oneof![0..9 * GIB, Just(u64::MAX)]),
        age in 0..8_u64,
        counts: (u64, u64),
        told in prop::bool::weighted(0.9),
    ) -> BalloonFigures {
        let [floor, above, actual] = sizes;
        let [free, available, untouched, left] = amounts;
        let guest = GuestFigures {
            age: seconds(age),
            free,
            available,
            major_faults: counts.0,
            oom_kills: counts.1,
        };
        let [floor, above, actual] = [floor, above, actual].map(|bytes| bytes & !4095);
        let target = floor.max(above);
        let guest = told.then_some(guest);
        let listed = left / 3;
        BalloonFigures { bound, floor, target, actual, guest, untouched, left, listed }
    }
}

proptest! {
    /// Whatever guest and host say, targets stay within their bounds.
    #[test]
    fn no_trace_breaks_the_bounds(
        trace in prop::collection::vec(
            (any_figures(), prop::array::uniform3((0..64 * GIB, 0..64 * GIB)), 0..20_u64, prop::bool::ANY),
            1..60,
        ),
    ) {
        let bounds = BalloonBounds { memory: 8 * GIB, reserve: GIB };
        let (mut state, mut at, mut target) = (BalloonState::default(), 0, None);
        let mut grown = None;
        for (figures, rooms, pause, goes_on) in trace {
            at += pause;
            let figures = BalloonFigures {
                target: target.filter(|_| goes_on).unwrap_or(figures.target).max(figures.floor),
                ..figures
            };
            let [host, own, above] = rooms.map(|(total, available)| limit(total, available));
            let sample = Sample { at: seconds(at), host, own, above, ..Sample::default() };
            let (step, next) = run_balloon(&sample, &figures, bounds, state);
            prop_assert!(step.target >= figures.floor && step.target.is_multiple_of(4096));
            if step.target > figures.target {
                prop_assert!(step.target - figures.target <= GIB);
                prop_assert!(step.target <= 7 * GIB);
                prop_assert_eq!(step.doing, BalloonDoing::Inflating);
                prop_assert!(figures.guest.is_some_and(|guest| guest.age < seconds(5)));
                let guest = figures.guest.unwrap_or_default();
                prop_assert!(guest.available - (step.target - figures.target) >= GIB);
                prop_assert!(grown.is_none_or(|then| at > then), "two steps in one second");
                grown = Some(at);
            }
            if step.doing == BalloonDoing::Deflating {
                prop_assert!(figures.target - step.target <= 256 * MIB);
            }
            (state, target) = (next, Some(step.target));
        }
    }
}
