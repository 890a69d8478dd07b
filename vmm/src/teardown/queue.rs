//! How workers share the batches of a teardown.

use std::array::from_fn;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::sys::nodes::{Node, bind};

/// More memory nodes than these are treated as if they were fewer.
const MAX_NODES: usize = 64;

/// In how many places of a batch the queue looks for a page that tells the batch's node.
const PROBES: usize = 4;

/// Hands out the indices of a list of batches, each of them once: first those on the node of the worker that asks, then
/// those on others. So workers of different nodes use different locks of the page allocator.
///
/// Only making one allocates; all else uses atomics, so that it can run in the reaper.
#[derive(Debug)]
pub struct BatchQueue {
    /// The node of each batch.
    nodes: Box<[AtomicU8]>,
    /// For each node, how far its batches are handed out.
    next: Box<[AtomicUsize]>,
    taken: AtomicUsize,
}

impl BatchQueue {
    /// For so many batches on so many memory nodes, on the first of them as far as is known.
    #[must_use]
    pub fn new(batches: usize, nodes: usize) -> Self {
        Self {
            nodes: (0..batches).map(|_| AtomicU8::new(0)).collect(),
            next: (0..nodes.clamp(1, MAX_NODES))
                .map(|_| AtomicUsize::new(0))
                .collect(),
            taken: AtomicUsize::new(0),
        }
    }

    /// Finds out which node each batch is on, before the first is taken. `place` tells a batch's address and length, and
    /// `nodes_at` the nodes of the pages at some addresses.
    pub fn locate(
        &self,
        place: impl Fn(usize) -> (usize, usize),
        nodes_at: impl Fn([usize; PROBES]) -> [Option<usize>; PROBES],
    ) {
        if self.next.len() < 2 {
            return;
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let (address, len) = place(index);
            let probes = from_fn(|probe| address + ((len / PROBES * probe) & !0xfff));
            let found = nodes_at(probes).into_iter().flatten().next();
            let found = found.filter(|node| *node < self.next.len());
            node.store(
                u8::try_from(found.unwrap_or(0)).unwrap_or(0),
                Ordering::Relaxed,
            );
        }
    }

    /// The work of one worker, on `node`: takes the next of `batches` and frees it by `free`, until none is left. Asks
    /// `may_continue` before each batch, and returns false if that has ended it.
    ///
    /// All workers pass the same `batches`.
    pub fn work<T>(
        &self,
        batches: &[T],
        node: usize,
        may_continue: impl Fn() -> bool,
        free: impl Fn(&T),
    ) -> bool {
        while may_continue() {
            let Some(batch) = self.take(node).and_then(|index| batches.get(index)) else {
                return true;
            };
            free(batch);
        }
        false
    }

    /// How many batches nobody has taken.
    #[must_use]
    pub fn left(&self) -> usize {
        let taken = self.taken.load(Ordering::Relaxed);
        self.nodes.len().saturating_sub(taken)
    }

    fn take(&self, node: usize) -> Option<usize> {
        let nodes = self.next.len().max(1);
        let index = (0..nodes).find_map(|step| self.take_on(node.wrapping_add(step) % nodes))?;
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(index)
    }

    fn take_on(&self, node: usize) -> Option<usize> {
        let next = self.next.get(node)?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if usize::from(self.nodes.get(index)?.load(Ordering::Relaxed)) == node {
                return Some(index);
            }
        }
    }
}

/// Binds the calling thread, a worker with this number, to one of several nodes. Each worker has the next one.
pub fn bind_to_one_of(nodes: &[Node], worker: usize) {
    if nodes.len() > 1
        && let Some(node) = nodes.get(worker % nodes.len())
    {
        bind(node);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const BATCHES: [char; 5] = ['a', 'b', 'c', 'd', 'e'];

    #[test]
    fn a_worker_takes_batches_until_none_is_left_or_it_must_stop() {
        let (queue, freed) = (BatchQueue::new(5, 1), RefCell::new(String::new()));
        let free = |batch: &char| freed.borrow_mut().push(*batch);
        let fewer_than = |count: usize| freed.borrow().len() < count;
        assert!(!queue.work(&BATCHES, 0, || fewer_than(2), free), "stopped");
        assert_eq!((freed.borrow().as_str(), queue.left()), ("ab", 3));
        assert!(queue.work(&BATCHES, 7, || true, free), "none is left");
        assert_eq!((freed.borrow().as_str(), queue.left()), ("abcde", 0));
        assert!(queue.work(&BATCHES, 0, || true, free));
        assert!(!queue.work(&BATCHES, 0, || false, free));
        assert_eq!(
            (freed.borrow().as_str(), queue.left()),
            ("abcde", 0),
            "each once"
        );
    }

    /// A queue of five batches of four pages on three nodes. No page is where nobody would look, or where nothing is mapped.
    fn located(nodes: usize) -> BatchQueue {
        let queue = BatchQueue::new(5, nodes);
        // Nothing of `c`, and of `b` the last page only.
        let node_at = |address: usize| match address >> 14 {
            0 => Some(1),
            1 => (address >> 12 == 7).then_some(2),
            2 => None,
            3 => Some(9),
            _ => Some(1),
        };
        queue.locate(|index| (index << 14, 1 << 14), |probes| probes.map(node_at));
        queue
    }

    #[test]
    fn a_workers_own_node_comes_first_and_then_the_others_in_turn() {
        for (node, order) in [(0, "cdaeb"), (1, "aebcd"), (2, "bcdae"), (4, "aebcd")] {
            let freed = RefCell::new(String::new());
            let free = |batch: &char| freed.borrow_mut().push(*batch);
            assert!(located(3).work(&BATCHES, node, || true, free));
            assert_eq!(*freed.borrow(), order, "node {node}");
        }
    }

    #[test]
    fn what_is_on_a_node_that_is_left_out_counts_as_on_the_first() {
        for (node, order) in [(0, "bcdae"), (1, "aebcd")] {
            let freed = RefCell::new(String::new());
            let free = |batch: &char| freed.borrow_mut().push(*batch);
            assert!(located(2).work(&BATCHES, node, || true, free));
            assert_eq!(*freed.borrow(), order, "node {node}");
        }
    }

    #[test]
    fn workers_of_two_nodes_meet_only_at_the_end() {
        let queue = located(3);
        let taken: Vec<_> = [1, 2, 1, 2, 1, 2].map(|node| queue.take(node)).into();
        let expected = [Some(0), Some(1), Some(4), Some(2), Some(3), None];
        assert_eq!(taken, expected);
        assert_eq!(queue.left(), 0);
    }

    #[test]
    fn with_one_node_nobody_is_asked() {
        let queue = BatchQueue::new(5, 0);
        queue.locate(|_| unreachable!(), |_| unreachable!());
        assert_eq!([queue.take(3), queue.take(0)], [Some(0), Some(1)]);
    }
}
