//! Generations: the order in which ranges were freed and invalidated, and which vCPUs have entered the guest since.
//!
//! This is `tlb_gen` of "`MADV_LAZYFREE`" (Rik van Riel), for a machine instead of a process.

mod gate;
mod vcpus;
mod waiters;

use crate::sync::{AtomicU64, Ordering};

pub use gate::{Gate, GateStats, Hold, Inside, Kick, Missed, NoKick};

/// The machine's generation: a counter that every batch of lazy frees and every invalidation advances. It starts at 0
/// and does not wrap in practice: one each nanosecond takes 584 years, and a vCPU's word has room for half of that.
#[derive(Debug, Default)]
pub struct VmGeneration(AtomicU64);

impl VmGeneration {
    /// Starts the next generation and returns it. A thread that sees it also sees what the caller has done before.
    pub fn advance(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The generation that was started last; 0 before the first.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_generation_is_handed_out_once() {
        let generation = VmGeneration::default();
        assert_eq!(generation.current(), 0);
        let mut seen: Vec<u64> = std::thread::scope(|scope| {
            let threads = [(); 3].map(|()| {
                scope.spawn(|| (0..1000).map(|_| generation.advance()).collect::<Vec<_>>())
            });
            threads.map(|thread| thread.join().unwrap()).concat()
        });
        seen.sort_unstable();
        assert!(seen.iter().copied().eq(1..=3000));
        assert_eq!(generation.current(), 3000);
    }
}
