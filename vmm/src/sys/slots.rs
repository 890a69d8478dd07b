//! A small file that processes share: each owns one record of it, and reads those of the others.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Bytes of a record.
pub const RECORD: usize = 128;

/// Maximum number of records.
pub const MAX_SLOTS: usize = 512;

/// A file of records. A record belongs to the process that holds the lock on its bytes; the kernel releases the lock however
/// that process ends. Records are read and written, never mapped: a file that somebody cuts short cannot kill a reader.
///
/// Nothing else is certain: whoever may write to the file may write anything to any record, and a record may be read while
/// it is written. The reader must check what it gets.
#[derive(Debug)]
pub struct SlotFile {
    file: File,
    slot: usize,
}

impl SlotFile {
    /// Opens the file, or makes it and its folder, and takes the first record that nobody has.
    ///
    /// # Errors
    /// Those of open(2); `PermissionDenied` if the file is not a regular one of root or of this user, or if everybody may
    /// write to it; `StorageFull` if all records are taken.
    pub fn claim(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            // If this fails, opening the file fails, too.
            let _ = DirBuilder::new().mode(0o755).create(folder);
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // Whatever stands there must not be followed, nor waited for.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let meta = file.metadata()?;
        let user = rustix::process::geteuid().as_raw();
        let trusted = meta.uid() == 0 || meta.uid() == user;
        if !meta.is_file() || !trusted || meta.mode() & 0o002 != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let slot = (0..MAX_SLOTS).find(|&slot| lock(&file, slot));
        let slot = slot.ok_or(io::ErrorKind::StorageFull)?;
        Ok(Self { file, slot })
    }

    /// The number of the own record.
    #[must_use]
    pub const fn slot(&self) -> usize {
        self.slot
    }

    /// Writes the own record.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn write(&self, record: &[u8; RECORD]) -> io::Result<()> {
        self.file.write_all_at(record, (self.slot * RECORD) as u64)
    }

    /// Calls `each` for all records, the own one included, with their numbers. Allocates nothing, see [`super::KeptFile`].
    ///
    /// # Errors
    /// Those of read(2).
    pub fn read(&self, mut each: impl FnMut(usize, &[u8; RECORD])) -> io::Result<()> {
        let mut records = [[0; RECORD]; MAX_SLOTS / 16];
        for first in (0..MAX_SLOTS).step_by(records.len()) {
            let bytes = records.as_flattened_mut();
            let mut len = 0;
            while len < bytes.len() {
                let at = first * RECORD + len;
                match self.file.read_at(&mut bytes[len..], at as u64) {
                    Ok(0) => break,
                    Ok(more) => len += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            let whole = &records[..len / RECORD];
            for (index, record) in whole.iter().enumerate() {
                each(first + index, record);
            }
            if whole.len() < records.len() {
                break;
            }
        }
        Ok(())
    }
}

/// Takes the lock on a record without waiting. Returns false if another open file has it.
fn lock(file: &File, slot: usize) -> bool {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: (slot * RECORD) as _,
        l_len: RECORD as _,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel reads the structure during the call only.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn read(file: &SlotFile) -> Vec<[u8; RECORD]> {
        let mut records = Vec::new();
        let each = |slot, record: &[u8; RECORD]| {
            assert_eq!(slot, records.len());
            records.push(*record);
        };
        file.read(each).unwrap();
        records
    }

    #[test]
    fn each_has_a_record_and_reads_all() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("sub/peers");
        let files: Vec<_> = (0..3).map(|_| SlotFile::claim(&path).unwrap()).collect();
        assert!(files.iter().map(SlotFile::slot).eq(0..3));
        files[2].write(&[2; RECORD]).unwrap();
        files[0].write(&[9; RECORD]).unwrap();
        assert_eq!(read(&files[1]), [[9; RECORD], [0; RECORD], [2; RECORD]]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_record_of_one_that_has_ended_is_taken_by_the_next() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("peers");
        let claim = || SlotFile::claim(&path).unwrap();
        let (first, second) = (claim(), claim());
        drop(first);
        assert_eq!((claim().slot(), second.slot()), (0, 1));
    }

    #[test]
    fn there_is_an_end_to_the_records() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("peers");
        let held = SlotFile::claim(&path).unwrap();
        assert!((1..MAX_SLOTS).all(|slot| lock(&held.file, slot)));
        let full = SlotFile::claim(&path).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        fs::write(&path, vec![1; 2 * MAX_SLOTS * RECORD]).unwrap();
        assert_eq!(read(&held).len(), MAX_SLOTS);
        fs::write(&path, vec![1; 40 * RECORD]).unwrap();
        assert_eq!(read(&held), vec![[1; RECORD]; 40]);
        fs::write(&path, [1; RECORD + 5]).unwrap();
        assert_eq!(read(&held).len(), 1, "cut short");
    }

    #[test]
    fn files_that_others_may_write_and_what_is_no_file_are_refused() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("peers");
        fs::write(&path, "").unwrap();
        let open_to = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        open_to(0o666);
        let refused = SlotFile::claim(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        open_to(0o660);
        assert!(SlotFile::claim(&path).is_ok());
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(SlotFile::claim(&link).is_err());
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        assert!(SlotFile::claim(&pipe).is_err());
        assert!(SlotFile::claim(Path::new("/proc/none/peers")).is_err());
    }

    #[test]
    fn files_of_other_users_are_refused() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("peers");
        fs::write(&path, "").unwrap();
        if std::os::unix::fs::chown(&path, Some(12_345), None).is_ok() {
            assert!(SlotFile::claim(&path).is_err());
        }
    }
}
