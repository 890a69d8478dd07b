//! The balloon that runs itself, as the reclaim thread sees it: looks at device and guest, asks the policy, sets the
//! target, and counts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{
    BalloonBounds, BalloonDoing, BalloonFigures, BalloonState, Reclaimer, Sample, run_balloon,
};
use crate::sys::resident_bytes;

/// Minimum time between two looks: to count lazily free memory takes some milliseconds.
const APART: Duration = Duration::from_millis(700);

/// A balloon, and what is known of its guest.
pub trait BalloonDevice: Send {
    /// The balloon and its guest. What comes after [`BalloonFigures::guest`] is not the device's to know, and 0.
    fn figures(&self) -> BalloonFigures;

    /// Lazily free RAM in bytes that the host still holds.
    fn lazy_resident(&self) -> u64;

    /// Asks the guest to hand back `bytes`, or what an operator asked for, if that is more.
    fn set_target(&self, bytes: u64);
}

ebb_core::metrics! {
    /// What a balloon that runs itself has done: changes of its target.
    pub struct AutoBalloonStats from struct Counters {
        /// Steps that made it larger.
        inflations_total: Counter,
        /// Steps that made it smaller because there had been plenty for a while.
        deflations_total: Counter,
        /// Times that it gave back because the guest's available memory was below its reserve.
        reserve_backoffs_total: Counter,
        /// Times that it gave back because the guest read pages from disk again.
        fault_backoffs_total: Counter,
        /// Times that it gave back because the guest's kernel had killed a process for lack of memory.
        oom_backoffs_total: Counter,
        /// Times that the guest had taken pages back by itself.
        taken_back_total: Counter,
        /// Times that the guest did not hand over what it was asked for.
        stuck_total: Counter,
    }
}

/// What a balloon that runs itself is doing, for whoever asks.
#[derive(Debug)]
pub struct BalloonReport {
    bounds: BalloonBounds,
    doing: Mutex<BalloonDoing>,
    counters: Counters,
}

impl BalloonReport {
    /// Its bounds.
    #[must_use]
    pub const fn bounds(&self) -> BalloonBounds {
        self.bounds
    }

    /// What it did at the last look, or why it did nothing.
    #[must_use]
    pub fn doing(&self) -> BalloonDoing {
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it has done until now.
    #[must_use]
    pub fn stats(&self) -> AutoBalloonStats {
        self.counters.snapshot()
    }

    fn note(&self, doing: BalloonDoing, changed: bool) {
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = doing;
        let counters = &self.counters;
        let counter = match doing {
            _ if !changed => return,
            BalloonDoing::Inflating => &counters.inflations_total,
            BalloonDoing::Deflating => &counters.deflations_total,
            BalloonDoing::Reserve => &counters.reserve_backoffs_total,
            BalloonDoing::Faults => &counters.fault_backoffs_total,
            BalloonDoing::OutOfMemory => &counters.oom_backoffs_total,
            BalloonDoing::TakenBack => &counters.taken_back_total,
            BalloonDoing::Stuck => &counters.stuck_total,
            _ => return,
        };
        counter.increment();
    }
}

/// Runs a balloon.
pub struct AutoBalloon {
    device: Box<dyn BalloonDevice>,
    /// Resident memory tells what the guest has touched; not so with arenas, which are resident, too.
    counts_resident: bool,
    state: BalloonState,
    looked: Option<Duration>,
    report: Arc<BalloonReport>,
}

impl AutoBalloon {
    /// Runs `device` within `bounds`, for a machine with or without `arenas`.
    #[must_use]
    pub fn new(device: Box<dyn BalloonDevice>, bounds: BalloonBounds, arenas: bool) -> Self {
        Self {
            device,
            counts_resident: !arenas,
            state: BalloonState::default(),
            looked: None,
            report: Arc::new(BalloonReport {
                bounds,
                doing: Mutex::default(),
                counters: Counters::default(),
            }),
        }
    }

    /// What it is doing.
    #[must_use]
    pub const fn report(&self) -> &Arc<BalloonReport> {
        &self.report
    }

    /// Does what `sample` and the guest call for, when `reclaimer` has answered the sample.
    pub(super) fn look(&mut self, reclaimer: &Reclaimer, sample: &Sample) {
        let soon = |looked: Duration| sample.at.saturating_sub(looked) < APART;
        if self.looked.is_some_and(soon) {
            return;
        }
        self.looked = Some(sample.at);
        let tracked = tracked(reclaimer);
        // Without a cgroup's limit and without need the answer does not depend on it, and to count takes about 1 ms.
        let limited = sample.own.room.total > 0 || sample.above.room.total > 0;
        let matters = tracked > 0 && (limited || !sample.is_calm());
        let left = if matters {
            self.device.lazy_resident()
        } else {
            0
        };
        let figures = BalloonFigures {
            untouched: self.untouched(tracked, left),
            left,
            listed: sample.free,
            ..self.device.figures()
        };
        let bounds = self.report.bounds;
        let (step, state) = run_balloon(sample, &figures, bounds, self.state);
        self.state = state;
        let changed = step.target != figures.target;
        if changed {
            self.device.set_target(step.target);
            tracing::info!(
                from = figures.target,
                to = step.target,
                doing = ?step.doing,
                "balloon"
            );
        }
        self.report.note(step.doing, changed);
    }

    /// What the guest has in use or free, and the host holds no page for. Of the RAM `tracked` is lazily free, and `left`
    /// of that resident.
    fn untouched(&self, tracked: u64, left: u64) -> u64 {
        let Some(resident) = resident_bytes().filter(|_| self.counts_resident) else {
            return u64::MAX;
        };
        let guests = self.report.bounds.memory.saturating_sub(tracked);
        guests.saturating_sub(resident.saturating_sub(left))
    }
}

/// Lazily free RAM in bytes, in whatever state.
fn tracked(reclaimer: &Reclaimer) -> u64 {
    let stats = reclaimer.lazy.snapshot();
    stats.lazy_bytes + stats.unmapped_bytes + stats.reclaiming_bytes + stats.discarded_bytes
}

#[cfg(test)]
mod tests {
    use ebb_core::generation::{Gate, VmGeneration};
    use ebb_core::lazy::LazyMemory;
    use ebb_core::range::GpaRange;

    use super::*;
    use crate::memory::{Backing, GuestRam};
    use crate::reclaim::{GuestFigures, Limit, ReclaimTuning, Room};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// A device with these figures, whose guest follows at once.
    #[derive(Clone)]
    struct Device(Arc<Mutex<BalloonFigures>>);

    impl BalloonDevice for Device {
        fn figures(&self) -> BalloonFigures {
            *self.0.lock().unwrap()
        }

        fn lazy_resident(&self) -> u64 {
            5 * MIB
        }

        fn set_target(&self, bytes: u64) {
            let mut figures = self.0.lock().unwrap();
            (figures.target, figures.actual) = (bytes, bytes);
        }
    }

    fn reclaimer(free: &[GpaRange]) -> Reclaimer {
        let ram = GpaRange::new(0, 256 * MIB).unwrap();
        let ram = Arc::new(GuestRam::allocate(Backing::default(), &[ram]).unwrap());
        let generation = Arc::new(VmGeneration::default());
        let gate = Arc::new(Gate::without_vcpus(Arc::clone(&generation)));
        let lazy = Arc::new(LazyMemory::new(generation));
        lazy.free(free);
        Reclaimer::new(lazy, ram, gate, ReclaimTuning::default())
    }

    fn auto(device: &Device, memory: u64, arenas: bool) -> AutoBalloon {
        let bounds = BalloonBounds {
            memory,
            reserve: memory / 8,
        };
        AutoBalloon::new(Box::new(device.clone()), bounds, arenas)
    }

    #[test]
    fn targets_are_set_and_counted() {
        let guest = GuestFigures {
            free: 4 * GIB,
            available: 6 * GIB,
            ..GuestFigures::default()
        };
        let device = Device(Arc::new(Mutex::new(BalloonFigures {
            bound: true,
            guest: Some(guest),
            ..BalloonFigures::default()
        })));
        let (mut balloon, reclaimer) = (auto(&device, 8 * GIB, true), reclaimer(&[]));
        let report = Arc::clone(balloon.report());
        let mut look = |millis, total| {
            let room = Room {
                total,
                available: total / 4,
            };
            let own = Limit {
                room,
                ..Limit::default()
            };
            let sample = Sample {
                at: Duration::from_millis(millis),
                own,
                ..Sample::default()
            };
            balloon.look(&reclaimer, &sample);
            (device.figures().target, report.doing())
        };
        let first = look(2000, 6 * GIB);
        assert_eq!(first, (GIB, BalloonDoing::Inflating));
        assert_eq!(look(2600, 6 * GIB), first, "too soon");
        assert_eq!(look(2900, 6 * GIB), (GIB, BalloonDoing::Following));
        assert_eq!(look(3900, 6 * GIB), (2 * GIB, BalloonDoing::Inflating));
        for second in 5..20 {
            look(second * 1000, 0);
        }
        assert_eq!(report.doing(), BalloonDoing::Deflating);
        let stats = report.stats();
        assert_eq!((stats.inflations_total, stats.deflations_total), (2, 3));
        assert_eq!(report.bounds().reserve, GIB);
    }

    #[test]
    fn each_reason_has_its_counter() {
        let device = Device(Arc::default());
        let report = Arc::clone(auto(&device, GIB, false).report());
        let reasons = [
            BalloonDoing::Reserve,
            BalloonDoing::Faults,
            BalloonDoing::OutOfMemory,
            BalloonDoing::TakenBack,
            BalloonDoing::Stuck,
            BalloonDoing::NoDriver,
        ];
        for (count, doing) in (1..).zip(reasons) {
            report.note(doing, false);
            (0..count).for_each(|_| report.note(doing, true));
        }
        let expected = AutoBalloonStats {
            reserve_backoffs_total: 1,
            fault_backoffs_total: 2,
            oom_backoffs_total: 3,
            taken_back_total: 4,
            stuck_total: 5,
            ..AutoBalloonStats::default()
        };
        assert_eq!(report.stats(), expected);
    }

    #[test]
    fn what_the_guest_has_not_touched_is_what_is_neither_resident_nor_lazily_free() {
        const MEMORY: u64 = 1 << 40;
        let device = Device(Arc::default());
        let freed = GpaRange::new(0, 100 * MIB).unwrap();
        let resident = resident_bytes().unwrap();
        let tracked = tracked(&reclaimer(&[freed]));
        assert_eq!(tracked, 100 * MIB);
        let untouched = auto(&device, MEMORY, false).untouched(tracked, 5 * MIB);
        let expected = MEMORY - 100 * MIB - (resident - 5 * MIB);
        assert!(untouched.abs_diff(expected) < GIB, "{untouched} {expected}");
        let all = auto(&device, MEMORY, true).untouched(tracked, 0);
        assert_eq!(all, u64::MAX, "arenas are resident, too");
        assert_eq!(auto(&device, MIB, false).untouched(tracked, 0), 0);
    }
}
