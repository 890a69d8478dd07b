//! The operations, and how a call names them.
//!
//! Stock KVM passes one hypercall to user space, `KVM_HC_MAP_GPA_RANGE` (Linux,
//! `Documentation/virt/kvm/x86/hypercalls.rst`): a page-aligned address, a number of pages that is not 0 and does not
//! wrap, and attributes, whose bits all arrive. So the attributes name Ebb's operation; one that takes no range names
//! page 0.

use crate::PAGE_SIZE;
use crate::status::Error;

/// The number of the hypercall that carries all calls to Ebb.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// Bits 63..20 of the attributes of a call to Ebb. KVM's own attributes use only bits 4..0, which are 0 in a call to
/// Ebb, so the two cannot be confused.
pub const MAGIC: u64 = 0xebb;

const MAGIC_SHIFT: u32 = 20;
const FLAGS_SHIFT: u32 = 16;
const OPERATION_SHIFT: u32 = 8;
const RESERVED: u64 = (1 << OPERATION_SHIFT) - 1;

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// Returns the features of the monitor, as in CPUID. No range.
    Features = 1,
    /// The guest promises not to touch the range before it reuses it.
    LazyFree = 2,
    /// The guest takes the range back.
    Reuse = 3,
    /// `LAZY_FREE` for the ranges in a batch block.
    LazyFreeBatch = 4,
    /// `REUSE` for the ranges in a batch block.
    ReuseBatch = 5,
    /// Describes a range, and the machine, in a query block.
    Query = 6,
    /// Makes everything in use, for instance before another kernel takes over. No range.
    Reset = 7,
    /// Describes an arena, in an arena block; [`Error::NoSuchCall`] without [`crate::Features::ARENA`].
    ArenaInfo = 8,
    /// The kernel's vmcoreinfo note is in the range; [`Error::NoSuchCall`] without [`crate::Features::KERNEL_NOTE`].
    KernelNote = 9,
}

impl Operation {
    /// All of them, in the order of their numbers, which start at 1.
    pub const ALL: [Self; 9] = [
        Self::Features,
        Self::LazyFree,
        Self::Reuse,
        Self::LazyFreeBatch,
        Self::ReuseBatch,
        Self::Query,
        Self::Reset,
        Self::ArenaInfo,
        Self::KernelNote,
    ];

    /// The flags that it takes.
    #[must_use]
    pub const fn flags(self) -> Flags {
        match self {
            Self::Reuse | Self::ReuseBatch => Flags::PREFAULT,
            _ => Flags::NONE,
        }
    }
}

/// Flags of an operation; four bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u8);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// Populate the range before the call returns, at most [`PREFAULT_MAX_PAGES`] in each call. A failure of this is
    /// no failure of the call.
    pub const PREFAULT: Self = Self(1);

    /// Returns true if all of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Maximum number of pages that a call populates for [`Flags::PREFAULT`], so that no call takes long.
pub const PREFAULT_MAX_PAGES: u64 = 8192;

/// The attributes of a call: magic, flags and operation. They fit in 32 bits, for 32-bit guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// The operation.
    pub operation: Operation,
    /// Its flags.
    pub flags: Flags,
}

impl Attributes {
    /// `operation` without flags.
    #[must_use]
    pub const fn new(operation: Operation) -> Self {
        Self {
            operation,
            flags: Flags::NONE,
        }
    }

    /// The same with `flags`.
    #[must_use]
    pub const fn with(self, flags: Flags) -> Self {
        Self { flags, ..self }
    }

    /// The attributes as a number in a register.
    #[must_use]
    pub const fn encode(self) -> u64 {
        MAGIC << MAGIC_SHIFT
            | (self.flags.0 as u64) << FLAGS_SHIFT
            | (self.operation as u64) << OPERATION_SHIFT
    }

    /// The attributes from a number in a register.
    ///
    /// # Errors
    /// [`Error::NoSuchCall`] if it is not a call to Ebb, or the operation is unknown; [`Error::Invalid`] if a bit is
    /// set that must be 0, or a flag that the operation does not take.
    pub fn decode(register: u64) -> Result<Self, Error> {
        if register >> MAGIC_SHIFT != MAGIC {
            return Err(Error::NoSuchCall);
        }
        let number = (register >> OPERATION_SHIFT) as u8;
        let operation = Operation::ALL.into_iter().find(|op| *op as u8 == number);
        let operation = operation.ok_or(Error::NoSuchCall)?;
        let flags = Flags((register >> FLAGS_SHIFT) as u8 & 0xf);
        if register & RESERVED != 0 || !operation.flags().contains(flags) {
            return Err(Error::Invalid);
        }
        Ok(Self { operation, flags })
    }
}

/// First address and first address after a range of `pages` pages at `gpa`.
///
/// # Errors
/// [`Error::Invalid`] if it is not aligned, is empty, or wraps. KVM checks the same, except the length in bytes.
pub const fn range(gpa: u64, pages: u64) -> Result<(u64, u64), Error> {
    if !gpa.is_multiple_of(PAGE_SIZE) || pages == 0 {
        return Err(Error::Invalid);
    }
    let Some(bytes) = pages.checked_mul(PAGE_SIZE) else {
        return Err(Error::Invalid);
    };
    match gpa.checked_add(bytes) {
        Some(end) => Ok((gpa, end)),
        None => Err(Error::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_words_are_those_of_the_specification() {
        for (attributes, word) in [
            (Attributes::new(Operation::Features), 0xebb0_0100),
            (Attributes::new(Operation::LazyFree), 0xebb0_0200),
            (Attributes::new(Operation::Reuse), 0xebb0_0300),
            (
                Attributes::new(Operation::Reuse).with(Flags::PREFAULT),
                0xebb1_0300,
            ),
            (Attributes::new(Operation::LazyFreeBatch), 0xebb0_0400),
            (Attributes::new(Operation::ReuseBatch), 0xebb0_0500),
            (Attributes::new(Operation::Query), 0xebb0_0600),
            (Attributes::new(Operation::Reset), 0xebb0_0700),
            (Attributes::new(Operation::ArenaInfo), 0xebb0_0800),
            (Attributes::new(Operation::KernelNote), 0xebb0_0900),
        ] {
            assert_eq!(attributes.encode(), word);
            assert_eq!(Attributes::decode(word), Ok(attributes));
        }
    }

    #[test]
    fn what_is_not_ours_is_no_call_and_what_is_malformed_is_invalid() {
        for (word, error) in [
            (0, Error::NoSuchCall),
            // KVM's own: encrypted, pages of 4 KiB.
            (1 << 4, Error::NoSuchCall),
            (0xebb0_0200 | 1 << 32, Error::NoSuchCall),
            (0xeba0_0200, Error::NoSuchCall),
            (0xebb0_0000, Error::NoSuchCall),
            (0xebb0_0a00, Error::NoSuchCall),
            (0xebb0_ff00, Error::NoSuchCall),
            (0xebb0_0201, Error::Invalid),
            (0xebb0_0280, Error::Invalid),
            (0xebb1_0200, Error::Invalid),
            (0xebb2_0300, Error::Invalid),
        ] {
            assert_eq!(Attributes::decode(word), Err(error), "{word:#x}");
        }
    }

    #[test]
    fn ranges_are_never_rounded() {
        assert_eq!(range(0x1000, 2), Ok((0x1000, 0x3000)));
        for (gpa, pages) in [
            (0, 0),
            (1, 1),
            (0x1fff, 1),
            (0, u64::MAX),
            (0, 1 << 52),
            (0x1000, (1 << 52) - 1),
            (0u64.wrapping_sub(0x1000), 1),
        ] {
            assert_eq!(
                range(gpa, pages),
                Err(Error::Invalid),
                "{gpa:#x} {pages:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_word(word in any::<u64>(), ours in any::<bool>()) {
            let word = if ours { 0xebb0_0000 | word & 0xf_ffff } else { word };
            if let Ok(attributes) = Attributes::decode(word) {
                prop_assert_eq!(attributes.encode(), word);
            }
        }

        #[test]
        fn a_range_has_the_length_that_was_asked_for(gpa in any::<u64>(), pages in any::<u64>()) {
            for gpa in [gpa, gpa & !(PAGE_SIZE - 1)] {
                if let Ok((start, end)) = range(gpa, pages) {
                    prop_assert_eq!(start, gpa);
                    prop_assert_eq!(u128::from(end - start), u128::from(pages) * u128::from(PAGE_SIZE));
                }
            }
        }
    }
}
