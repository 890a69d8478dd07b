//! The file that the guest's output goes to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file that does not grow without bound. When it is full it becomes `PATH.1`, instead of the one before, and a new one
/// begins.
#[derive(Debug)]
pub struct SerialFile {
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    len: u64,
    /// Bytes that it may have; pipes and devices have no limit.
    limit: u64,
    has_failed: bool,
}

impl SerialFile {
    /// Bytes in a file at most.
    pub const LIMIT: u64 = 64 << 20;

    /// Opens the file, makes it if there is none, and empties it.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, Self::LIMIT)
    }

    /// The same, with at most `limit` bytes in each of the two files.
    ///
    /// # Errors
    /// open(2)'s.
    pub fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        let file = create(path)?;
        let is_file = file.metadata()?.is_file();
        Ok(Self {
            path: std::path::absolute(path)?,
            file,
            len: 0,
            limit: if is_file { limit } else { u64::MAX },
            has_failed: false,
        })
    }

    /// Begins a new file. Where the old one cannot be kept, it is emptied.
    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        if fs::rename(&self.path, &old).is_err() {
            tracing::warn!("{} is full and begins anew", self.path.display());
        }
        self.file = create(&self.path)?;
        self.len = 0;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
}

impl Write for SerialFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let write = |this: &mut Self| {
            if this.len >= this.limit {
                this.rotate()?;
            }
            let room = usize::try_from(this.limit - this.len).unwrap_or(usize::MAX);
            this.file.write(&bytes[..bytes.len().min(room)])
        };
        let written = write(self);
        match &written {
            Ok(count) => self.len += *count as u64,
            // Once: a full disk must not flood the log.
            Err(error) if !self.has_failed => {
                self.has_failed = true;
                tracing::warn!(
                    "{}: the guest's output is lost: {error}",
                    self.path.display()
                );
            }
            Err(_) => {}
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_the_last_output_in_two_files() {
        let folder = tempfile::tempdir().unwrap();
        let [path, old] = ["serial", "serial.1"].map(|name| folder.path().join(name));
        fs::write(&path, "from the machine before").unwrap();
        let mut file = SerialFile::with_limit(&path, 10).unwrap();
        for line in 0..10 {
            file.write_all(format!("line {line}\n").as_bytes()).unwrap();
        }
        let all = [&old, &path].map(|path| fs::read_to_string(path).unwrap());
        assert_eq!(all, ["ine 7\nline", " 8\nline 9\n"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
