//! The free lists of a guest's kernel: a note with values of the input, and memory that the input fills.

use ebb_core::range::GpaRange;
use ebb_vmm::guest_kernel::{GuestKernel, ReadGuest};

use super::machine::{MIB, range};
use crate::Bytes;

const RAM: u64 = 16 * MIB;
const NOTE: u64 = 8 * MIB;

/// Memory that begins as the words of an input, is the note from [`NOTE`] on, and else repeats the words.
struct Memory {
    words: Vec<u64>,
    note: Vec<u8>,
}

impl ReadGuest for Memory {
    fn load(&self, gpa: u64) -> Option<u64> {
        if !gpa.is_multiple_of(8) || gpa >= RAM {
            return None;
        }
        if let Some(at) = gpa.checked_sub(NOTE)
            && let Some(bytes) = self.note.get(at as usize..)
        {
            let mut word = [0; 8];
            let len = bytes.len().min(8);
            word[..len].copy_from_slice(&bytes[..len]);
            return Some(u64::from_le_bytes(word));
        }
        let index = (gpa / 8) as usize % self.words.len().max(1);
        self.words.get(index).copied().or(Some(0))
    }
}

/// An ELF note of type 0 with the name `VMCOREINFO`.
fn note(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [11, text.len() as u32, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(b"VMCOREINFO\0\0");
    bytes.extend(text);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

pub fn run(input: &[u8]) {
    // The text of the note, a zero byte, and words.
    let end = input
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(input.len());
    let (text, rest) = input.split_at(end);
    let mut rest = Bytes::new(rest.get(1..).unwrap_or_default());
    let (first, order) = (u64::from(rest.u16()) % 4096, u32::from(rest.u8()));
    let mut words = Vec::new();
    while !rest.is_empty() && words.len() < 4096 {
        words.push(rest.u64());
    }
    let memory = Memory {
        words,
        note: note(text),
    };
    let Ok(kernel) = GuestKernel::accept(&memory, range(NOTE, NOTE + 8192)) else {
        return;
    };
    let within = GpaRange::new(first * 4096, RAM).expect("a range");
    let mut found = Vec::new();
    let end = kernel.find_free(&memory, within, order, &mut found);
    assert!(within.start() < end && end <= within.end());
    for piece in &found {
        assert!(
            within.start() <= piece.start() && piece.end() <= end,
            "{piece:?}"
        );
    }
    let _ = kernel.is_free(&memory, within);
    let _ = kernel.is_unchanged(&memory);
    let _ = kernel.poisons(&memory, range(0, 4096));
}
