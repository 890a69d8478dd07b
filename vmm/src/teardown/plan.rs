//! How the guest's memory is cut up. Pure.

use std::collections::BTreeMap;

use ebb_core::range::{BLOCK_SIZE, GpaRange};

use crate::sys::heir::MAX_WORKERS;

/// Bytes of a batch of small pages unless told otherwise: 20 ms of work, so that uneven workers end
/// together, a guest of 1 GiB has enough for all, and taking a batch costs nothing beside it.
pub const DEFAULT_BATCH: u64 = 256 << 20;

/// The same for huge pages, which are freed more than thirty times as fast.
pub const DEFAULT_HUGE_BATCH: u64 = 4 << 30;

/// More workers than this only meet at the zone locks (Lu 2017: four workers free 320 GiB as fast as
/// sixteen); on a host of several nodes so many for each.
pub const WORKERS_PER_NODE: usize = 8;

/// Most batches: a plan takes 1 MiB at most, however small the batch that was asked for.
pub const MAX_BATCHES: u64 = 1 << 16;

/// How a teardown is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Threads that free memory at the same time, 1 to [`MAX_WORKERS`].
    pub workers: usize,
    /// Bytes that a worker takes at once, rounded up to whole blocks of 2 MiB; `None`: as fits the pages.
    pub batch: Option<u64>,
}

impl Tuning {
    /// What fits a host with so many `cores` on so many memory `nodes`: a worker for each core, at least 2
    /// and at most [`WORKERS_PER_NODE`] for each node.
    #[must_use]
    pub fn for_host(cores: usize, nodes: usize) -> Self {
        let most = nodes.saturating_mul(WORKERS_PER_NODE).clamp(2, MAX_WORKERS);
        Self {
            workers: cores.clamp(2, most),
            batch: None,
        }
    }
}

/// What memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// 4 KiB, or transparent huge pages where the kernel found some.
    Small,
    /// hugetlb pages of 2 MiB.
    Huge,
}

/// A part of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it lies.
    pub range: GpaRange,
    /// What it is made of.
    pub pages: Pages,
    /// Bytes, a multiple of 2 MiB: what lies between two multiples of it is one worker's, whatever the batch. 2 MiB,
    /// the reach of a page table, or a file behind the memory.
    pub unit: u64,
}

/// Which batches there are, and how many workers free them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    batches: Vec<GpaRange>,
    workers: usize,
}

impl Plan {
    /// The batches, in the order in which they are taken.
    #[must_use]
    pub fn batches(&self) -> &[GpaRange] {
        &self.batches
    }

    /// Threads that free them, the caller among them; 1: so little memory that no thread is started.
    #[must_use]
    pub const fn workers(&self) -> usize {
        self.workers
    }

    /// Bytes of all batches.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.batches.iter().map(|batch| batch.len()).sum()
    }
}

/// Cuts `regions` into batches. Batches end at multiples of their size, so that no two workers meet in
/// one page table. They are taken in turn from the memory nodes that `node_of` tells, so that workers at
/// work at the same time meet at different zone locks.
#[must_use]
pub fn plan(
    regions: impl IntoIterator<Item = Region>,
    tuning: Tuning,
    mut node_of: impl FnMut(GpaRange) -> u32,
) -> Plan {
    let regions: Vec<_> = regions.into_iter().collect();
    let bytes: u64 = regions.iter().map(|region| region.range.len()).sum();
    let least = (bytes / MAX_BATCHES).max(BLOCK_SIZE);
    let mut by_node: BTreeMap<u32, Vec<GpaRange>> = BTreeMap::new();
    let mut worth_sharing = 0.0;
    for region in regions {
        let default = match region.pages {
            Pages::Small => DEFAULT_BATCH,
            Pages::Huge => DEFAULT_HUGE_BATCH,
        };
        let size = tuning.batch.unwrap_or(default).clamp(least, 1 << 62);
        let size = size.next_multiple_of(region.unit.max(BLOCK_SIZE));
        #[allow(clippy::cast_precision_loss, reason = "compared with 1")]
        let batches = region.range.len() as f64 / size as f64;
        worth_sharing += batches;
        for batch in cut(region.range, size) {
            by_node.entry(node_of(batch)).or_default().push(batch);
        }
    }
    let batches = in_turn(by_node.into_values().collect());
    let workers = if worth_sharing <= 1.0 {
        1
    } else {
        tuning.workers.min(batches.len()).clamp(1, MAX_WORKERS)
    };
    Plan { batches, workers }
}

/// Cuts `range` at the multiples of `size`.
fn cut(range: GpaRange, size: u64) -> impl Iterator<Item = GpaRange> {
    let mut rest = Some(range);
    std::iter::from_fn(move || {
        let part = rest?;
        let border = (part.start() / size + 1).saturating_mul(size);
        let end = border.min(part.end());
        rest = GpaRange::new(end, part.end());
        GpaRange::new(part.start(), end)
    })
}

/// The first of each queue, then the second of each, and so on.
fn in_turn(queues: Vec<Vec<GpaRange>>) -> Vec<GpaRange> {
    let longest = queues.iter().map(Vec::len).max().unwrap_or(0);
    let turn = |index| {
        queues
            .iter()
            .filter_map(move |queue| queue.get(index).copied())
    };
    (0..longest).flat_map(turn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * MIB, end * MIB).unwrap()
    }

    fn region(range: GpaRange) -> Region {
        Region {
            range,
            pages: Pages::Small,
            unit: BLOCK_SIZE,
        }
    }

    fn planned(regions: &[GpaRange], workers: usize, batch: u64) -> Plan {
        let batch = Some(batch * MIB);
        let regions = regions.iter().copied().map(region);
        plan(regions, Tuning { workers, batch }, |_| 0)
    }

    #[test]
    fn batches_cover_the_regions_once_and_in_order() {
        let regions = [range(1, 300), range(512, 1025)];
        let plan = planned(&regions, 4, 256);
        let want = [
            range(1, 256),
            range(256, 300),
            range(512, 768),
            range(768, 1024),
            range(1024, 1025),
        ];
        assert_eq!(plan.batches(), want);
        assert_eq!((plan.workers(), plan.bytes()), (4, 812 * MIB));
    }

    #[test]
    fn small_machines_start_no_thread_and_no_thread_is_idle() {
        let workers = |regions: &[_], workers| planned(regions, workers, 256).workers();
        assert_eq!(workers(&[range(0, 128), range(512, 640)], 8), 1);
        assert_eq!(workers(&[range(0, 257)], 8), 2);
        assert_eq!(workers(&[range(0, 2560)], 0), 1);
        assert_eq!(workers(&[range(0, 1 << 20)], 999), MAX_WORKERS);
        assert_eq!(workers(&[], 8), 1);
    }

    #[test]
    fn huge_pages_come_in_bigger_batches() {
        let tuning = Tuning::for_host(2, 1);
        for (pages, gib, workers) in [
            (Pages::Small, 1, 2),
            (Pages::Huge, 4, 1),
            (Pages::Huge, 5, 2),
        ] {
            let range = range(0, gib << 10);
            let region = Region {
                pages,
                ..region(range)
            };
            let plan = plan([region], tuning, |_| 0);
            assert_eq!(plan.workers(), workers, "{pages:?} {gib} GiB");
        }
    }

    #[test]
    fn no_two_workers_meet_in_a_file() {
        let region = Region {
            unit: 64 * MIB,
            ..region(range(32, 300))
        };
        for (batch, starts) in [
            (2, &[32, 64, 128, 192, 256][..]),
            (65, &[32, 128, 256]),
            (512, &[32]),
        ] {
            let tuning = Tuning {
                workers: 2,
                batch: Some(batch * MIB),
            };
            let plan = plan([region], tuning, |_| 0);
            let found: Vec<_> = plan.batches().iter().map(|it| it.start() / MIB).collect();
            assert_eq!(found, starts, "{batch}");
        }
    }

    #[test]
    fn nodes_take_turns() {
        let node = |range: GpaRange| u32::from(range.start() >= 6 * MIB);
        let tuning = Tuning {
            workers: 2,
            batch: Some(2 * MIB),
        };
        let plan = plan([region(range(0, 10))], tuning, node);
        let starts: Vec<_> = plan.batches().iter().map(|it| it.start() / MIB).collect();
        assert_eq!(starts, [0, 6, 2, 8, 4]);
    }

    #[test]
    fn odd_sizes_are_rounded_to_blocks_and_plans_stay_small() {
        for (batch, count) in [(0, 5), (1, 5), (3, 3), (u64::MAX / MIB, 1)] {
            let found = planned(&[range(0, 10)], 2, batch).batches().len();
            assert_eq!(found, count, "{batch}");
        }
        let top = GpaRange::new((1 << 62) - 4096, (1 << 62) + 4096).unwrap();
        assert_eq!(planned(&[top], 2, 256).bytes(), 8192);
        let batches = planned(&[range(0, 64 << 20)], 2, 2).batches().len() as u64;
        assert!(batches <= MAX_BATCHES + 1, "{batches}");
    }

    #[test]
    fn workers_follow_cores_and_nodes() {
        let workers = |cores, nodes| Tuning::for_host(cores, nodes).workers;
        assert_eq!((workers(1, 1), workers(2, 1), workers(128, 1)), (2, 2, 8));
        assert_eq!((workers(128, 2), workers(256, 64)), (16, MAX_WORKERS));
    }
}
