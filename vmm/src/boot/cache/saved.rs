//! A file of the cache: words of 64 bits (little endian) that say where the kernel is entered and which addresses follow,
//! and then what is at these addresses.
//!
//! A checksum of the words and one of the rest tell damage. They do not tell malice: the folder does that.

use std::io::{self, Read, Write};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::invalid;
use crate::arch::layout;
use crate::arch::registers::Entry;
use crate::boot::image::segments;

/// What is zero is left out in units of this many bytes.
const CHUNK: usize = 64 << 10;
/// "EBBKERN" and a zero.
const MAGIC: u64 = u64::from_le_bytes(*b"EBBKERN\0");
/// Words before the addresses: magic number, kind of entry, entry, end, checksum of what follows the words, number of addresses.
const FIXED: usize = 6;
/// Most ranges in a file: a kernel of 1 GiB with something in every other chunk.
const MAX_RANGES: u64 = 8 << 10;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Where it is entered.
    pub entry: Entry,
    /// First address after it.
    pub end: u64,
}

/// A kernel cannot be read from a file.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The guest has too little memory for it.
    #[error("it does not fit into guest memory")]
    TooLarge,
    /// The file is damaged, or cannot be read.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// What a file of the cache contains.
pub struct Contents<'a> {
    words: Vec<u64>,
    parts: Vec<&'a [u8]>,
}

impl<'a> Contents<'a> {
    /// The kernel `elf`, which is in guest memory as `unpacked` says. `None` if it is not made as kernels are.
    #[must_use]
    pub fn new(elf: &'a [u8], unpacked: Unpacked) -> Option<Self> {
        let (mut ranges, mut parts, mut crc) = (Vec::new(), Vec::new(), crc32fast::Hasher::new());
        for (address, segment) in segments(elf) {
            let chunks = (address..).step_by(CHUNK).zip(segment.chunks(CHUNK));
            for (start, chunk) in chunks.filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0)) {
                ranges.extend([start, chunk.len() as u64]);
                parts.push(chunk);
                crc.update(chunk);
            }
        }
        let count = parts.len() as u64;
        let (kind, rip) = match unpacked.entry {
            Entry::Pvh { rip } => (0, rip),
            Entry::Linux64 { rip } => (1, rip),
        };
        let crc = u64::from(crc.finalize());
        let mut words = vec![MAGIC, kind, rip, unpacked.end, crc, count];
        words.extend(ranges);
        words.push(checksum(&words));
        (count <= MAX_RANGES).then_some(Self { words, parts })
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        let data: usize = self.parts.iter().map(|part| part.len()).sum();
        (self.words.len() * 8 + data) as u64
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of `file`.
    pub fn write(&self, file: &mut impl Write) -> io::Result<()> {
        file.write_all(&bytes_of(&self.words))?;
        self.parts.iter().try_for_each(|part| file.write_all(part))
    }
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn checksum(words: &[u64]) -> u64 {
    crc32fast::hash(&bytes_of(words)).into()
}

/// Reads a kernel into `memory`, which is zero and ends at `low_end`.
///
/// # Errors
/// [`ReadError`]; memory is zero as before.
pub fn read(
    file: &mut impl Read,
    memory: &GuestMemoryMmap,
    low_end: u64,
) -> Result<Unpacked, ReadError> {
    let mut words = read_words(file, FIXED)?;
    let [magic, kind, rip, end, crc, count] = words[..] else {
        return Err(invalid("it is too short").into());
    };
    if magic != MAGIC || count > MAX_RANGES {
        return Err(invalid("it does not begin as it should").into());
    }
    words.extend(read_words(file, 2 * count as usize + 1)?);
    let sum = words.pop();
    if sum != Some(checksum(&words)) {
        return Err(invalid("its checksum is wrong").into());
    }
    if end > low_end {
        return Err(ReadError::TooLarge);
    }
    let ranges = words[FIXED..].chunks_exact(2);
    let ranges: Option<Vec<Range<u64>>> =
        ranges.map(|words| range(words[0], words[1], end)).collect();
    let ranges = ranges.ok_or_else(|| invalid("an address is out of bounds"))?;
    let entry = match kind {
        0 => Entry::Pvh { rip },
        _ => Entry::Linux64 { rip },
    };
    match read_ranges(file, memory, &ranges) {
        Ok(sum) if u64::from(sum) == crc => Ok(Unpacked { entry, end }),
        read => {
            clear(memory, &ranges)?;
            let damaged = || invalid("the checksum of its content is wrong");
            Err(read.err().unwrap_or_else(damaged).into())
        }
    }
}

fn range(start: u64, len: u64, end: u64) -> Option<Range<u64>> {
    let range = start..start.checked_add(len)?;
    let fits = start >= layout::HIGH_RAM_START && range.end <= end && len <= CHUNK as u64;
    fits.then_some(range)
}

fn read_words(file: &mut impl Read, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact(&mut bytes)?;
    let words = bytes.as_chunks::<8>().0;
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// Reads each of `ranges`, and returns the checksum of all.
fn read_ranges(
    file: &mut impl Read,
    memory: &GuestMemoryMmap,
    ranges: &[Range<u64>],
) -> io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    // One that stays in the processor's cache: the content passes through it once, and is checked there.
    let mut buffer = vec![0; CHUNK];
    for range in ranges {
        let chunk = &mut buffer[..(range.end - range.start) as usize];
        file.read_exact(chunk)?;
        crc.update(chunk);
        let written = memory.write_slice(chunk, GuestAddress(range.start));
        written.map_err(io::Error::other)?;
    }
    Ok(crc.finalize())
}

fn clear(memory: &GuestMemoryMmap, ranges: &[Range<u64>]) -> io::Result<()> {
    let zeroes = [0; 4096];
    for range in ranges {
        for at in range.clone().step_by(zeroes.len()) {
            let len = zeroes.len().min((range.end - at) as usize);
            let written = memory.write_slice(&zeroes[..len], GuestAddress(at));
            written.map_err(io::Error::other)?;
        }
    }
    Ok(())
}
