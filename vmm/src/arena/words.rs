//! The words of a table in guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_core::table::Words;
use ebb_hypercall_abi::granule::Word;
use ebb_hypercall_abi::shared_word;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};

const WORD: usize = size_of::<u64>();

/// Words in guest memory, reached by volatile and atomic access alone.
pub struct GuestWords {
    memory: Arc<GuestMemoryMmap>,
    start: GuestAddress,
    len: usize,
}

impl GuestWords {
    /// `len` words at `start`; `None` when they are not aligned or not wholly in one region of `memory`.
    pub fn new(memory: Arc<GuestMemoryMmap>, start: u64, len: usize) -> Option<Self> {
        let words = Self {
            memory,
            start: GuestAddress(start),
            len,
        };
        let there = start.is_multiple_of(WORD as u64) && words.slice(0, len).is_some();
        there.then_some(words)
    }

    fn slice(&self, first: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let at = GuestAddress(self.start.0.checked_add((first * WORD) as u64)?);
        self.memory.get_slice(at, len * WORD).ok()
    }

    /// Runs `action` on a word; `None` if there is no such word.
    pub fn with<T>(&self, index: usize, action: impl FnOnce(&AtomicU64) -> T) -> Option<T> {
        let slice = self.slice(index, 1)?;
        Some(action(slice.get_atomic_ref(0).ok()?))
    }
}

impl Words for GuestWords {
    fn count(&self) -> usize {
        self.len
    }

    fn load_all(&self, first: usize, words: &mut [u64]) {
        if let Some(slice) = self.slice(first, words.len()) {
            slice.copy_to(words);
        }
    }

    fn load(&self, index: usize) -> Word {
        let raw = self.with(index, |word| word.load(Ordering::Acquire));
        Word::from_raw(raw.unwrap_or_default())
    }

    fn swap(&self, index: usize, current: Word, new: Word) -> bool {
        self.with(index, |word| shared_word::swap(word, current, new))
            .unwrap_or(false)
    }
}

/// Writes `words` to `start`; false when that is not guest memory.
pub fn write(memory: &GuestMemoryMmap, start: u64, words: &[u64]) -> bool {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(start)).is_ok()
}

/// Stores one aligned word; false when that is not guest memory.
pub fn store(memory: &GuestMemoryMmap, at: u64, word: u64) -> bool {
    memory
        .store(word, GuestAddress(at), Ordering::Release)
        .is_ok()
}
