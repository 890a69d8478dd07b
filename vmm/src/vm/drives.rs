//! The machine's disks, as an operator changes them while it runs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::config::DiskEngine;
use crate::control::{CommandError, DriveState, DriveUpdate};
use crate::devices::virtio::blk::DiskHandle;
use crate::sys::transfer::Kind;

/// A folder whose files an operator may name as disks (`--allow-paths`), opened at the start.
#[derive(Debug)]
struct Allowed {
    path: PathBuf,
    folder: File,
}

/// The machine's disks.
#[derive(Debug, Default)]
pub struct Drives {
    disks: Vec<(String, DiskHandle)>,
    allowed: Vec<Allowed>,
    /// Where relative paths begin: the monitor's working folder at the start.
    base: PathBuf,
}

impl Drives {
    /// `disks`, by name, in the order of the command line, and the folders whose files they may become.
    ///
    /// # Errors
    /// A folder cannot be opened.
    pub fn new(disks: Vec<(String, DiskHandle)>, folders: &[PathBuf]) -> io::Result<Self> {
        // It has none if that was removed; then relative paths lead nowhere.
        let base = std::env::current_dir().unwrap_or_default();
        let open = |path: &PathBuf| {
            let (path, folder) = (base.join(path), File::open(path)?);
            Ok(Allowed { path, folder })
        };
        let allowed = folders.iter().map(open).collect::<io::Result<_>>()?;
        Ok(Self {
            disks,
            allowed,
            base,
        })
    }

    /// Their handles.
    pub fn handles(&self) -> Vec<DiskHandle> {
        self.disks.iter().map(|(_, disk)| disk.clone()).collect()
    }

    /// All of them.
    pub fn states(&self) -> Vec<DriveState> {
        let all = self.disks.iter();
        all.map(|(name, disk)| DriveState {
            drive_id: name.clone(),
            path_on_host: disk.path(),
            is_read_only: disk.is_readonly(),
            size_bytes: disk.bytes(),
            engine: match disk.kind() {
                Kind::Ring => DiskEngine::IoUring,
                Kind::Threads => DiskEngine::Threads,
            },
        })
        .collect()
    }

    /// Changes one of them.
    ///
    /// # Errors
    /// [`CommandError`]; the disk is as it was.
    pub fn update(&self, id: &str, update: &DriveUpdate) -> Result<(), CommandError> {
        let Some((_, disk)) = self.disks.iter().find(|(name, _)| name == id) else {
            let known: Vec<_> = self.disks.iter().map(|(name, _)| name.as_str()).collect();
            let known = match known.as_slice() {
                [] => "the machine has no disks".to_owned(),
                known => format!("there are {}", known.join(", ")),
            };
            return failed(format!("there is no disk {id}; {known}"));
        };
        if let Some(path) = update.path.as_ref().filter(|path| **path != disk.path()) {
            let path = self.base.join(path);
            let file = self.open(&path, disk.is_readonly())?;
            disk.exchange(file, &path).or_else(failed)?;
        } else if update.path.is_some() || update.limits.is_none() {
            disk.measure().or_else(failed)?;
        }
        if let Some(limits) = update.limits {
            disk.limit(limits.bandwidth, limits.operations);
        }
        Ok(())
    }

    /// Opens a file in one of the allowed folders, wherever its links lead: not out of the folder.
    fn open(&self, path: &Path, readonly: bool) -> Result<File, CommandError> {
        let inside = |allowed: &Allowed| path.strip_prefix(&allowed.path).ok().map(Path::to_owned);
        let found = self.allowed.iter().find_map(|it| Some((it, inside(it)?)));
        let Some((allowed, rest)) = found else {
            return failed(format!(
                "{} may not be a disk: start the machine with --allow-paths and the folder that it is in",
                path.display()
            ));
        };
        let access = if readonly {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // No link leads out of the root, and absolute ones begin there.
        let inside = match allowed.path.parent() {
            Some(_) => ResolveFlags::BENEATH,
            None => ResolveFlags::IN_ROOT,
        };
        let resolve = inside | ResolveFlags::NO_MAGICLINKS;
        match openat2(&allowed.folder, rest, flags, Mode::empty(), resolve) {
            Ok(file) => Ok(file.into()),
            Err(Errno::XDEV | Errno::LOOP) => failed(format!(
                "{}: a link leads out of {}; name the file itself",
                path.display(),
                allowed.path.display()
            )),
            Err(error) => failed(format!("{}: {error}; check the path", path.display())),
        }
    }
}

fn failed<T>(error: impl ToString) -> Result<T, CommandError> {
    Err(CommandError::Failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::DiskConfig;
    use crate::devices::virtio::blk::{Block, Disk};

    #[test]
    fn a_disk_becomes_only_what_lies_in_an_allowed_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (inside, outside) = (root.join("in"), root.join("out"));
        for folder in [&inside, &outside] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("disk"), [0; 1024]).unwrap();
        }
        symlink("disk", inside.join("link")).unwrap();
        symlink(outside.join("disk"), inside.join("away")).unwrap();
        symlink("../out/disk", inside.join("up")).unwrap();
        let config = DiskConfig {
            path: root.join("first"),
            ..DiskConfig::default()
        };
        fs::write(&config.path, []).unwrap();
        let block = Block::new(0, Disk::open(&config).unwrap(), &config).unwrap();
        let disks = || vec![("disk0".to_owned(), block.handle())];
        let drives = Drives::new(disks(), std::slice::from_ref(&inside)).unwrap();
        let exchange = |path: PathBuf| {
            let update = DriveUpdate {
                path: Some(path),
                limits: None,
            };
            drives.update("disk0", &update)
        };
        for (path, message) in [
            (outside.join("disk"), "start the machine with --allow-paths"),
            (
                PathBuf::from("disk"),
                "start the machine with --allow-paths",
            ),
            (inside.join("away"), "a link leads out of"),
            (inside.join("up"), "a link leads out of"),
            (inside.join("../out/disk"), "a link leads out of"),
            (inside.join("none"), "check the path"),
            (inside.clone(), "directory"),
        ] {
            let refused = exchange(path).unwrap_err().to_string();
            assert!(refused.contains(message), "{refused}");
            assert_eq!(drives.states()[0].path_on_host, config.path);
        }
        let relative = Drives {
            base: inside.clone(),
            ..Drives::new(disks(), std::slice::from_ref(&inside)).unwrap()
        };
        let update = DriveUpdate {
            path: Some("link".into()),
            limits: None,
        };
        relative.update("disk0", &update).unwrap();
        assert_eq!(relative.states()[0].path_on_host, inside.join("link"));
        drop(relative);
        exchange(inside.join("link")).unwrap();
        let state = &drives.states()[0];
        assert_eq!((state.drive_id.as_str(), state.size_bytes), ("disk0", 1024));
        assert_eq!(state.path_on_host, inside.join("link"));
        // The same path: what it has become.
        fs::write(inside.join("disk"), [0; 2048]).unwrap();
        exchange(inside.join("link")).unwrap();
        assert_eq!(drives.states()[0].size_bytes, 2048);
        let unknown = drives.update("disk1", &DriveUpdate::default()).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "there is no disk disk1; there are disk0"
        );
        let everywhere = Drives::new(disks(), &["/".into()]).unwrap();
        let update = DriveUpdate {
            path: Some(inside.join("away")),
            limits: None,
        };
        everywhere.update("disk0", &update).unwrap();
    }
}
