//! Small files of the kernel that are read repeatedly.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Maximum number of bytes read; the files are smaller.
const MAX_LEN: usize = 8192;

/// A file that stays open. Opening it each time would charge kernel memory to this process's cgroup, and a thread that
/// charges a cgroup above its `memory.high` is put to sleep for up to 2 s (Documentation/admin-guide/cgroup-v2.rst). That
/// must not happen to the thread that would free memory.
#[derive(Debug)]
pub struct KeptFile(Option<File>);

impl KeptFile {
    /// Opens the file and reads it once, so that the kernel has allocated its buffer.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let kept = Self(File::open(path).ok());
        kept.read(|_| None::<()>);
        kept
    }

    /// Its descriptor, to be polled: files of the kernel that have changed since they were last read poll `POLLPRI`.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(File::as_fd)
    }

    /// Returns the result of `parse` for the file's text; `None` if the file cannot be read.
    pub fn read<T>(&self, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let file = self.0.as_ref()?;
        let mut buffer = [0; MAX_LEN];
        let mut len = 0;
        while len < MAX_LEN {
            match file.read_at(&mut buffer[len..], len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        parse(std::str::from_utf8(&buffer[..len]).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_anew_each_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let kept = KeptFile::open(file.path());
        for text in ["one", "twenty"] {
            std::fs::write(file.path(), text).unwrap();
            assert_eq!(kept.read(|it| Some(it.to_owned())).as_deref(), Some(text));
        }
        assert_eq!(kept.read(|_| None::<()>), None);
        let missing = KeptFile::open(Path::new("/nowhere/at/all"));
        assert_eq!(missing.read(|_| Some(())), None);
    }
}
