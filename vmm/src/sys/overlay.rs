//! Which pages of a mapping have their content from a file or a page server.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rustix::io::Errno;

use super::userfault::Userfault;

/// Size in bytes of a page.
const PAGE: usize = 4096;
/// Pages in a word.
const BITS: usize = 64;

/// Each cut takes two more of the 65530 mappings that a process may have, and whoever frees memory decides about them.
pub const MAX_CUTS: usize = 20_000;

/// A bit for each page of a mapping, set where the page is a private mapping of a file, or comes from a page server. Whoever changes what is mapped at a page
/// is the only one to do so at that time; others may look at any time.
#[derive(Debug)]
pub struct Overlay {
    pages: Box<[AtomicU64]>,
    /// Transparent huge pages are asked for where there is no file.
    pub huge_pages: bool,
    /// How often a part was cut out of it.
    pub cuts: AtomicUsize,
    /// By this a page server gives the content; `None`: it is a file's.
    pub faults: Option<Arc<Userfault>>,
}

impl Overlay {
    /// Of a mapping of `len` bytes, in which nothing is of a file yet.
    pub fn new(len: usize, huge_pages: bool) -> Self {
        let words = len.div_ceil(PAGE * BITS);
        Self {
            pages: (0..words).map(|_| AtomicU64::new(0)).collect(),
            huge_pages,
            cuts: AtomicUsize::new(0),
            faults: None,
        }
    }

    /// The words that hold a part's pages, and the bits of these.
    fn words(&self, offset: usize, len: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, end) = (offset / PAGE, (offset + len).div_ceil(PAGE));
        let last = end.div_ceil(BITS).min(self.pages.len());
        let words = self.pages.get(first / BITS..last).unwrap_or_default();
        (first / BITS..).zip(words).map(move |(index, word)| {
            let bit = |page: usize| page.saturating_sub(index * BITS).min(BITS) as u32;
            let below = |bits: u32| u64::MAX.checked_shr(64 - bits).unwrap_or(0);
            (word, below(bit(end)) & !below(bit(first)))
        })
    }

    /// Returns true if a page that the part meets is of a file.
    pub fn meets(&self, offset: usize, len: usize) -> bool {
        let mut words = self.words(offset, len);
        words.any(|(word, bits)| word.load(Ordering::Relaxed) & bits != 0)
    }

    /// The runs of a part's pages that are of a file and, by `is_written`, which gets a page's number in the part, not written.
    pub fn runs(
        &self,
        offset: usize,
        len: usize,
        is_written: impl Fn(usize) -> bool,
    ) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in 0..len / PAGE {
            let at = offset + page * PAGE;
            if !self.meets(at, PAGE) || is_written(page) {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == at => last.end += PAGE,
                _ => runs.push(at..at + PAGE),
            }
        }
        runs
    }

    /// Counts a part that is about to be cut out. One that continues what is cut out already costs nothing.
    ///
    /// # Errors
    /// `ENOMEM` if there were [`MAX_CUTS`].
    pub fn cut(&self, offset: usize, len: usize) -> io::Result<()> {
        let end = offset + len;
        let continues = (offset > 0 && !self.meets(offset - 1, 1))
            || (end < self.pages.len() * BITS * PAGE && !self.meets(end, 1));
        if !continues && self.cuts.fetch_add(1, Ordering::Relaxed) >= MAX_CUTS {
            self.cuts.fetch_sub(1, Ordering::Relaxed);
            return Err(Errno::NOMEM.into());
        }
        Ok(())
    }

    /// Notes whether a part is of a file.
    pub fn set(&self, offset: usize, len: usize, of_file: bool) {
        for (word, bits) in self.words(offset, len) {
            if of_file {
                word.fetch_or(bits, Ordering::Relaxed);
            } else {
                word.fetch_and(!bits, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_noted_alone() {
        let overlay = Overlay::new(300 * PAGE, false);
        overlay.set(10 * PAGE, 200 * PAGE, true);
        overlay.set(63 * PAGE, 2 * PAGE, false);
        overlay.set(128 * PAGE, 64 * PAGE, false);
        let runs = |is_written: &dyn Fn(usize) -> bool| {
            let runs = overlay.runs(5 * PAGE, 295 * PAGE, is_written);
            let pages = runs.into_iter().map(|it| it.start / PAGE..it.end / PAGE);
            pages.collect::<Vec<_>>()
        };
        assert_eq!(runs(&|_| false), [10..63, 65..128, 192..210]);
        assert_eq!(
            runs(&|page| !matches!(page, 95 | 190)),
            [100..101, 195..196]
        );
        assert!(overlay.meets(62 * PAGE, 3 * PAGE) && !overlay.meets(63 * PAGE, 2 * PAGE));
        assert!(!overlay.meets(210 * PAGE, 90 * PAGE) && !overlay.meets(0, 10 * PAGE));
        assert!(overlay.meets(62 * PAGE + 1, 1) && !overlay.meets(500 * PAGE, PAGE));
    }

    #[test]
    fn what_continues_a_cut_is_none() {
        let overlay = Overlay::new(64 * PAGE, false);
        overlay.set(8 * PAGE, 40 * PAGE, true);
        let mut cut = |page: usize| {
            overlay.cut(page * PAGE, PAGE).unwrap();
            overlay.set(page * PAGE, PAGE, false);
            overlay.cuts.load(Ordering::Relaxed)
        };
        assert_eq!([8, 47, 20, 21, 19, 30].map(&mut cut), [0, 0, 1, 1, 1, 2]);
        overlay.cuts.store(MAX_CUTS, Ordering::Relaxed);
        overlay.cut(40 * PAGE, PAGE).unwrap_err();
        overlay.cut(31 * PAGE, PAGE).unwrap();
    }
}
