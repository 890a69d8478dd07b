//! The word of a granule in an arena's table: state and generation in 64 bits, changed only by compare-and-swap.
//!
//! ```text
//!             guest: free               monitor: take              monitor: discarded
//!   InUse ───────────────► Lazy(gen) ─────────────────► Reclaiming ─────────────────► Discarded
//!     ▲                     │     ▲                          │                            │
//!     └──── guest: reuse ───┘     └──── monitor: give back ──┘                            │
//!     └──────────────────────────────── guest: reuse ─────────────────────────────────────┘
//! ```
//!
//! Every function here is pure: from the word that was loaded to the word to swap in. [`crate::shared_word`] does the
//! swap.

/// The state of a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// The guest uses it; the monitor never touches it.
    InUse = 0,
    /// The guest has promised not to touch it.
    Lazy = 1,
    /// The monitor is discarding it.
    Reclaiming = 2,
    /// The monitor has discarded it: the next touch reads zeroes.
    Discarded = 3,
}

/// The word: the state in bits 7..0, the generation in bits 63..8. 0 is in use, so that a new table is valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Word(u64);

/// Generations are kept modulo 2^56. A batch each nanosecond wraps them after two years; then the age of some
/// granules is guessed wrong.
pub const GENERATION_BITS: u32 = 56;

const STATE_BITS: u32 = 8;
const _: () = assert!(STATE_BITS + GENERATION_BITS == u64::BITS);
const _: () = assert!(size_of::<Word>() == 8 && align_of::<Word>() == 8);
const _: () = assert!(matches!(Word(0).state(), Some(State::InUse)));

/// What a guest must do to take a granule back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reuse {
    /// Nothing: it is in use.
    InUse,
    /// Swap in this word. The content is what it was, or zero.
    Swap(Word),
    /// Load the word again; if it does not change soon, make the call `REUSE`, which waits.
    Busy,
}

impl Word {
    /// A word in `state` with `generation`.
    #[must_use]
    pub const fn new(state: State, generation: u64) -> Self {
        Self(generation << STATE_BITS | state as u64)
    }

    /// The word from memory, which may hold any value.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The word as it is in memory.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The state; `None` if the bits name none, because the guest has overwritten the table. The monitor leaves such
    /// a granule alone, as if it were in use.
    #[must_use]
    pub const fn state(self) -> Option<State> {
        match self.0 & ((1 << STATE_BITS) - 1) {
            0 => Some(State::InUse),
            1 => Some(State::Lazy),
            2 => Some(State::Reclaiming),
            3 => Some(State::Discarded),
            _ => None,
        }
    }

    /// The generation in which it was last freed.
    #[must_use]
    pub const fn generation(self) -> u64 {
        self.0 >> STATE_BITS
    }

    const fn to(self, state: State) -> Self {
        Self::new(state, self.generation())
    }

    /// Guest: frees the granule in `generation`. `None`: it is not in use.
    #[must_use]
    pub const fn free(self, generation: u64) -> Option<Self> {
        match self.state() {
            Some(State::InUse) => Some(Self::new(State::Lazy, generation)),
            _ => None,
        }
    }

    /// Guest: takes the granule back.
    #[must_use]
    pub const fn reuse(self) -> Reuse {
        match self.state() {
            Some(State::Lazy | State::Discarded) => Reuse::Swap(self.to(State::InUse)),
            Some(State::Reclaiming) => Reuse::Busy,
            Some(State::InUse) | None => Reuse::InUse,
        }
    }

    /// Monitor: takes the granule to discard it. `None`: it is not lazy.
    #[must_use]
    pub const fn take(self) -> Option<Self> {
        match self.state() {
            Some(State::Lazy) => Some(self.to(State::Reclaiming)),
            _ => None,
        }
    }

    /// Monitor: ends what [`Word::take`] began. Without `discarded` the granule is lazy again, as the host has not
    /// taken the pages. `None`: the guest has overwritten the word, which then stays as it is.
    #[must_use]
    pub const fn finish(self, discarded: bool) -> Option<Self> {
        match self.state() {
            Some(State::Reclaiming) if discarded => Some(self.to(State::Discarded)),
            Some(State::Reclaiming) => Some(self.to(State::Lazy)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [State; 4] = [
        State::InUse,
        State::Lazy,
        State::Reclaiming,
        State::Discarded,
    ];

    #[test]
    fn each_side_has_exactly_its_own_transitions() {
        let mut found = [(); 4].map(|()| [None; 4]);
        for (row, from) in STATES.into_iter().enumerate() {
            let word = Word::new(from, 5);
            let reuse = match word.reuse() {
                Reuse::Swap(word) => Some(word),
                _ => None,
            };
            let next = [word.free(9), reuse, word.take(), word.finish(true)];
            for (column, word) in next.into_iter().enumerate() {
                found[row][column] = word.map(|w| (w.state().unwrap(), w.generation()));
            }
        }
        let expected = [
            [Some((State::Lazy, 9)), None, None, None],
            [
                None,
                Some((State::InUse, 5)),
                Some((State::Reclaiming, 5)),
                None,
            ],
            [None, None, None, Some((State::Discarded, 5))],
            [None, Some((State::InUse, 5)), None, None],
        ];
        assert_eq!(found, expected);
        assert_eq!(Word::new(State::Reclaiming, 1).reuse(), Reuse::Busy);
        let back = Word::new(State::Reclaiming, 1).finish(false);
        assert_eq!(back, Some(Word::new(State::Lazy, 1)));
    }

    #[test]
    fn garbage_is_left_alone() {
        for raw in [4, 0xff, u64::MAX, 0x1_0000_0080] {
            let word = Word::from_raw(raw);
            assert_eq!(word.state(), None);
            assert_eq!(
                (word.free(1), word.take(), word.finish(true)),
                (None, None, None)
            );
            assert_eq!(word.reuse(), Reuse::InUse);
        }
    }

    proptest! {
        #[test]
        fn state_and_generation_are_kept_apart(generation in 0..1u64 << GENERATION_BITS, n in 0..4usize) {
            let word = Word::new(STATES[n], generation);
            prop_assert_eq!((word.state(), word.generation()), (Some(STATES[n]), generation));
            prop_assert_eq!(Word::from_raw(word.raw()), word);
        }

        /// Guest and monitor act in any order on words that they loaded at any earlier time, as
        /// compare-and-swap lets them: what the guest holds is never discarded.
        #[test]
        fn nothing_that_the_guest_holds_is_discarded(
            steps in prop::collection::vec((0..6u8, any::<u8>()), 1..200)
        ) {
            let (mut word, mut guest_saw, mut monitor_saw) = (Word::default(), Word::default(), Word::default());
            let (mut guest_holds, mut content, mut taken) = (true, true, false);
            for (step, generation) in steps {
                let swap = |word: &mut Word, seen: Word, new: Option<Word>| match new {
                    Some(new) if *word == seen => { *word = new; true }
                    _ => false,
                };
                match step {
                    0 => guest_saw = word,
                    1 => monitor_saw = word,
                    // The promise is given by the very swap.
                    2 if guest_holds => {
                        let free = guest_saw.free(u64::from(generation));
                        guest_holds = !swap(&mut word, guest_saw, free);
                    }
                    3 if !guest_holds => {
                        if let Reuse::Swap(new) = guest_saw.reuse()
                            && swap(&mut word, guest_saw, Some(new))
                        {
                            guest_holds = true;
                            content = true; // written anew
                        }
                    }
                    4 if !taken => taken = swap(&mut word, monitor_saw, monitor_saw.take()),
                    5 if taken => {
                        prop_assert!(!guest_holds);
                        content = false;
                        let seen = word;
                        taken = !swap(&mut word, seen, seen.finish(generation % 2 == 0));
                        prop_assert!(!taken, "nobody else ends a take");
                    }
                    _ => {}
                }
                prop_assert!(!guest_holds || content);
            }
        }
    }
}
