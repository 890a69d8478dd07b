//! How workers share the batches of a teardown.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Hands out the indices of a list of batches, each of them once.
#[derive(Debug, Default)]
pub struct BatchQueue {
    next: AtomicUsize,
}

impl BatchQueue {
    /// The work of one worker: takes the next of `batches` and frees it by `free`, until none is left. Asks
    /// `may_continue` before each batch, and returns false if that has ended it.
    ///
    /// All workers pass the same `batches`. Uses atomics only, so that it can run in the reaper.
    pub fn work<T>(
        &self,
        batches: &[T],
        may_continue: impl Fn() -> bool,
        free: impl Fn(&T),
    ) -> bool {
        while may_continue() {
            let Some(batch) = batches.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return true;
            };
            free(batch);
        }
        false
    }

    /// How many batches have been taken; more than there are once none is left.
    pub fn taken(&self) -> usize {
        self.next.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_worker_takes_batches_until_none_is_left_or_it_must_stop() {
        let (queue, batches) = (BatchQueue::default(), ['a', 'b', 'c', 'd', 'e']);
        let freed = RefCell::new(String::new());
        let free = |batch: &char| freed.borrow_mut().push(*batch);
        let fewer_than = |count: usize| freed.borrow().len() < count;
        assert!(!queue.work(&batches, || fewer_than(2), free), "stopped");
        assert_eq!(*freed.borrow(), "ab");
        assert!(queue.work(&batches, || true, free), "none is left");
        assert_eq!(*freed.borrow(), "abcde");
        assert!(queue.work(&batches, || true, free));
        assert!(!queue.work(&batches, || false, free));
        assert_eq!(*freed.borrow(), "abcde", "each once");
    }
}
