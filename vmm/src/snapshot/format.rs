//! The state file: a head, sections, and checksums of each section and of the whole.
//!
//! ```text
//! 0   8  "EBBSTATE"
//! 8   4  version
//! 12  4  number of sections
//! then for each section
//!     16 name, padded with zeros
//!     8  length in bytes
//!     4  CRC-32 of the content
//!     .. content, JSON
//! last 4  CRC-32 of everything before
//! ```
//! Numbers are little-endian.

use serde::Serialize;
use serde::de::DeserializeOwned;

const MAGIC: &[u8; 8] = b"EBBSTATE";
/// Version of the format. A file of another one is refused.
pub const VERSION: u32 = 3;
/// Bytes of a section's name.
const NAME: usize = 16;
/// No file has more: it would be of no machine.
const MAX_SECTIONS: u32 = 64;

/// A file is no state file of this version, or was altered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It does not begin as one.
    #[error("is not a state file of Ebb")]
    NotAState,
    /// Another version.
    #[error(
        "has version {0}, but this Ebb reads version {VERSION}; restore it with the Ebb that made it"
    )]
    Version(u32),
    /// It ends early.
    #[error("is truncated; make a new snapshot, or use a whole copy")]
    Truncated,
    /// A checksum is wrong, or there is more than there should be.
    #[error("was altered: the checksum of {0} is wrong; use an unaltered copy")]
    Altered(String),
    /// A section is not there or does not hold what it should.
    #[error("has no usable section '{0}': {1}")]
    Section(&'static str, String),
}

/// Writes a state file.
#[derive(Debug, Default)]
pub struct Writer {
    sections: Vec<(&'static str, Vec<u8>)>,
}

impl Writer {
    /// Adds a section.
    ///
    /// # Errors
    /// [`FormatError::Section`] if the value has no form in JSON.
    pub fn add(&mut self, name: &'static str, value: &impl Serialize) -> Result<(), FormatError> {
        let content = serde_json::to_vec(value);
        let content = content.map_err(|error| FormatError::Section(name, error.to_string()))?;
        self.sections.push((name, content));
        Ok(())
    }

    /// The file.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend(VERSION.to_le_bytes());
        file.extend((self.sections.len() as u32).to_le_bytes());
        for (name, content) in &self.sections {
            let mut padded = [0; NAME];
            for (to, from) in padded.iter_mut().zip(name.bytes()) {
                *to = from;
            }
            file.extend(padded);
            file.extend((content.len() as u64).to_le_bytes());
            file.extend(crc32fast::hash(content).to_le_bytes());
            file.extend(content);
        }
        file.extend(crc32fast::hash(&file).to_le_bytes());
        file
    }
}

/// A state file that was read and whose checksums are right.
#[derive(Debug)]
pub struct Reader<'a> {
    sections: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Reader<'a> {
    /// Checks a file and finds its sections.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn new(file: &'a [u8]) -> Result<Self, FormatError> {
        let mut rest = file;
        if take(&mut rest, MAGIC.len()) != Ok(MAGIC) {
            return Err(FormatError::NotAState);
        }
        let version = number(&mut rest)?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let count = number(&mut rest)?;
        if count > MAX_SECTIONS {
            return Err(FormatError::Altered("the head".into()));
        }
        let mut sections = Vec::new();
        for _ in 0..count {
            let name = take(&mut rest, NAME)?;
            let len = [number(&mut rest)?, number(&mut rest)?].map(u64::from);
            let crc = number(&mut rest)?;
            let len = usize::try_from(len[0] | len[1] << 32).map_err(|_| FormatError::Truncated)?;
            let content = take(&mut rest, len)?;
            if crc32fast::hash(content) != crc {
                let name = String::from_utf8_lossy(name);
                let name = name.trim_end_matches('\0').escape_debug().to_string();
                return Err(FormatError::Altered(format!("section '{name}'")));
            }
            sections.push((name, content));
        }
        let whole = file.len() - rest.len();
        let crc = number(&mut rest)?;
        if crc32fast::hash(file.get(..whole).unwrap_or_default()) != crc || !rest.is_empty() {
            return Err(FormatError::Altered("the file".into()));
        }
        Ok(Self { sections })
    }

    /// What the section `name` holds.
    ///
    /// # Errors
    /// [`FormatError::Section`].
    pub fn section<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, FormatError> {
        let is_it = |padded: &[u8]| {
            let (start, end) = padded.split_at(name.len().min(NAME));
            start == name.as_bytes() && end.iter().all(|byte| *byte == 0)
        };
        let found = self.sections.iter().find(|(padded, _)| is_it(padded));
        let missing = || FormatError::Section(name, "it is missing".into());
        let (_, content) = found.ok_or_else(missing)?;
        serde_json::from_slice(content)
            .map_err(|error| FormatError::Section(name, error.to_string()))
    }
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], FormatError> {
    let (taken, left) = rest.split_at_checked(len).ok_or(FormatError::Truncated)?;
    *rest = left;
    Ok(taken)
}

fn number(rest: &mut &[u8]) -> Result<u32, FormatError> {
    let (bytes, left) = rest.split_first_chunk().ok_or(FormatError::Truncated)?;
    *rest = left;
    Ok(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.add("numbers", &[1, 2, 3]).unwrap();
        writer.add("text", &"words").unwrap();
        writer.finish()
    }

    #[test]
    fn what_is_written_is_read() {
        let file = file();
        let reader = Reader::new(&file).unwrap();
        assert_eq!(reader.section::<Vec<u32>>("numbers").unwrap(), [1, 2, 3]);
        assert_eq!(reader.section::<String>("text").unwrap(), "words");
        let wrong = reader.section::<String>("numbers").unwrap_err();
        assert!(matches!(wrong, FormatError::Section("numbers", _)));
        assert!(reader.section::<String>("tex").is_err());
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_noticed() {
        let file = file();
        for len in 0..file.len() {
            assert!(Reader::new(&file[..len]).is_err(), "{len} bytes");
        }
        for at in 0..file.len() {
            let mut altered = file.clone();
            altered[at] ^= 1;
            assert!(Reader::new(&altered).is_err(), "byte {at}");
        }
        let more = [&file[..], b"x"].concat();
        assert!(Reader::new(&more).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let mut file = file();
        file[8] = 1;
        let error = Reader::new(&file).unwrap_err();
        assert_eq!(error, FormatError::Version(1));
        assert!(error.to_string().contains("has version 1"));
    }

    proptest! {
        #[test]
        fn noise_is_refused(mut noise in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Reader::new(&noise).is_err());
            noise.splice(0..0, [&MAGIC[..], &VERSION.to_le_bytes()].concat());
            prop_assert!(Reader::new(&noise).is_err());
        }
    }
}
