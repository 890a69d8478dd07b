//! What the balloon needs from whoever keeps account of memory.

use ebb_core::range::GpaRange;

/// Takes the ranges that the guest hands back and wants again. The ranges of one call are sorted, apart
/// from each other, and guest RAM.
pub trait RangeSink: Send + Sync {
    /// The guest promised not to touch these ranges until they are reused. Bookkeeping only.
    fn lazy_free(&self, ranges: &[GpaRange]);

    /// The guest wants these ranges back; when this returns what it writes is kept.
    fn reuse(&self, ranges: &[GpaRange]);

    /// Return these ranges to the host before returning: for a driver without `MUST_TELL_HOST`, which may
    /// use them again without a word.
    fn discard(&self, ranges: &[GpaRange]);

    /// The guest reports these ranges free. Until it writes to them their content is unspecified, but it may write to
    /// them without a word as soon as this returns: nothing may drop them unconditionally after that.
    fn report(&self, ranges: &[GpaRange]);

    /// The driver is gone: every range is the guest's own again when this returns.
    fn reset(&self);

    /// Whether a range is guest RAM (all of it).
    fn is_ram(&self, range: GpaRange) -> bool;
}
