//! Guest RAM as what slices work on.

use super::slice::{Pages, Stage, Treated};
use crate::memory::{GpaRange, GuestRam, Release};

impl Pages for GuestRam {
    fn can_invalidate(&self) -> bool {
        self.can_free_lazily()
    }

    fn batch(&self) -> usize {
        if self.is_vectored() { usize::MAX } else { 1 }
    }

    fn treat(&self, ranges: &[GpaRange], stage: Stage) -> Treated {
        let how = match stage {
            Stage::Invalidate => Release::Lazily,
            Stage::Discard => Release::Now,
        };
        let released = self.release(ranges, how);
        if let Some(error) = released.error {
            let error = std::io::Error::from_raw_os_error(error);
            tracing::debug!(%error, failures = released.failures, "ranges stay what they were");
        }
        Treated {
            bytes: released.bytes,
            calls: released.calls,
            failures: released.failures,
        }
    }
}
