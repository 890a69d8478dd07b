//! How the guest's memory is cut up. Pure.

use crate::memory::{BLOCK_SIZE, GpaRange};

/// Bytes of a batch unless told otherwise: 20 ms of work in pages of 4 KiB, so that uneven workers end
/// together and taking a batch costs nothing beside it.
pub const DEFAULT_BATCH: u64 = 256 << 20;

/// More workers than this only meet at the zone locks (Lu 2017: four workers free 320 GiB as fast as
/// sixteen).
pub const MAX_DEFAULT_WORKERS: usize = 8;

/// How a teardown is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Threads that free memory at the same time.
    pub workers: usize,
    /// Bytes that a worker takes at once; rounded up to whole blocks of 2 MiB.
    pub batch: u64,
}

impl Default for Tuning {
    /// One worker for each core, at least 2 and at most [`MAX_DEFAULT_WORKERS`]; [`DEFAULT_BATCH`].
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            workers: cores.clamp(2, MAX_DEFAULT_WORKERS),
            batch: DEFAULT_BATCH,
        }
    }
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

    /// Threads to start; 0: so little memory that the caller frees it itself.
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
/// one page table.
#[must_use]
pub fn plan(regions: impl IntoIterator<Item = GpaRange>, tuning: Tuning) -> Plan {
    let size = tuning
        .batch
        .clamp(BLOCK_SIZE, 1 << 62)
        .next_multiple_of(BLOCK_SIZE);
    let mut batches = Vec::new();
    let mut bytes = 0;
    for region in regions {
        bytes += region.len();
        let mut rest = Some(region);
        while let Some(part) = rest {
            let border = (part.start() / size + 1).saturating_mul(size);
            let end = border.min(part.end());
            batches.extend(GpaRange::new(part.start(), end));
            rest = GpaRange::new(end, part.end());
        }
    }
    let workers = if bytes <= size {
        0
    } else {
        tuning.workers.min(batches.len())
    };
    Plan { batches, workers }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * MIB, end * MIB).unwrap()
    }

    fn planned(regions: &[GpaRange], workers: usize, batch: u64) -> Plan {
        let batch = batch * MIB;
        plan(regions.iter().copied(), Tuning { workers, batch })
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
        assert_eq!(
            planned(&[range(0, 128), range(512, 640)], 8, 256).workers(),
            0
        );
        assert_eq!(planned(&[range(0, 257)], 8, 256).workers(), 2);
        assert_eq!(planned(&[range(0, 2560)], 0, 256).workers(), 0);
        assert_eq!(
            planned(&[], 8, 256),
            Plan {
                batches: vec![],
                workers: 0
            }
        );
    }

    #[test]
    fn odd_sizes_are_rounded_to_blocks() {
        for (batch, count) in [(0, 5), (1, 5), (3, 3), (u64::MAX / MIB, 1)] {
            let count_found = planned(&[range(0, 10)], 2, batch).batches().len();
            assert_eq!(count_found, count, "{batch}");
        }
        let top = GpaRange::new((1 << 62) - 4096, (1 << 62) + 4096).unwrap();
        assert_eq!(planned(&[top], 2, 256).bytes(), 8192);
    }

    #[test]
    fn there_are_at_least_two_workers_by_default() {
        let tuning = Tuning::default();
        assert!((2..=MAX_DEFAULT_WORKERS).contains(&tuning.workers));
    }
}
