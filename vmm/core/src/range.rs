//! Ranges of guest-physical addresses.

/// Size in bytes of a page, the smallest unit that a guest can free.
pub const PAGE_SIZE: u64 = 4096;

/// Size in bytes of a block, which the host can map as one huge page. Reclaim takes whole blocks first, so that no
/// huge page is split.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// A half-open range of guest-physical addresses, never empty, aligned to [`PAGE_SIZE`] at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpaRange {
    start: u64,
    end: u64,
}

impl GpaRange {
    /// The range `start..end` in bytes, or `None` when it is empty, reversed or not aligned to pages.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end && start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE) {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address after the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// The part that is in both ranges.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Returns true if all of `other` is inside.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aligned_nonempty_ranges_exist() {
        for (start, end) in [(0, 0), (4096, 0), (1, 4096), (0, 4095), (8192, 4096)] {
            assert_eq!(GpaRange::new(start, end), None, "{start}..{end}");
        }
        assert_eq!(GpaRange::new(4096, 12288).map(GpaRange::len), Some(8192));
    }

    #[test]
    fn intersection_is_the_shared_part() {
        let range = |start, end| GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap();
        assert_eq!(range(1, 5).intersection(range(3, 9)), Some(range(3, 5)));
        assert_eq!(range(1, 3).intersection(range(3, 9)), None);
        assert!(range(1, 5).contains(range(1, 5)) && !range(1, 5).contains(range(0, 5)));
    }
}
