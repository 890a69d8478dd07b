//! What one limit needs, the host's memory or that of a cgroup, and which part of it this monitor answers for.

use ebb_core::range::BLOCK_SIZE;

/// Minimum low watermark in bytes, unless that is more than a quarter of the memory.
const LOW_WATERMARK: u64 = 256 << 20;

/// Total and available memory of the host or of a cgroup with a limit, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Total memory. 0 if unknown or not limited.
    pub total: u64,
    /// Memory that can be allocated without reclaim.
    pub available: u64,
}

impl Room {
    /// The low watermark: 5 % of the total, at least 256 MiB, at most a quarter.
    #[must_use]
    pub fn low(self) -> u64 {
        (self.total / 20).max(LOW_WATERMARK).min(self.total / 4)
    }

    /// Bytes by which the available memory is below the low watermark; negative if it is above.
    #[must_use]
    pub fn shortage(self) -> i128 {
        i128::from(self.low()) - i128::from(self.available)
    }

    fn is_near(self) -> bool {
        self.total > 0 && self.available < self.low().saturating_mul(2)
    }
}

/// The other monitors under one limit. Each answers for its share of what the limit needs, by its lazily freed bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Lazily freed bytes of those that come before this monitor, in an order that all of them see alike.
    pub before: u64,
    /// Lazily freed bytes of those that come after it.
    pub after: u64,
    /// Bytes that all of them have given back since they started.
    pub given: u64,
}

/// What is known of one limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Its memory.
    pub room: Room,
    /// Who else answers for it.
    pub others: Others,
}

impl Limit {
    /// Returns true if it needs nothing, and if nothing must be prepared for a need.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.missing() == 0 && !self.is_near()
    }

    /// Returns true if less than twice the watermark is available.
    pub(super) fn is_near(&self) -> bool {
        self.room.is_near()
    }

    /// Bytes that are missing up to the low watermark.
    pub(super) fn missing(&self) -> u64 {
        self.room.low().saturating_sub(self.room.available)
    }

    /// Returns true if the others have given less than half of what they should have while this monitor, with `own` lazily
    /// freed bytes, has answered with `given` bytes for its part. If that is less than a block, a block counts.
    pub(super) fn is_behind(&self, given: u64, others: u64, own: u64) -> bool {
        let claims = u128::from(self.others.before) + u128::from(self.others.after);
        let should = claims.saturating_mul(u128::from(given.max(BLOCK_SIZE)));
        let did = u128::from(others).saturating_mul(2 * u128::from(own));
        did < should
    }

    /// The part of `need` bytes that a monitor with `own` lazily freed bytes answers for.
    ///
    /// The need is laid along the lazily freed bytes of all monitors, and cut at whole blocks: so the parts of all who see
    /// the same need are the need, rounded up to a block. `doubt` halves what the others are counted with, that many times;
    /// who doubts gives a block at least.
    pub(super) fn part(&self, need: u64, own: u64, doubt: u32) -> u64 {
        let count = |bytes: u64| u128::from(bytes.checked_shr(doubt).unwrap_or(0));
        let (before, own) = (count(self.others.before), u128::from(own));
        let all = before + own + count(self.others.after);
        let blocks = u128::from(need.div_ceil(BLOCK_SIZE));
        // All are sums of a few 64-bit numbers, and blocks are fewer than 2^43.
        let cut = |bytes: u128| (blocks * bytes).div_ceil(all.max(1));
        let least = blocks.min(u128::from(doubt > 0));
        let part = least.max(cut(before + own) - cut(before));
        u64::try_from(part).map_or(u64::MAX, |part| part.saturating_mul(BLOCK_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn limit(total: u64, available: u64) -> Limit {
        Limit {
            room: Room { total, available },
            ..Limit::default()
        }
    }

    #[test]
    fn the_watermark_follows_the_size() {
        let low = |total| limit(total, 0).room.low();
        assert_eq!((low(0), low(MIB), low(512 * MIB)), (0, MIB / 4, 128 * MIB));
        assert_eq!((low(4 * GIB), low(64 * GIB)), (256 * MIB, 64 * GIB / 20));
    }

    #[test]
    fn the_shortage_is_negative_where_there_is_enough() {
        let shortage = |mib| limit(4 * GIB, mib * MIB).room.shortage() / i128::from(MIB);
        assert_eq!((shortage(250), shortage(256), shortage(300)), (6, 0, -44));
    }

    #[test]
    fn calm_needs_twice_the_watermark() {
        let missing = |available| limit(4 * GIB, available).missing();
        assert_eq!((missing(250 * MIB), missing(256 * MIB)), (6 * MIB, 0));
        assert!(limit(4 * GIB, 512 * MIB).is_calm() && limit(0, 0).is_calm());
        assert!(!limit(4 * GIB, 512 * MIB - 1).is_calm());
    }

    /// The parts of monitors with so many lazily freed bytes each.
    fn parts(need: u64, claims: &[u64], doubt: u32) -> Vec<u64> {
        let sum = |claims: &[u64]| claims.iter().sum();
        let part = |(index, &own): (usize, &u64)| {
            let others = Others {
                before: sum(&claims[..index]),
                after: sum(&claims[index + 1..]),
                given: 0,
            };
            let limit = Limit {
                others,
                ..Limit::default()
            };
            limit.part(need, own, doubt)
        };
        claims.iter().enumerate().map(part).collect()
    }

    #[test]
    fn parts_add_up_to_the_need() {
        assert_eq!(parts(600 * MIB, &[GIB], 0), [600 * MIB]);
        assert_eq!(parts(3, &[GIB], 0), [2 * MIB]);
        let halves = parts(600 * MIB, &[GIB, GIB], 0);
        assert_eq!(halves, [300 * MIB, 300 * MIB]);
        assert_eq!(
            parts(400 * MIB, &[3 * GIB, 0, GIB], 0),
            [300 * MIB, 0, 100 * MIB]
        );
        let claims: Vec<u64> = (1..=50).map(|n| n * 37 * MIB + n).collect();
        for need in [1, 2 * MIB, 5 * MIB, 999 * MIB, 40 * GIB] {
            let sum: u64 = parts(need, &claims, 0).iter().sum();
            assert_eq!(sum, need.next_multiple_of(2 * MIB), "{need}");
        }
    }

    #[test]
    fn doubt_counts_the_others_for_less() {
        let first = |doubt| parts(800 * MIB, &[GIB, 3 * GIB], doubt)[0];
        assert_eq!(
            (first(0), first(1), first(2)),
            (200 * MIB, 320 * MIB, 458 * MIB)
        );
        assert_eq!(
            (first(40), first(64), first(u32::MAX)),
            (800 * MIB, 800 * MIB, 800 * MIB)
        );
        assert_eq!(parts(1, &[GIB, GIB], 0), [2 * MIB, 0]);
        assert_eq!(parts(1, &[GIB, GIB], 1), [2 * MIB, 2 * MIB]);
        assert_eq!(parts(0, &[GIB, GIB], 1), [0, 0]);
    }

    #[test]
    fn who_gives_less_than_half_of_its_part_is_behind() {
        let others = Others {
            before: GIB,
            after: 2 * GIB,
            given: 0,
        };
        let limit = Limit {
            others,
            ..Limit::default()
        };
        // Three times as much as this monitor should come from the others.
        let behind = |given, others| limit.is_behind(given, others, GIB);
        assert!(behind(100 * MIB, 149 * MIB) && !behind(100 * MIB, 150 * MIB));
        assert!(behind(0, 0) && behind(0, 3 * MIB - 1) && !behind(0, 3 * MIB));
        assert!(!Limit::default().is_behind(GIB, 0, GIB), "nobody else");
    }

    #[test]
    fn no_claim_overflows() {
        for (claims, expected) in [
            ([u64::MAX, u64::MAX, 0], 1 << 63),
            ([0, 0, 0], 0),
            ([u64::MAX, 1, 1], 0),
            ([0, u64::MAX, 0], u64::MAX),
        ] {
            let others = Others {
                before: claims[0],
                after: claims[2],
                given: u64::MAX,
            };
            let limit = Limit {
                others,
                ..limit(u64::MAX, 0)
            };
            let part = limit.part(u64::MAX, claims[1], 0);
            assert_eq!(part, expected, "{claims:?}");
            assert!(limit.missing() > 0);
            limit.is_behind(u64::MAX, u64::MAX, u64::MAX);
        }
    }
}
