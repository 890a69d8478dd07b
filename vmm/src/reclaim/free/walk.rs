//! A walk through all RAM.

use std::collections::VecDeque;

use ebb_core::range::GpaRange;

/// Goes once through all RAM, from some address on and round to it.
#[derive(Debug)]
pub(in crate::reclaim) struct Walk {
    /// What is left.
    parts: VecDeque<GpaRange>,
}

impl Walk {
    /// Begins at `cursor`.
    pub fn new(ram: &[GpaRange], cursor: u64) -> Self {
        let after = |range: &GpaRange| GpaRange::new(range.start().max(cursor), range.end());
        let before = |range: &GpaRange| GpaRange::new(range.start(), range.end().min(cursor));
        let parts = ram.iter().filter_map(after);
        Self {
            parts: parts.chain(ram.iter().filter_map(before)).collect(),
        }
    }

    /// The next part, at most `len` bytes of it. `None` at the end.
    pub fn next(&self, len: u64) -> Option<GpaRange> {
        let part = self.parts.front()?;
        GpaRange::new(
            part.start(),
            part.end().min(part.start().saturating_add(len)),
        )
    }

    /// Goes on to `address`, which lies in the next part or at its end.
    pub fn advance(&mut self, address: u64) {
        let Some(part) = self.parts.pop_front() else {
            return;
        };
        if let Some(rest) = GpaRange::new(address.max(part.start()), part.end()) {
            self.parts.push_front(rest);
        }
    }

    /// Ends the walk.
    pub fn end(&mut self) {
        self.parts.clear();
    }

    /// Where it goes on. 0 at its end.
    pub fn position(&self) -> u64 {
        self.parts.front().map_or(0, |part| part.start())
    }
}

#[cfg(test)]
mod tests {
    use ebb_core::range::PAGE_SIZE;

    use super::*;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start * PAGE_SIZE, end * PAGE_SIZE).unwrap()
    }

    #[test]
    fn it_goes_round_once() {
        let ram = [range(0, 100), range(200, 300)];
        let steps = |cursor| {
            let mut walk = Walk::new(&ram, cursor * PAGE_SIZE);
            let mut steps = Vec::new();
            while let Some(part) = walk.next(60 * PAGE_SIZE) {
                assert_eq!(walk.position(), part.start());
                steps.push(part);
                walk.advance(part.end());
            }
            assert_eq!(walk.position(), 0);
            steps
        };
        let all = [
            range(0, 60),
            range(60, 100),
            range(200, 260),
            range(260, 300),
        ];
        assert_eq!(steps(0), all);
        assert_eq!(steps(300), all);
        let [a, b, c, d] = all;
        assert_eq!(steps(150), [c, d, a, b]);
        assert_eq!(steps(250), [range(250, 300), a, b, range(200, 250)]);
    }

    #[test]
    fn it_goes_on_where_it_is_told_and_can_be_ended() {
        let mut walk = Walk::new(&[range(0, 100)], 0);
        walk.advance(30 * PAGE_SIZE);
        assert_eq!(walk.next(u64::MAX), Some(range(30, 100)));
        walk.end();
        assert_eq!((walk.next(1), walk.position()), (None, 0));
        walk.advance(10 * PAGE_SIZE);
    }
}
