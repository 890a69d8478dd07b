//! From the guest's calls to the tracker, and from a vCPU's way in to the reclaimer.

use std::sync::Arc;

use crate::hypercall::{LazyOps, States, Survey};
use crate::lazy::{LazyMemory, Surveyed};
use crate::memory::{GpaRange, GuestRam};
use crate::reclaim::Reclaimer;
use crate::strict::Strict;
use crate::vcpu::WayIn;

/// Carries out the guest's calls on the machine's memory.
pub struct TrackedMemory {
    /// The tracker.
    pub lazy: Arc<LazyMemory>,
    /// Tells what is RAM, and populates it.
    pub ram: Arc<GuestRam>,
    /// Strict mode, where it is on.
    pub strict: Option<Arc<Strict>>,
}

impl LazyOps for TrackedMemory {
    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.is_ram(range)
    }

    fn lazy_free(&self, ranges: &[GpaRange]) -> u64 {
        match &self.strict {
            Some(strict) => strict.free(ranges),
            None => self.lazy.free(ranges),
        }
        .refused
    }

    fn reuse(&self, ranges: &[GpaRange]) -> bool {
        self.lazy.reuse(ranges).last
    }

    fn reset(&self) {
        self.lazy.reset();
    }

    fn prefault(&self, range: GpaRange) -> bool {
        let populated = self.ram.populate(range);
        if let Err(error) = &populated {
            tracing::debug!(%error, "prefault");
        }
        populated.is_ok()
    }

    fn survey(&self, range: Option<GpaRange>) -> Survey {
        let found = range.map_or_else(Surveyed::default, |range| self.lazy.survey(range));
        let all = self.lazy.snapshot();
        Survey {
            range: States {
                lazy: found.totals.lazy + found.totals.reclaiming,
                unmapped: found.totals.unmapped,
                discarded: found.totals.discarded,
            },
            examined: range.map_or(0, |range| found.end - range.start()),
            machine: States {
                lazy: all.lazy_bytes + all.reclaiming_bytes,
                unmapped: all.unmapped_bytes,
                discarded: all.discarded_bytes,
            },
            ranges: all.ranges,
            generation: all.generation,
        }
    }
}

impl WayIn for Reclaimer {
    #[inline]
    fn pass(&self) {
        self.help();
    }
}
