//! From the balloon to the tracker.

use std::sync::Arc;

use ebb_core::lazy::LazyMemory;
use ebb_core::range::GpaRange;

use crate::devices::virtio::balloon::RangeSink;
use crate::memory::GuestRam;
use crate::reclaim::{Reclaimer, ReportedMemory};
use crate::strict::Strict;

/// Here a balloon page becomes a lazy range, and a deflated one is in use again.
pub struct LazySink {
    /// The tracker.
    pub lazy: Arc<LazyMemory>,
    /// Discards for drivers that do not tell before they use a page again.
    pub reclaimer: Arc<Reclaimer>,
    /// Takes what the guest reports free.
    pub reported: Arc<ReportedMemory>,
    /// Tells what is RAM.
    pub ram: Arc<GuestRam>,
    /// Strict mode, where it is on.
    pub strict: Option<Arc<Strict>>,
}

impl RangeSink for LazySink {
    fn lazy_free(&self, ranges: &[GpaRange]) {
        match &self.strict {
            Some(strict) => strict.free(ranges),
            None => self.lazy.free(ranges),
        };
    }

    fn reuse(&self, ranges: &[GpaRange]) {
        self.lazy.reuse(ranges);
    }

    fn discard(&self, ranges: &[GpaRange]) {
        self.reclaimer.discard_now(ranges);
    }

    fn report(&self, ranges: &[GpaRange]) {
        self.reported.take(ranges);
    }

    fn reset(&self) {
        self.lazy.reset();
    }

    fn is_ram(&self, range: GpaRange) -> bool {
        self.ram.is_ram(range)
    }
}
