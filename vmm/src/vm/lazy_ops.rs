//! From the guest's calls to the tracker, and from a vCPU's way in to the reclaimer.

use std::sync::Arc;

use ebb_core::lazy::{LazyMemory, Surveyed};
use ebb_core::range::GpaRange;
use ebb_hypercall_abi::arena::ArenaInfo;

use crate::arena::{Arena, Arenas};
use crate::hypercall::{LazyOps, States, Survey};
use crate::memory::GuestRam;
use crate::reclaim::Reclaimer;
use crate::strict::Strict;
use crate::vcpu::WayIn;

/// Carries out the guest's calls on the machine's memory.
pub struct TrackedMemory {
    /// The tracker.
    pub lazy: Arc<LazyMemory>,
    /// Tells what is RAM, and populates it.
    pub ram: Arc<GuestRam>,
    /// Memory beside the RAM.
    pub arenas: Arenas,
    /// Strict mode, where it is on.
    pub strict: Option<Arc<Strict>>,
}

impl TrackedMemory {
    fn arena_of(&self, range: GpaRange) -> Option<&Arena> {
        let mut arenas = self.arenas.iter().map(|arena| &**arena);
        arenas.find(|arena| arena.may_reuse(range))
    }
}

impl LazyOps for TrackedMemory {
    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.is_ram(range)
    }

    fn is_granules(&self, range: GpaRange) -> bool {
        self.arena_of(range).is_some()
    }

    fn arenas(&self) -> u64 {
        self.arenas.len() as u64
    }

    fn arena(&self, index: u64) -> Option<ArenaInfo> {
        let place = self.arenas.get(usize::try_from(index).ok()?)?.place();
        Some(ArenaInfo {
            index,
            gpa: place.gpa.start(),
            size: place.layout.size(),
            granule: place.layout.granule(),
            first: place.layout.first(),
            table: place.layout.table(),
            ..ArenaInfo::default()
        })
    }

    fn lazy_free(&self, ranges: &[GpaRange]) -> u64 {
        match &self.strict {
            Some(strict) => strict.free(ranges),
            None => self.lazy.free(ranges),
        }
        .refused
    }

    fn reuse(&self, ranges: &[GpaRange]) -> bool {
        let mut ram = Vec::with_capacity(ranges.len());
        for &range in ranges {
            match self.arena_of(range) {
                Some(arena) => arena.reuse(range),
                None => ram.push(range),
            }
        }
        self.lazy.reuse(&ram).last
    }

    fn reset(&self) {
        self.lazy.reset();
        self.arenas.iter().for_each(|arena| arena.reset());
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
