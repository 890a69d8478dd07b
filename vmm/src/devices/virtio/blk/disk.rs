//! The file behind a block device.

use std::convert::Infallible;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FlockOperation, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, flock, statx,
};
use rustix::io::Errno;

use super::error::{DiskError, format_of};
use super::wire::{ID_BYTES, SECTOR_BYTES};
use crate::config::DiskConfig;
use crate::sys::transfer::can_punch;

/// How long a lock is waited for: that of a machine which was killed at this moment goes soon.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Identifies a disk independently of its path. Two writable uses of one disk are a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DiskIdentity {
    /// A regular file: device and inode.
    File(u64, u64),
    /// A block device: its number.
    Block(u64),
}

/// What direct I/O asks for, in bytes: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses and lengths of memory.
    pub memory: usize,
    /// Of positions and lengths in the file: the disk's block.
    pub file: u64,
}

/// Without a word from the host: what suits all disks.
const STRICTEST: Alignment = Alignment {
    memory: 4096,
    file: 4096,
};

/// An open and locked disk image. The lock is released when the last user of the file is gone.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
    file: Arc<File>,
    readonly: bool,
    sectors: u64,
    identity: DiskIdentity,
    direct: Option<Alignment>,
    can_discard: bool,
    /// Gone with the last copy of this value: so its other end hears when nobody uses the disk any more.
    user: Option<Sender<Infallible>>,
}

impl Disk {
    /// Opens the disk and locks it: exclusively if it is writable, shared with other readers if it is read-only.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let (path, readonly) = (config.path.as_path(), config.readonly);
        let look = |error| unopened(path, readonly, error);
        // Checked before it is opened: opening a pipe or a device may have side effects.
        identify(path, &path.metadata().map_err(look)?)?;
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(look)?;
        Self::take(file, config)
    }

    /// Locks and checks `file`, which was opened for `config`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn take(file: File, config: &DiskConfig) -> Result<Self, DiskError> {
        let (path, readonly) = (config.path.as_path(), config.readonly);
        let metadata = file.metadata().map_err(failed(path, "stat"))?;
        let identity = identify(path, &metadata)?;
        lock(path, &file, readonly)?;
        let mut start = [0; SECTOR_BYTES as usize];
        // An empty file has no start.
        let read = file.read_at(&mut start, 0).map_err(failed(path, "read"))?;
        if let Some(format) = format_of(&start).filter(|_| read == start.len()) {
            let path = path.to_owned();
            return Err(DiskError::Format { path, format });
        }
        let direct = config
            .direct
            .then(|| make_direct(path, &file))
            .transpose()?;
        let disk = Self {
            path: path.to_owned(),
            file: Arc::new(file),
            readonly,
            sectors: 0,
            identity,
            direct,
            can_discard: false,
            user: None,
        };
        let disk = disk.measured()?;
        let can_discard = !readonly && can_punch(&disk.file, disk.bytes());
        Ok(Self {
            can_discard,
            ..disk
        })
    }

    /// The same disk with the size that its file has now.
    ///
    /// # Errors
    /// [`DiskError::Size`], or the size cannot be read.
    pub(super) fn measured(&self) -> Result<Self, DiskError> {
        let size = (&*self.file)
            .seek(SeekFrom::End(0))
            .map_err(failed(&self.path, "seek"))?;
        let unit = self.block();
        if !size.is_multiple_of(unit) {
            let path = self.path.clone();
            return Err(DiskError::Size { path, size, unit });
        }
        Ok(Self {
            sectors: size / SECTOR_BYTES,
            ..self.clone()
        })
    }

    /// The other end of `user` hears when nobody uses this disk any more.
    pub(super) fn set_user(&mut self, user: Sender<Infallible>) {
        self.user = Some(user);
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity of this disk.
    #[must_use]
    pub const fn identity(&self) -> DiskIdentity {
        self.identity
    }

    /// What a guest is told as its serial number.
    pub(super) fn serial(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        let text = match self.identity {
            DiskIdentity::File(device, inode) => format!("{device:x}-{inode}"),
            DiskIdentity::Block(number) => format!("block-{number:x}"),
        };
        for (to, from) in id.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        id
    }

    /// Returns true if the guest may only read.
    #[must_use]
    pub const fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Size in sectors of 512 bytes; 0 for a disk whose content comes later.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }

    /// Bytes of which positions and lengths must be multiples.
    pub(super) fn block(&self) -> u64 {
        self.direct
            .map_or(SECTOR_BYTES, |direct| direct.file.max(SECTOR_BYTES))
    }

    /// What direct I/O asks for, if the disk is read and written that way.
    pub(super) const fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    /// Its file system can free what a part of it takes.
    pub(super) const fn can_discard(&self) -> bool {
        self.can_discard
    }

    pub(super) const fn file(&self) -> &Arc<File> {
        &self.file
    }
}

fn failed(path: &Path, operation: &'static str) -> impl Fn(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io {
        path: path.clone(),
        operation,
        source,
    }
}

/// From now on the file is read and written past the host's cache. Returns what that asks for (statx(2), Linux 6.1).
fn make_direct(path: &Path, file: &File) -> Result<Alignment, DiskError> {
    let direct = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::DIRECT));
    match direct {
        Ok(()) => {}
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Err(DiskError::NoDirect(path.to_owned())),
        Err(error) => return Err(failed(path, "fcntl")(error.into())),
    }
    let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let told = told.ok().filter(|told| {
        told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
            && told.stx_dio_mem_align.is_power_of_two()
            && told.stx_dio_offset_align.is_power_of_two()
    });
    Ok(told.map_or(STRICTEST, |told| Alignment {
        memory: told.stx_dio_mem_align as usize,
        file: told.stx_dio_offset_align.into(),
    }))
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
                path: PathBuf::new(),
                file: Arc::new(file),
                readonly,
                sectors: 1,
                identity: DiskIdentity::File(0, 0),
                direct: None,
                can_discard: !readonly,
                user: None,
            }
        }
    }

    fn open(path: impl Into<PathBuf>, readonly: bool) -> Result<Disk, DiskError> {
        Disk::open(&DiskConfig {
            path: path.into(),
            readonly,
            ..DiskConfig::default()
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
        for size in [1, 511, 513] {
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
    fn an_empty_file_is_a_disk_without_sectors_until_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "empty", 0);
        let disk = open(&path, false).unwrap();
        assert_eq!(disk.sectors(), 0);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1024).unwrap();
        assert_eq!(disk.measured().unwrap().sectors(), 2);
        file.set_len(1000).unwrap();
        let odd = disk.measured().unwrap_err().to_string();
        assert!(
            odd.contains("is 1000 bytes, which is no multiple of 512"),
            "{odd}"
        );
    }

    #[test]
    fn images_that_must_be_interpreted_are_refused_with_the_command_that_converts_them() {
        let dir = tempfile::tempdir().unwrap();
        for (at, magic, name) in [
            (0, &b"QFI\xfb\0\0\0\x03"[..], "qcow2"),
            (0, b"KDMV\x01", "VMDK"),
            (0, b"vhdxfile", "VHDX"),
            (0, b"conectix", "VHD"),
            (64, b"\x7f\x10\xda\xbe", "VDI"),
        ] {
            let path = image(&dir, name, 4096);
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(magic, at).unwrap();
            let refused = open(&path, true).unwrap_err().to_string();
            let remedy = format!(
                "is a {name} image, and only raw ones are taken: convert it with `qemu-img convert -O raw "
            );
            assert!(refused.contains(&remedy), "{refused}");
            file.write_all_at(&[0], at + 1).unwrap();
            assert!(open(&path, true).is_ok(), "{name}");
        }
    }

    #[test]
    fn direct_access_tells_what_it_asks_for() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut config = DiskConfig {
            path: image(&dir, "disk", 8192),
            direct: true,
            ..DiskConfig::default()
        };
        let disk = Disk::open(&config).unwrap();
        let direct = disk.direct().unwrap();
        assert!(direct.memory.is_power_of_two() && direct.file >= 512);
        assert_eq!(disk.block(), direct.file);
        assert!(
            fcntl_getfl(&**disk.file())
                .unwrap()
                .contains(OFlags::DIRECT)
        );
        drop(disk);
        config.direct = false;
        let disk = Disk::open(&config).unwrap();
        assert_eq!((disk.direct(), disk.block()), (None, 512));
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
