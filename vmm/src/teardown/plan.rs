//! How the guest's memory is divided among workers. Pure.

use ebb_core::range::{BLOCK_SIZE, GpaRange};

/// Maximum number of workers.
pub const MAX_WORKERS: usize = 64;

/// Default for the workers of a host, per memory node. More of them only wait for each other at the locks of the node's
/// page allocator (Lu 2017: four workers free 320 GiB as fast as sixteen).
pub const WORKERS_PER_NODE: usize = 8;

/// Maximum number of batches, however small the batch size that was asked for, so that a plan takes 1 MiB at most.
pub const MAX_BATCHES: u64 = 1 << 16;

/// The default number of workers on a host with `cores` processors and `nodes` memory nodes: one for each processor, at
/// least 2, and at most [`WORKERS_PER_NODE`] for each node.
#[must_use]
pub fn default_workers(cores: usize, nodes: usize) -> usize {
    let max = nodes.saturating_mul(WORKERS_PER_NODE).clamp(2, MAX_WORKERS);
    cores.clamp(2, max)
}

/// The size of the pages behind the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB, or transparent huge pages where the kernel has found some.
    Small,
    /// hugetlb pages of 2 MiB.
    Huge,
}

impl PageSize {
    /// Default size of a batch in bytes. With small pages a batch is 20 ms of work: so workers end at about the same time,
    /// a guest of 1 GiB has enough batches for all of them, and taking one costs nothing compared with freeing it. Huge
    /// pages are freed more than thirty times as fast.
    #[must_use]
    pub const fn default_batch(self) -> u64 {
        match self {
            Self::Small => 256 << 20,
            Self::Huge => 4 << 30,
        }
    }
}

/// A part of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its guest-physical addresses.
    pub range: GpaRange,
    /// What it is made of.
    pub page_size: PageSize,
    /// Bytes, a multiple of 2 MiB. All memory between two multiples of it goes to one worker, whatever the batch size. It is
    /// 2 MiB, which is what one page table maps, or the size of the files behind the memory.
    pub unit: u64,
}

/// The batches, and how many workers are worth while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    batches: Vec<GpaRange>,
    max_workers: usize,
}

impl Plan {
    /// The batches, in the order of their addresses.
    #[must_use]
    pub fn batches(&self) -> &[GpaRange] {
        &self.batches
    }

    /// How many workers are worth while, the caller among them: at most one per batch, and 1 if there is so little
    /// memory that starting a thread would take longer.
    #[must_use]
    pub const fn max_workers(&self) -> usize {
        self.max_workers
    }

    /// Bytes of all batches.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.batches.iter().map(|batch| batch.len()).sum()
    }
}

/// Divides `regions` into batches of `batch` bytes, rounded up to whole blocks of 2 MiB and to whole units; `None` is the
/// default for the page size. Batches end at multiples of their size, so that no two workers meet in one page table.
#[must_use]
pub fn plan(regions: impl IntoIterator<Item = Region>, batch: Option<u64>) -> Plan {
    let regions: Vec<_> = regions.into_iter().collect();
    let bytes: u64 = regions.iter().map(|region| region.range.len()).sum();
    let min_size = (bytes / MAX_BATCHES).max(BLOCK_SIZE);
    let mut batches = Vec::new();
    let mut full_batches = 0.0;
    for region in regions {
        let size = batch.unwrap_or(region.page_size.default_batch());
        let size = size.clamp(min_size, 1 << 62);
        let size = size.next_multiple_of(region.unit.max(BLOCK_SIZE));
        #[allow(clippy::cast_precision_loss, reason = "compared with 1")]
        let in_region = region.range.len() as f64 / size as f64;
        full_batches += in_region;
        batches.extend(cut(region.range, size));
    }
    let max_workers = if full_batches <= 1.0 {
        1
    } else {
        batches.len().min(MAX_WORKERS)
    };
    Plan {
        batches,
        max_workers,
    }
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
            page_size: PageSize::Small,
            unit: BLOCK_SIZE,
        }
    }

    /// Batches of `batch` MiB.
    fn planned(regions: &[GpaRange], batch: u64) -> Plan {
        let regions = regions.iter().copied().map(region);
        plan(regions, Some(batch * MIB))
    }

    #[test]
    fn batches_cover_the_regions_once_and_in_order() {
        let regions = [range(1, 300), range(512, 1025)];
        let plan = planned(&regions, 256);
        let want = [
            range(1, 256),
            range(256, 300),
            range(512, 768),
            range(768, 1024),
            range(1024, 1025),
        ];
        assert_eq!(plan.batches(), want);
        assert_eq!((plan.max_workers(), plan.bytes()), (5, 812 * MIB));
    }

    #[test]
    fn small_machines_start_no_thread_and_no_thread_is_idle() {
        let workers = |regions: &[_]| planned(regions, 256).max_workers();
        assert_eq!(workers(&[range(0, 128), range(512, 640)]), 1);
        assert_eq!(workers(&[range(0, 257)]), 2);
        assert_eq!(workers(&[range(0, 2560)]), 10);
        assert_eq!(workers(&[range(0, 1 << 20)]), MAX_WORKERS);
        assert_eq!(workers(&[]), 1);
    }

    #[test]
    fn huge_pages_come_in_bigger_batches() {
        for (page_size, gib, batches) in [
            (PageSize::Small, 1, 4),
            (PageSize::Huge, 4, 1),
            (PageSize::Huge, 5, 2),
        ] {
            let range = range(0, gib << 10);
            let region = Region {
                page_size,
                ..region(range)
            };
            let plan = plan([region], None);
            assert_eq!(plan.batches().len(), batches, "{page_size:?} {gib} GiB");
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
            let plan = plan([region], Some(batch * MIB));
            let found: Vec<_> = plan.batches().iter().map(|it| it.start() / MIB).collect();
            assert_eq!(found, starts, "{batch}");
        }
    }

    #[test]
    fn odd_sizes_are_rounded_to_blocks_and_plans_stay_small() {
        for (batch, count) in [(0, 5), (1, 5), (3, 3), (u64::MAX / MIB, 1)] {
            let found = planned(&[range(0, 10)], batch).batches().len();
            assert_eq!(found, count, "{batch}");
        }
        let top = GpaRange::new((1 << 62) - 4096, (1 << 62) + 4096).unwrap();
        assert_eq!(planned(&[top], 256).bytes(), 8192);
        let batches = planned(&[range(0, 64 << 20)], 2).batches().len() as u64;
        assert!(batches <= MAX_BATCHES + 1, "{batches}");
    }

    #[test]
    fn workers_follow_cores_and_nodes() {
        let few = [(1, 1), (2, 1), (128, 1)].map(|(cores, nodes)| default_workers(cores, nodes));
        assert_eq!(few, [2, 2, 8]);
        assert_eq!(default_workers(128, 2), 16);
        assert_eq!(default_workers(256, 64), MAX_WORKERS);
    }
}
