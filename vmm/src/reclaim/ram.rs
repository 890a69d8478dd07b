//! The system calls that release the guest's RAM.

use ebb_core::range::GpaRange;
use ebb_core::release::{Release, ReleasePages, Released};

use crate::memory::{self, GuestRam};

impl ReleasePages for GuestRam {
    fn can_mark_free(&self) -> bool {
        self.can_free_lazily()
    }

    fn max_batch(&self) -> usize {
        if self.is_vectored() { usize::MAX } else { 1 }
    }

    fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        let how = match how {
            Release::MarkFree => memory::Release::Lazily,
            Release::Discard => memory::Release::Now,
        };
        let released = Self::release(self, ranges, how);
        if let Some(error) = released.error {
            let error = std::io::Error::from_raw_os_error(error);
            tracing::debug!(%error, failures = released.failures, "ranges stay what they were");
        }
        Released {
            bytes: released.bytes,
            calls: released.calls,
            failures: released.failures,
            error: released.error,
        }
    }
}
