//! Unpacked kernels, kept from one start to the next.
//!
//! A file of the cache holds what a packed kernel looks like in guest memory, without what is zero there. Its name is a
//! digest of the packed kernel. So a start that finds its file neither unpacks nor copies: it reads the file straight into
//! guest memory. Whatever is wrong with the cache costs time and a line in the log, never a start.

mod folder;
mod saved;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::path::Path;

use vm_memory::GuestMemoryMmap;

use folder::Folder;
use saved::ReadError;
pub use saved::{Contents, Unpacked};

/// The version of the files' format: a part of their names, so that another version of Ebb does not see them.
const VERSION: &str = "v1";

/// The cache, and which of its files is that of one packed kernel.
pub struct Cache {
    folder: Folder,
    name: String,
}

impl Cache {
    /// The place of the kernel that is packed in `packed`; `None`, and a line in the log, if the cache in `folder` is unusable.
    #[must_use]
    pub fn open(folder: &Path, packed: impl Read) -> Option<Self> {
        let opened = Folder::open(folder).and_then(|opened| Ok((opened, name_of(packed)?)));
        match opened {
            Ok((folder, name)) => Some(Self { folder, name }),
            Err(error) => {
                tracing::warn!(
                    "kernel cache {}: {error}; choose another one with --kernel-cache DIR, or off",
                    folder.display()
                );
                None
            }
        }
    }

    /// Reads the kernel into `memory`, which is zero and ends at `low_end`. `None` if it is not there, or damaged: memory is
    /// zero then, as before.
    #[must_use]
    pub fn load(&self, memory: &GuestMemoryMmap, low_end: u64) -> Option<Unpacked> {
        let mut file = match self.folder.find(&self.name) {
            Ok(file) => file?,
            Err(error) => {
                self.complain("cannot be read", &error);
                return None;
            }
        };
        match saved::read(&mut file, memory, low_end) {
            Ok(unpacked) => {
                self.folder.touch(&file);
                Some(unpacked)
            }
            // The same complaint comes, with its remedy, when the kernel is unpacked.
            Err(ReadError::TooLarge) => None,
            Err(error) => {
                self.complain("is damaged and made anew", &error);
                self.folder.remove(&self.name);
                None
            }
        }
    }

    /// Keeps a kernel, which came out of `packed`, for the next start.
    pub fn save(&self, packed: &[u8], kernel: &Contents<'_>) {
        let written = |file: &mut _| kernel.write(file);
        // The file that was packed may have changed since it was opened.
        let name = name_of(packed);
        let saved = name.and_then(|name| self.folder.store(&name, kernel.len(), written));
        if let Err(error) = saved {
            self.complain("cannot be written", &error);
        }
    }

    fn complain(&self, what: &str, error: &dyn std::fmt::Display) {
        let path = self.folder.path().join(&self.name);
        tracing::warn!("kernel cache: {} {what}: {error}", path.display());
    }
}

/// The name of the file for what is packed in `packed`.
fn name_of(mut packed: impl Read) -> io::Result<String> {
    let mut digest = blake3::Hasher::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match packed.read(&mut buffer)? {
            0 => return Ok(format!("{}.{VERSION}", digest.finalize().to_hex())),
            count => digest.update(&buffer[..count]),
        };
    }
}

/// An error that says what is wrong with a file.
fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
