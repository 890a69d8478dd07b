//! The guest in Rust (`payload-guest`) as a file that `ebb run --kernel` starts.

use std::io;
use std::path::Path;

pub use ebb_payload_guest::{COUNTS, Counts, Job, Parameters, map, marker};

use crate::{RESULT_SIZE, elf, results};

/// The flat image; the build script makes it.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));

/// Writes the guest with its parameters as an ELF file.
///
/// # Errors
/// The error of the system call; `InvalidInput` when there are too many vCPUs or too little memory.
pub fn write(path: &Path, parameters: &Parameters) -> io::Result<()> {
    let fits = (1..=map::MAX_VCPUS).contains(&parameters.vcpus) && parameters.ram > map::FREE;
    if !fits || map::IMAGE + IMAGE.len() as u64 > map::IMAGE_END {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let words = [
        parameters.job,
        parameters.vcpus,
        parameters.ram,
        parameters.operations,
        parameters.seed,
    ];
    let words = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut segments = elf::page_tables([map::PML4, map::PDPT, map::PD], 4);
    segments.push((map::IMAGE, IMAGE.to_vec()));
    segments.push((map::PARAMETERS, words));
    std::fs::write(path, elf::file(map::IMAGE, &segments))
}

/// The counts in what the guest wrote to the serial port; `None` when it did not come to its end.
#[must_use]
pub fn counts(serial: &[u8]) -> Option<Counts> {
    let words = results(serial);
    let at = words.iter().position(|&word| word == marker::COUNTS)?;
    let (counts, _) = words.get(at + 1..)?.split_first_chunk::<COUNTS>()?;
    Some(Counts::from_words(*counts))
}

/// Whether the guest has said `word`, which is no number that it measures.
#[must_use]
pub fn has_said(serial: &[u8], word: u64) -> bool {
    let (words, _) = serial.as_chunks::<RESULT_SIZE>();
    words.iter().any(|bytes| u64::from_le_bytes(*bytes) == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_there_and_has_room() {
        assert!(IMAGE.len() > 1000);
        assert!(map::IMAGE + (IMAGE.len() as u64) < map::IMAGE_END);
    }
}
