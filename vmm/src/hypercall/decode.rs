//! Decodes the registers of a call. Pure: does not read guest memory.

use ebb_core::range::{GpaRange, PAGE_SIZE};
use ebb_hypercall_abi::block::BATCH_MAX_PAGES;
use ebb_hypercall_abi::{Attributes, Error, Flags, Operation, call};

/// The three numbers of a call, from the guest's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// Address of the range or block.
    pub gpa: u64,
    /// Its length in pages.
    pub pages: u64,
    /// Operation, flags and magic.
    pub attributes: u64,
}

/// A call whose registers are valid. Its range is not yet checked to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Return the features.
    Features,
    /// The range is lazily free.
    LazyFree(GpaRange),
    /// The range is in use.
    Reuse {
        /// Where.
        range: GpaRange,
        /// Populate it.
        prefault: bool,
    },
    /// The ranges in the block are lazily free.
    LazyFreeBatch(GpaRange),
    /// The ranges in the block are in use.
    ReuseBatch {
        /// Where the descriptors are.
        block: GpaRange,
        /// Populate the ranges.
        prefault: bool,
    },
    /// Answer into the block.
    Query(GpaRange),
    /// Everything is in use.
    Reset,
    /// Describe an arena in the block.
    ArenaInfo(GpaRange),
    /// The kernel's note is in the range.
    KernelNote(GpaRange),
}

impl Request {
    /// The operation of the call.
    #[must_use]
    pub const fn operation(self) -> Operation {
        match self {
            Self::Features => Operation::Features,
            Self::LazyFree(_) => Operation::LazyFree,
            Self::Reuse { .. } => Operation::Reuse,
            Self::LazyFreeBatch(_) => Operation::LazyFreeBatch,
            Self::ReuseBatch { .. } => Operation::ReuseBatch,
            Self::Query(_) => Operation::Query,
            Self::Reset => Operation::Reset,
            Self::ArenaInfo(_) => Operation::ArenaInfo,
            Self::KernelNote(_) => Operation::KernelNote,
        }
    }
}

/// The range of `pages` pages at `gpa`.
pub(super) fn range(gpa: u64, pages: u64) -> Result<GpaRange, Error> {
    let (start, end) = call::range(gpa, pages)?;
    GpaRange::new(start, end).ok_or(Error::Invalid)
}

/// Decodes a call.
///
/// # Errors
/// The status that the guest gets.
pub fn decode(arguments: Arguments) -> Result<Request, Error> {
    let Arguments {
        gpa,
        pages,
        attributes,
    } = arguments;
    let Attributes { operation, flags } = Attributes::decode(attributes)?;
    let range = range(gpa, pages)?;
    let prefault = flags.contains(Flags::PREFAULT);
    let nowhere = gpa == 0 && pages == 1;
    Ok(match operation {
        Operation::LazyFree => Request::LazyFree(range),
        Operation::Reuse => Request::Reuse { range, prefault },
        Operation::LazyFreeBatch if pages <= BATCH_MAX_PAGES => Request::LazyFreeBatch(range),
        Operation::ReuseBatch if pages <= BATCH_MAX_PAGES => Request::ReuseBatch {
            block: range,
            prefault,
        },
        Operation::Query if range.len() == PAGE_SIZE => Request::Query(range),
        Operation::ArenaInfo if range.len() == PAGE_SIZE => Request::ArenaInfo(range),
        Operation::KernelNote => Request::KernelNote(range),
        Operation::Features if nowhere => Request::Features,
        Operation::Reset if nowhere => Request::Reset,
        _ => return Err(Error::Invalid),
    })
}
