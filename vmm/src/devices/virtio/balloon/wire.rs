//! Layouts of virtio 1.3, 5.5: features, configuration, arrays of page numbers, statistics.

use ebb_core::range::{GpaRange, PAGE_SIZE};
use serde::{Deserialize, Serialize};

/// Device type (virtio 1.3, 5.5.1).
pub const DEVICE_TYPE: u32 = 5;

/// The driver tells the host before it uses a page again (virtio 1.3, 5.5.3).
pub const F_MUST_TELL_HOST: u64 = 1 << 0;
/// There is a statistics queue.
pub const F_STATS_VQ: u64 = 1 << 1;
/// The driver may take pages back when the guest runs out of memory.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver reports the value with which it fills free pages. A Linux that fills pages, but lacks this bit, reports none.
pub const F_PAGE_POISON: u64 = 1 << 4;
/// The driver reports free pages.
pub const F_REPORTING: u64 = 1 << 5;

/// Size in bytes of a page number.
pub const PFN_BYTES: usize = 4;

/// Maximum number of page numbers in an array that Linux sends (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`).
pub const ARRAY_PFNS: usize = 256;

/// Size in bytes of one statistic: le16 tag, le64 value, packed (virtio 1.3, 5.5.6.3).
const STATISTIC_BYTES: usize = 10;

/// Maximum number of bytes of statistics that are read: far more than there are tags.
pub const STATISTICS_BYTES: usize = 64 * STATISTIC_BYTES;

/// Size in bytes of the configuration.
const CONFIG_BYTES: usize = 16;
/// Offset of [`Config::actual`].
const ACTUAL: usize = 4;
/// Offset of [`Config::poison_val`].
const POISON_VAL: usize = 12;

/// The device's configuration (virtio 1.3, 5.5.4): `num_pages` and `actual` in pages of 4 KiB, `free_page_hint_cmd_id`
/// (no hints: 0), `poison_val`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Pages that the host asks for.
    pub num_pages: u32,
    /// Pages that the guest says it has handed back.
    pub actual: u32,
    /// The value with which the guest fills free pages, if [`F_PAGE_POISON`] is negotiated.
    pub poison_val: u32,
}

impl Config {
    /// Reads from `offset`; zero beyond the end.
    pub fn read(self, offset: u64, data: &mut [u8]) {
        let raw = self.raw();
        data.fill(0);
        let tail = usize::try_from(offset).ok().and_then(|at| raw.get(at..));
        for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The configuration after a write of `data` at `offset`: `actual` and `poison_val` can be written.
    #[must_use]
    pub fn written(self, offset: u64, data: &[u8]) -> Self {
        let mut raw = self.raw();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            if let Some(to) = usize::try_from(at).ok().and_then(|at| raw.get_mut(at)) {
                *to = *byte;
            }
        }
        let (words, _) = raw.as_chunks::<4>();
        let word = |offset: usize| {
            words
                .get(offset / 4)
                .map_or(0, |raw| u32::from_le_bytes(*raw))
        };
        Self {
            num_pages: self.num_pages,
            actual: word(ACTUAL),
            poison_val: word(POISON_VAL),
        }
    }

    fn raw(self) -> [u8; CONFIG_BYTES] {
        let mut raw = [0; CONFIG_BYTES];
        raw[..ACTUAL].copy_from_slice(&self.num_pages.to_le_bytes());
        raw[ACTUAL..ACTUAL + 4].copy_from_slice(&self.actual.to_le_bytes());
        raw[POISON_VAL..].copy_from_slice(&self.poison_val.to_le_bytes());
        raw
    }
}

/// The range of page `pfn`.
fn pages(first: u32, count: u64) -> Option<GpaRange> {
    let start = u64::from(first) * PAGE_SIZE;
    GpaRange::new(start, start + count * PAGE_SIZE)
}

/// Collects page numbers and makes ranges of them. Its buffers are allocated once.
#[derive(Debug)]
pub struct Batch {
    pfns: Vec<u32>,
    ranges: Vec<GpaRange>,
}

impl Batch {
    /// Room for `capacity` pages.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            pfns: Vec::with_capacity(capacity),
            ranges: Vec::with_capacity(capacity),
        }
    }

    /// Number of pages that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.pfns.capacity() - self.pfns.len()
    }

    /// Returns true if no pages are in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pfns.is_empty()
    }

    /// Adds the page numbers of `array`. An incomplete number at its end is ignored, and so are numbers that do not fit.
    pub fn push(&mut self, array: &[u8]) {
        let room = self.room();
        let (numbers, _) = array.as_chunks::<PFN_BYTES>();
        self.pfns.extend(
            numbers
                .iter()
                .take(room)
                .map(|raw| u32::from_le_bytes(*raw)),
        );
    }

    /// Empties the batch into sorted ranges that neither touch nor overlap, and counts the pages left out because they
    /// are not RAM. A page that comes twice counts once.
    pub fn merge(&mut self, is_ram: impl Fn(GpaRange) -> bool) -> (&[GpaRange], u64) {
        self.pfns.sort_unstable();
        self.pfns.dedup();
        self.ranges.clear();
        let mut refused = 0;
        for run in self.pfns.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some((first, range)) = run
                .first()
                .and_then(|&first| Some((first, pages(first, run.len() as u64)?)))
            else {
                continue;
            };
            if is_ram(range) {
                self.ranges.push(range);
                continue;
            }
            refused += split(first, run.len(), &is_ram, &mut self.ranges);
        }
        self.pfns.clear();
        (&self.ranges, refused)
    }
}

/// Adds those of `count` pages from `first` on that are RAM to `ranges`. Returns how many are not.
fn split(
    first: u32,
    count: usize,
    is_ram: &impl Fn(GpaRange) -> bool,
    ranges: &mut Vec<GpaRange>,
) -> u64 {
    let mut refused = 0;
    let known = ranges.len();
    for page in (first..=u32::MAX)
        .take(count)
        .filter_map(|pfn| pages(pfn, 1))
    {
        if !is_ram(page) {
            refused += 1;
            continue;
        }
        let grown = ranges
            .get(known..)
            .and_then(<[GpaRange]>::last)
            .filter(|last| last.end() == page.start())
            .and_then(|last| GpaRange::new(last.start(), page.end()));
        if let (Some(grown), Some(last)) = (grown, ranges.last_mut()) {
            *last = grown;
        } else {
            ranges.push(page);
        }
    }
    refused
}

/// Memory statistics of the guest (virtio 1.3, 5.5.6.3; those from `oom_kill` on are Linux's, in virtio_balloon.h since
/// 6.10), in bytes unless they are numbers. `None`: not reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// Memory that was swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Memory that was swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Number of major page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Number of minor page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Unused memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// All memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Memory that is available without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Memory of disk caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Number of successful hugetlb allocations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Number of failed hugetlb allocations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Number of processes that were killed for lack of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Number of allocations that waited for memory to be reclaimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Memory that was looked through in the background for what could be reclaimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// Memory that allocations have looked through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Memory that was reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// Memory that allocations have reclaimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

impl Statistics {
    /// Stores the entries of `raw`. Unknown tags are ignored, and so is an incomplete entry at the end.
    pub fn update(&mut self, raw: &[u8]) {
        let (entries, _) = raw.as_chunks::<STATISTIC_BYTES>();
        for &[t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] in entries {
            let value = u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]);
            let field = match u16::from_le_bytes([t0, t1]) {
                0 => &mut self.swap_in,
                1 => &mut self.swap_out,
                2 => &mut self.major_faults,
                3 => &mut self.minor_faults,
                4 => &mut self.free_memory,
                5 => &mut self.total_memory,
                6 => &mut self.available_memory,
                7 => &mut self.disk_caches,
                8 => &mut self.hugetlb_allocations,
                9 => &mut self.hugetlb_failures,
                10 => &mut self.oom_kill,
                11 => &mut self.alloc_stall,
                12 => &mut self.async_scan,
                13 => &mut self.direct_scan,
                14 => &mut self.async_reclaim,
                15 => &mut self.direct_reclaim,
                _ => continue,
            };
            *field = Some(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn array(pfns: &[u32]) -> Vec<u8> {
        pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect()
    }

    fn range(first: u64, end: u64) -> GpaRange {
        GpaRange::new(first * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    #[test]
    fn pages_become_merged_ranges() {
        let mut batch = Batch::with_capacity(16);
        batch.push(&array(&[9, 3, 5, 4, 3, 10, u32::MAX]));
        let ram = |range: GpaRange| range.end() <= 0x10_0000_0000;
        assert_eq!(batch.merge(ram), (&[range(3, 6), range(9, 11)][..], 1));
        assert!(batch.is_empty());
    }

    #[test]
    fn a_hole_splits_a_range() {
        let mut batch = Batch::with_capacity(16);
        batch.push(&array(&[1, 2, 3, 4, 5]));
        let ram = |range: GpaRange| {
            range
                .intersection(GpaRange::new(3 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap())
                .is_none()
        };
        assert_eq!(batch.merge(ram), (&[range(1, 3), range(4, 6)][..], 1));
    }

    #[test]
    fn what_does_not_fit_is_left_and_nothing_grows() {
        let mut batch = Batch::with_capacity(4);
        batch.push(&[0; 100]);
        assert_eq!((batch.room(), batch.pfns.capacity()), (0, 4));
    }

    #[test]
    fn only_actual_and_poison_can_be_written() {
        let config = Config {
            num_pages: 7,
            actual: 0x0403_0201,
            poison_val: 9,
        };
        let actual = |actual| Config { actual, ..config };
        assert_eq!(config.written(4, &5_u32.to_le_bytes()), actual(5));
        assert_eq!(config.written(0, &[0xff; 8]), actual(u32::MAX));
        assert_eq!(config.written(0, &[0xff; 4]), config);
        assert_eq!(config.written(6, &[0xff; 4]), actual(0xffff_0201));
        assert_eq!(config.written(u64::MAX, &[0xff, 0xff]), config);
        let poisoned = Config {
            poison_val: 0xaaaa_aaaa,
            ..config
        };
        assert_eq!(config.written(14, &[9, 0, 1]).poison_val, 0x0009_0009);
        assert_eq!(
            config.written(12, &poisoned.poison_val.to_le_bytes()),
            poisoned
        );
        assert_eq!(config.written(16, &[1; 4]), config);
        let mut data = [0xee; 4];
        config.read(6, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        config.read(12, &mut data);
        assert_eq!(data, [9, 0, 0, 0]);
        config.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn statistics_are_packed_and_unknown_tags_ignored() {
        let mut raw = vec![];
        for (tag, value) in [(4_u16, 1000_u64), (0x7777, 1), (9, 3), (4, 2000), (10, 7)] {
            raw.extend(tag.to_le_bytes());
            raw.extend(value.to_le_bytes());
        }
        raw.push(1);
        let mut statistics = Statistics::default();
        statistics.update(&raw);
        let expected = Statistics {
            free_memory: Some(2000),
            hugetlb_failures: Some(3),
            oom_kill: Some(7),
            ..Statistics::default()
        };
        assert_eq!(statistics, expected);
    }

    #[test]
    fn each_tag_has_a_field_of_its_own() {
        let mut raw = vec![];
        for tag in 0..16_u16 {
            raw.extend(tag.to_le_bytes());
            raw.extend(u64::from(100 + tag).to_le_bytes());
        }
        let mut statistics = Statistics::default();
        statistics.update(&raw);
        let expected = Statistics {
            swap_in: Some(100),
            swap_out: Some(101),
            major_faults: Some(102),
            minor_faults: Some(103),
            free_memory: Some(104),
            total_memory: Some(105),
            available_memory: Some(106),
            disk_caches: Some(107),
            hugetlb_allocations: Some(108),
            hugetlb_failures: Some(109),
            oom_kill: Some(110),
            alloc_stall: Some(111),
            async_scan: Some(112),
            direct_scan: Some(113),
            async_reclaim: Some(114),
            direct_reclaim: Some(115),
        };
        assert_eq!(statistics, expected);
    }

    proptest! {
        #[test]
        fn merging_keeps_exactly_the_pages_that_are_ram(
            pfns in prop::collection::vec(prop_oneof![0..64_u32, (u32::MAX - 8)..=u32::MAX], 0..200),
            mask: u64,
        ) {
            let ram_page = |pfn: u64| pfn < 64 && mask >> pfn & 1 == 1;
            let mut batch = Batch::with_capacity(200);
            batch.push(&array(&pfns));
            let (ranges, refused) = batch.merge(|range| {
                (range.start()..range.end()).step_by(PAGE_SIZE as usize).all(|at| ram_page(at / PAGE_SIZE))
            });
            prop_assert!(ranges.is_sorted_by(|a, b| a.end() <= b.start()));
            let kept: Vec<_> = ranges.iter()
                .flat_map(|range| (range.start()..range.end()).step_by(PAGE_SIZE as usize))
                .map(|at| at / PAGE_SIZE).collect();
            let wanted: std::collections::BTreeSet<_> = pfns.iter().map(|&pfn| u64::from(pfn)).collect();
            prop_assert_eq!(refused as usize, wanted.iter().filter(|pfn| !ram_page(**pfn)).count());
            prop_assert_eq!(kept, wanted.into_iter().filter(|pfn| ram_page(*pfn)).collect::<Vec<_>>());
        }
    }
}
