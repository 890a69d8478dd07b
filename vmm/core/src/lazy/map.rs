//! The states of the pages of one block, 2 bits a page.

use std::ops::Range;

use crate::range::{BLOCK_SIZE, PAGE_SIZE};

/// Pages of a block.
pub const BLOCK_PAGES: usize = (BLOCK_SIZE / PAGE_SIZE) as usize;

/// Pages of a word.
const WORD_PAGES: usize = 32;

/// The low bit of each page of a word.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// The state of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageState {
    /// The guest uses it, or may use it at any time.
    #[default]
    InUse,
    /// The guest has promised not to touch it before a reuse. Its content is still there.
    Lazy,
    /// No vCPU that has seen the stamp of its block has a translation of it, and the host may take it.
    Unmapped,
    /// It is returned to the host.
    Discarded,
}

impl PageState {
    /// All states, each at its own number.
    pub const ALL: [Self; 4] = [Self::InUse, Self::Lazy, Self::Unmapped, Self::Discarded];

    /// The word whose pages are all in this state.
    const fn word(self) -> u64 {
        LOW_BITS * self as u64
    }
}

/// What becomes of pages: the new state for each old one, by its number.
pub type Change = [PageState; 4];

/// Numbers of pages, by the number of their state.
pub type Counts = [u64; 4];

/// The states of a block's pages.
#[derive(Clone, Copy, Debug)]
pub struct Map([u64; BLOCK_PAGES / WORD_PAGES]);

impl Map {
    /// All pages in `state`.
    pub const fn filled(state: PageState) -> Self {
        Self([state.word(); BLOCK_PAGES / WORD_PAGES])
    }

    /// The state of page number `page`.
    pub const fn get(&self, page: usize) -> PageState {
        let word = self.0[page / WORD_PAGES];
        PageState::ALL[(word >> (page % WORD_PAGES * 2) & 3) as usize]
    }

    /// The state of all pages, if they have one state.
    pub fn uniform(&self) -> Option<PageState> {
        let first = self.get(0);
        let word = first.word();
        self.0.iter().all(|&other| other == word).then_some(first)
    }

    /// Returns true if a page is in one of `states`.
    pub fn has(&self, states: &[PageState]) -> bool {
        let any = |word| states.iter().any(|&state| in_state(word, state) != 0);
        self.0.iter().copied().any(any)
    }

    /// The first page from `at` on that is in `state` if `wanted` is true, or in another state if it is false.
    pub fn first(&self, at: usize, state: PageState, wanted: bool) -> Option<usize> {
        words(at..BLOCK_PAGES).find_map(|(index, pages)| {
            let found = in_state(self.0[index], state);
            let found = if wanted { found } else { !found } & pages;
            (found != 0).then(|| index * WORD_PAGES + found.trailing_zeros() as usize / 2)
        })
    }

    /// Changes the states of `pages`. Returns their numbers by old state.
    pub fn change(&mut self, pages: Range<usize>, change: Change) -> Counts {
        let mut counts = Counts::default();
        for (index, pages) in words(pages) {
            let old = self.0[index];
            let mut new = old & !(pages * 3);
            for state in PageState::ALL {
                let found = in_state(old, state) & pages;
                counts[state as usize] += u64::from(found.count_ones());
                new |= found * change[state as usize] as u64;
            }
            self.0[index] = new;
        }
        counts
    }

    /// Numbers of `pages` by state.
    pub fn count(&self, pages: Range<usize>) -> Counts {
        let mut copy = *self;
        copy.change(pages, PageState::ALL)
    }

    /// Number of `pages` that are not in use and in another state than the page before. The state of the page before
    /// the block is `before`.
    pub fn starts(&self, pages: Range<usize>, before: PageState) -> u64 {
        let starts = words(pages).map(|(index, pages)| {
            let word = self.0[index];
            let last = index.checked_sub(1).map_or(before as u64, |before| {
                self.0[before] >> (2 * (WORD_PAGES - 1))
            });
            let differs = word ^ (word << 2 | last);
            let found = (differs | differs >> 1) & (word | word >> 1) & pages;
            u64::from(found.count_ones())
        });
        starts.sum()
    }
}

/// The low bits of the pages of `word` that are in `state`.
const fn in_state(word: u64, state: PageState) -> u64 {
    let other = word ^ state.word();
    !(other | other >> 1) & LOW_BITS
}

/// The words of `pages`: number, and the low bits of the pages that are meant.
fn words(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (pages.start / WORD_PAGES..pages.end.div_ceil(WORD_PAGES)).map(move |index| {
        let inside = |page: usize| page.saturating_sub(index * WORD_PAGES).min(WORD_PAGES);
        // The bits of the first pages of the word.
        let bits = |pages: usize| u64::MAX.checked_shr(64 - 2 * pages as u32).unwrap_or(0);
        (
            index,
            LOW_BITS & bits(inside(pages.end)) & !bits(inside(pages.start)),
        )
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Pages = Vec<PageState>;

    fn state() -> impl Strategy<Value = PageState> {
        prop::sample::select(&PageState::ALL[..])
    }

    /// Pages in runs.
    fn block() -> impl Strategy<Value = Pages> {
        let runs = prop::collection::vec((state(), 1..200usize), 1..40);
        runs.prop_map(|runs| {
            let pages = runs.iter().flat_map(|&(state, len)| vec![state; len]);
            pages.cycle().take(BLOCK_PAGES).collect()
        })
    }

    fn part() -> impl Strategy<Value = Range<usize>> {
        let ends = (0..BLOCK_PAGES, 1..=BLOCK_PAGES);
        ends.prop_map(|(start, len)| start..(start + len).min(BLOCK_PAGES))
    }

    fn map(pages: &Pages) -> Map {
        let mut map = Map::filled(PageState::InUse);
        for (page, &state) in pages.iter().enumerate() {
            map.change(page..page + 1, [state; 4]);
        }
        map
    }

    fn numbers(pages: &[PageState]) -> Counts {
        PageState::ALL.map(|state| pages.iter().filter(|&&page| page == state).count() as u64)
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "takes minutes there")]
        fn it_equals_an_array(pages in block(), part in part(), change in [state(), state(), state(), state()], before in state()) {
            let mut map = map(&pages);
            let states = |map: &Map| (0..BLOCK_PAGES).map(|page| map.get(page)).collect::<Pages>();
            prop_assert_eq!(&states(&map), &pages);
            let one = pages.iter().all(|page| *page == pages[0]);
            prop_assert_eq!(map.uniform(), one.then_some(pages[0]));
            for state in PageState::ALL {
                prop_assert_eq!(map.has(&[state]), pages.contains(&state));
                for wanted in [true, false] {
                    let mut from = part.start..BLOCK_PAGES;
                    let first = from.find(|&page| (pages[page] == state) == wanted);
                    prop_assert_eq!(map.first(part.start, state, wanted), first);
                }
            }
            let starts = part.clone().filter(|&page| {
                let last = page.checked_sub(1).map_or(before, |last| pages[last]);
                pages[page] != PageState::InUse && pages[page] != last
            });
            prop_assert_eq!(map.starts(part.clone(), before), starts.count() as u64);

            let expected = numbers(&pages[part.clone()]);
            prop_assert_eq!(map.count(part.clone()), expected);
            prop_assert_eq!(map.change(part.clone(), change), expected);
            let mut changed = pages;
            changed[part].iter_mut().for_each(|page| *page = change[*page as usize]);
            prop_assert_eq!(states(&map), changed);
        }
    }

    #[test]
    fn a_filled_block_is_uniform_until_a_page_differs() {
        for state in PageState::ALL {
            let mut map = Map::filled(state);
            assert_eq!(map.uniform(), Some(state));
            let other = PageState::ALL[(state as usize + 1) % 4];
            map.change(511..512, [other; 4]);
            assert_eq!(map.uniform(), None);
            assert_eq!((map.get(510), map.get(511)), (state, other));
        }
    }
}
