//! Which blocks have been free for some time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_core::range::{BLOCK_SIZE, GpaRange};
use ebb_core::release::ReleasePages;

use super::{BLOCKS, FreeLists, STEP, Walk};
use crate::reclaim::held::parts;

/// Blocks of RAM, one bit each.
#[derive(Clone, Debug, Default)]
pub(in crate::reclaim) struct Bits(Vec<u64>);

impl Bits {
    pub fn has(&self, block: GpaRange) -> bool {
        let (word, bit) = place(block);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    fn set(&mut self, block: GpaRange) {
        let (word, bit) = place(block);
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= bit;
    }

    fn and(&self, other: &Self) -> Self {
        let both = self.0.iter().zip(&other.0);
        Self(both.map(|(one, other)| one & other).collect())
    }
}

const fn place(block: GpaRange) -> (usize, u64) {
    let number = block.start() / BLOCK_SIZE;
    ((number / 64) as usize, 1 << (number % 64))
}

/// Looks at the free lists from time to time. A block that was free at one look and at the next is old. Nobody sees what
/// becomes of it in between: the guest may have used it and freed it again.
#[derive(Debug, Default)]
pub(in crate::reclaim) struct FreeAges {
    /// The look that is under way.
    look: Option<Look>,
    /// When the last one ended, and what was free then.
    last: Option<(Duration, Bits)>,
    old: Arc<Bits>,
    /// Bytes of the old blocks that the host held at the last look.
    held: u64,
}

#[derive(Debug)]
struct Look {
    walk: Walk,
    found: Bits,
    held: u64,
}

impl FreeAges {
    /// Goes on with a look for about `time`, and begins one if the last one ended `age` ago; it is `now`. Returns how many
    /// bytes are old and held by the host.
    pub fn look(
        &mut self,
        (now, age): (Duration, Duration),
        source: &dyn FreeLists,
        pages: &dyn ReleasePages,
        time: Duration,
    ) -> u64 {
        let Some(lists) = source.current() else {
            *self = Self::default();
            return 0;
        };
        let last = self.last.as_ref();
        if self.look.is_none() && last.is_some_and(|(last, _)| now.saturating_sub(*last) < age) {
            return self.held;
        }
        let mut look = self.look.take().unwrap_or_else(|| Look {
            walk: Walk::new(source.ram(), 0),
            found: Bits::default(),
            held: 0,
        });
        let (start, mut found) = (Instant::now(), Vec::new());
        while let Some(part) = look.walk.next(STEP) {
            if start.elapsed() > time {
                self.look = Some(look);
                return self.held;
            }
            let end = lists.find(part, BLOCKS, &mut found);
            let ranges = found.drain(..).filter_map(|range| range.intersection(part));
            for block in ranges.flat_map(|range| parts(range, BLOCK_SIZE)) {
                look.found.set(block);
                if last.is_some_and(|(_, free)| free.has(block)) {
                    look.held += pages.held(block).unwrap_or(0);
                }
            }
            look.walk.advance(end.min(part.end()));
        }
        let old = last.map(|(_, free)| free.and(&look.found));
        (self.old, self.held) = (Arc::new(old.unwrap_or_default()), look.held);
        self.last = Some((now, look.found));
        self.held
    }

    /// The old blocks.
    pub fn old(&self) -> Arc<Bits> {
        Arc::clone(&self.old)
    }

    /// They were taken, as far as that goes.
    pub const fn taken(&mut self) {
        self.held = 0;
    }
}
