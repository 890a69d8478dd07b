//! How old lazily freed memory is.

use std::collections::VecDeque;
use std::time::Duration;

/// Remembers when each generation was current, so that ranges need no time stamp.
#[derive(Clone, Debug, Default)]
pub struct Ages {
    /// Times since some moment, and the generation at each. Ascending in both.
    marks: VecDeque<(Duration, u64)>,
    aged: u64,
}

impl Ages {
    /// At `now` the machine's generation is `current`. Returns the latest generation that was current `age` ago or longer.
    /// Times are kept at distances of at least 1/16 of `age`, so the answer is late by at most that, and at most 17 are kept.
    pub fn aged(&mut self, now: Duration, current: u64, age: Duration) -> u64 {
        let apart = self.marks.back().map(|&(last, _)| now.saturating_sub(last));
        if apart.is_none_or(|apart| apart >= age / 16) {
            self.marks.push_back((now, current));
        }
        while let Some(&(then, generation)) = self.marks.front()
            && now.saturating_sub(then) >= age
        {
            self.aged = generation;
            self.marks.pop_front();
        }
        self.aged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_tell_the_generation_of_some_time_ago() {
        let mut ages = Ages::default();
        let age = Duration::from_secs(10);
        let mut at = |seconds, generation| ages.aged(Duration::from_secs(seconds), generation, age);
        assert_eq!((at(0, 5), at(3, 8), at(9, 9)), (0, 0, 0));
        assert_eq!((at(10, 9), at(12, 20), at(13, 20)), (5, 5, 8));
        assert_eq!(at(100, 99), 20);
        for second in 100..100_000 {
            at(second, second);
        }
        assert!(ages.marks.len() <= 17);
    }
}
