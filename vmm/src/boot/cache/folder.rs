//! The folder: whose it is, its files, and its bounded size.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_NOW};
use rustix::process::{geteuid, getpid};

use super::invalid;

/// Most bytes in the folder. A file of Debian's kernel has about 40 MB.
const LIMIT: u64 = 256 << 20;

/// A folder that nobody else can change.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens the folder, and makes it if it is not there.
    ///
    /// # Errors
    /// The folder cannot be had, or somebody else could change what is in it.
    pub fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        if !is_ours(&rustix::fs::fstat(&fd)?) {
            return Err(invalid("another user can write to it"));
        }
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file `name`; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be opened, or another user can write to it.
    pub fn find(&self, name: &str) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !is_ours(&stat) {
            return Err(invalid("it is no file of our own"));
        }
        Ok(Some(file.into()))
    }

    /// Notes that `file` was used: the one that was not used for the longest time goes first.
    pub fn touch(&self, file: &File) {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        // On a read-only file system nothing goes, either.
        let _ = rustix::fs::futimens(
            file,
            &Timestamps {
                last_access: now,
                last_modification: now,
            },
        );
    }

    /// Removes the file `name`, as far as that can be done.
    pub fn remove(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::empty());
    }

    /// Makes the file `name` of `len` bytes with what `write` writes. It is there as a whole or not at all. What was not
    /// used for the longest time makes room for it.
    ///
    /// # Errors
    /// The file cannot be written, or is too large for the folder.
    pub fn store(
        &self,
        name: &str,
        len: u64,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<()> {
        let room = LIMIT.checked_sub(len);
        self.shrink(room.ok_or_else(|| invalid("it is too large for a cache of 256 MiB"))?)?;
        let part = format!("{name}.{}", getpid().as_raw_nonzero());
        // A process that had this number before has left it.
        self.remove(&part);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::openat(&self.fd, &part, flags, mode)?);
        let written = write(&mut file).and_then(|()| file.flush());
        let renamed =
            written.and_then(|()| Ok(rustix::fs::renameat(&self.fd, &part, &self.fd, name)?));
        if renamed.is_err() {
            self.remove(&part);
        }
        renamed
    }

    /// Removes the files that were not used for the longest time, until at most `limit` bytes are left.
    fn shrink(&self, limit: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            let name = entry?.file_name().to_owned();
            let stat = rustix::fs::statat(&self.fd, &name, AtFlags::SYMLINK_NOFOLLOW);
            if let (true, Ok(stat)) = (is_name(name.to_bytes()), stat) {
                let used = (stat.st_mtime, stat.st_mtime_nsec);
                files.push((used, u64::try_from(stat.st_size).unwrap_or(0), name));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (_, size, name) in files {
            if total <= limit {
                break;
            }
            rustix::fs::unlinkat(&self.fd, &name, AtFlags::empty())?;
            total -= size;
        }
        Ok(())
    }
}

/// A name that [`Folder::store`] gives: nothing else in the folder is ours to remove.
fn is_name(name: &[u8]) -> bool {
    let mut parts = name.split(|byte| *byte == b'.');
    let digest = parts.next().unwrap_or_default();
    let version = parts.next().unwrap_or_default();
    digest.len() == 2 * blake3::OUT_LEN
        && digest.iter().all(u8::is_ascii_hexdigit)
        && version.first() == Some(&b'v')
}

/// Only this user, who owns it, can write to it.
fn is_ours(stat: &Stat) -> bool {
    let others = (Mode::WGRP | Mode::WOTH).as_raw_mode();
    stat.st_uid == geteuid().as_raw() && stat.st_mode & others == 0
}
