//! The file behind a block device.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::wire::SECTOR_BYTES;
use crate::config::DiskConfig;

/// How long a lock is waited for: that of a machine which was killed at this moment goes soon.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// A disk cannot be used. The message names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error("disk {0} does not exist: check the path, or create it with `truncate -s SIZE`")]
    Missing(PathBuf),
    /// A directory.
    #[error("disk {0} is a directory: give the image file or the block device in it")]
    Directory(PathBuf),
    /// A pipe, a socket, a character device.
    #[error("disk {0} is neither a regular file nor a block device: give one of these")]
    NotADisk(PathBuf),
    /// No permission.
    #[error(
        "disk {path} cannot be opened for {access}: no permission; change its mode or owner{hint}"
    )]
    Permission {
        /// The file.
        path: PathBuf,
        /// Reading, or reading and writing.
        access: &'static str,
        /// Another remedy.
        hint: &'static str,
    },
    /// Another disk of this or another machine uses it.
    #[error(
        "disk {path} is in use by another machine, or twice by this one: stop the other, use a copy, or {hint}"
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Another remedy.
        hint: &'static str,
    },
    /// Empty, or not a whole number of sectors.
    #[error(
        "disk {path} is {size} bytes, which is no positive multiple of {SECTOR_BYTES}: resize it with `truncate -s %{SECTOR_BYTES}`"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another error.
    #[error("disk {path} cannot be used: {operation} failed")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Identifies a disk independently of its path. Two writable uses of one disk are a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DiskIdentity {
    /// A regular file: device and inode.
    File(u64, u64),
    /// A block device: its number.
    Block(u64),
}

/// An open and locked disk image. Dropping it releases the lock.
#[derive(Debug)]
pub struct Disk {
    file: File,
    readonly: bool,
    sectors: u64,
    identity: DiskIdentity,
}

impl Disk {
    /// Opens the disk and locks it: exclusively if it is writable, shared with other readers if it is read-only.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let (path, readonly) = (config.path.as_path(), config.readonly);
        let failed = |operation| {
            move |source| DiskError::Io {
                path: path.to_owned(),
                operation,
                source,
            }
        };
        let look = |error| unopened(path, readonly, error);
        // Checked before it is opened: opening a pipe or a device may have side effects.
        identify(path, &path.metadata().map_err(look)?)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(look)?;
        let identity = identify(path, &file.metadata().map_err(failed("stat"))?)?;
        lock(path, &file, readonly)?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed("seek"))?;
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                size,
            });
        }
        Ok(Self {
            file,
            readonly,
            sectors: size / SECTOR_BYTES,
            identity,
        })
    }

    /// The identity of this disk.
    #[must_use]
    pub const fn identity(&self) -> DiskIdentity {
        self.identity
    }

    /// Returns true if the guest may only read.
    #[must_use]
    pub const fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Size in sectors of 512 bytes, at least 1.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }
}

fn identify(path: &Path, metadata: &Metadata) -> Result<DiskIdentity, DiskError> {
    let kind = metadata.file_type();
    if kind.is_file() {
        Ok(DiskIdentity::File(metadata.dev(), metadata.ino()))
    } else if kind.is_block_device() {
        Ok(DiskIdentity::Block(metadata.rdev()))
    } else if kind.is_dir() {
        Err(DiskError::Directory(path.to_owned()))
    } else {
        Err(DiskError::NotADisk(path.to_owned()))
    }
}

fn unopened(path: &Path, readonly: bool, source: io::Error) -> DiskError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => DiskError::Missing(path),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            let (access, hint) = if readonly {
                ("reading", "")
            } else {
                ("reading and writing", ", or add readonly=on")
            };
            DiskError::Permission { path, access, hint }
        }
        _ => DiskError::Io {
            path,
            operation: "open",
            source,
        },
    }
}

fn lock(path: &Path, file: &File, readonly: bool) -> Result<(), DiskError> {
    let (operation, hint) = if readonly {
        (
            FlockOperation::NonBlockingLockShared,
            "add readonly=on to the other too",
        )
    } else {
        (
            FlockOperation::NonBlockingLockExclusive,
            "add readonly=on to both",
        )
    };
    let patience = Instant::now() + PATIENCE;
    let locked = loop {
        match flock(file, operation) {
            Err(Errno::WOULDBLOCK) if Instant::now() < patience => thread::sleep(PERIOD),
            locked => break locked,
        }
    };
    match locked {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(DiskError::Locked {
            path: path.to_owned(),
            hint,
        }),
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            tracing::warn!("disk {}: its file system has no locks", path.display());
            Ok(())
        }
        Err(errno) => Err(DiskError::Io {
            path: path.to_owned(),
            operation: "flock",
            source: errno.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Disk {
        /// A disk on `file`, unchecked.
        pub fn over(file: File, readonly: bool) -> Self {
            Self {
                file,
                readonly,
                sectors: 1,
                identity: DiskIdentity::File(0, 0),
            }
        }
    }

    fn open(path: impl Into<PathBuf>, readonly: bool) -> Result<Disk, DiskError> {
        Disk::open(&DiskConfig {
            path: path.into(),
            readonly,
            bw: None,
            ops: None,
        })
    }

    fn image(dir: &tempfile::TempDir, name: &str, size: u64) -> PathBuf {
        let path = dir.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[test]
    fn what_is_no_disk_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let missing = open(dir.path().join("nothing"), false).unwrap_err();
        assert!(
            missing.to_string().contains("nothing does not exist"),
            "{missing}"
        );
        let beneath = open(image(&dir, "file", 512).join("x"), false).unwrap_err();
        assert!(matches!(beneath, DiskError::Missing(_)), "{beneath}");
        for readonly in [false, true] {
            let directory = open(dir.path(), readonly).unwrap_err();
            assert!(matches!(directory, DiskError::Directory(_)), "{directory}");
            let character = open("/dev/null", readonly).unwrap_err();
            assert!(matches!(character, DiskError::NotADisk(_)), "{character}");
        }
        for size in [0, 1, 511, 513] {
            let odd = open(image(&dir, "odd", size), true).unwrap_err();
            assert!(
                odd.to_string().contains(&format!("is {size} bytes")),
                "{odd}"
            );
        }
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let denied = unopened(Path::new("/x"), false, denied).to_string();
        assert!(denied.contains("readonly=on"), "{denied}");
    }

    #[test]
    fn a_writable_disk_is_used_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "disk", 4096);
        let disk = open(&path, false).unwrap();
        assert_eq!((disk.sectors(), disk.is_readonly()), (8, false));
        for readonly in [false, true] {
            let locked = open(&path, readonly).unwrap_err();
            assert!(matches!(locked, DiskError::Locked { .. }), "{locked}");
        }
        drop(disk);
        let (one, two) = (open(&path, true).unwrap(), open(&path, true).unwrap());
        assert_eq!(one.identity(), two.identity());
        assert!(matches!(open(&path, false), Err(DiskError::Locked { .. })));
        let other = open(image(&dir, "other", 512), true).unwrap();
        assert_ne!(one.identity(), other.identity());
    }
}
