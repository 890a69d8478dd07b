//! The guest in Rust (`ebb-payload-guest`), as an ELF file for `ebb run --kernel`.

use std::io;
use std::path::Path;

pub use ebb_payload_guest::{COUNTS, Counts, Parameters, Task, map, marker};

use crate::script::Scripts;
use crate::{RESULT_SIZE, elf, results};

/// The flat image from the build script.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));

/// Writes the guest and its parameters as an ELF file.
///
/// # Errors
/// The error of writing the file, and `InvalidInput` if there are too many vCPUs or too little memory.
pub fn write(path: &Path, parameters: &Parameters) -> io::Result<()> {
    write_with(path, parameters, None)
}

/// The same with scripts, for [`Task::Scripts`].
///
/// # Errors
/// Those of [`write()`].
pub fn write_with(
    path: &Path,
    parameters: &Parameters,
    scripts: Option<&Scripts>,
) -> io::Result<()> {
    let fits =
        (1..=map::MAX_VCPUS).contains(&parameters.vcpus) && parameters.ram > map::TEST_MEMORY;
    if !fits || map::IMAGE + IMAGE.len() as u64 > map::IMAGE_END {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let words = [
        parameters.task,
        parameters.vcpus,
        parameters.ram,
        parameters.operations,
        parameters.seed,
    ];
    let words = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut segments = elf::page_tables([map::PML4, map::PDPT, map::PD], 8);
    segments.push((map::IMAGE, IMAGE.to_vec()));
    segments.push((map::PARAMETERS, words));
    segments.extend(scripts.map(|scripts| (map::SCRIPTS, scripts.bytes().to_vec())));
    std::fs::write(path, elf::file(map::IMAGE, &segments))
}

/// The counts in the serial port's output. `None` if the guest did not reach its end.
#[must_use]
pub fn counts(serial: &[u8]) -> Option<Counts> {
    let words = results(serial);
    let at = words.iter().position(|&word| word == marker::COUNTS)?;
    let (counts, _) = words.get(at + 1..)?.split_first_chunk::<COUNTS>()?;
    Some(Counts::from_words(*counts))
}

/// Returns true if the serial port's output contains `word`, which must not be a possible measurement.
#[must_use]
pub fn has_sent(serial: &[u8], word: u64) -> bool {
    let (words, _) = serial.as_chunks::<RESULT_SIZE>();
    words.iter().any(|bytes| u64::from_le_bytes(*bytes) == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_fits() {
        assert!(IMAGE.len() > 1000);
        assert!(map::IMAGE + (IMAGE.len() as u64) < map::IMAGE_END);
    }
}
