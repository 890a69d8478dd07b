//! The machine's folder, and the lock that is held as long as anything of the machine is left.

use std::ffi::CStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, fchmod, fchown, flock, statat, unlinkat,
};
use rustix::process::{Gid, Uid};

use super::JailError;
use super::plan::{FOLDERS, Plan};
use crate::sys::mounts::open_unlinked;

/// How long a machine that is being ended is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked at.
const PERIOD: Duration = Duration::from_millis(10);
/// A machine's folder is its user's, and can be entered by the user's group.
const MODE: u32 = 0o750;

/// The folder, locked. Processes that are started from now on hold the lock, too, unless they close it.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    folder: OwnedFd,
    sockets: Vec<PathBuf>,
}

impl Folder {
    /// Makes the folder, or takes over one of the same user, as soon as no other machine has it.
    pub fn take(plan: &Plan) -> Result<Self, JailError> {
        let path = &plan.folder;
        let failed = |source| JailError::Folder {
            path: path.clone(),
            source,
        };
        if plan.jail.folder.is_none() {
            let mut builder = DirBuilder::new();
            builder
                .recursive(true)
                .mode(0o755)
                .create(FOLDERS)
                .map_err(failed)?;
        }
        let patience = Instant::now() + PATIENCE;
        loop {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(error));
                }
                _ => {}
            }
            let folder = match open_unlinked(path, OFlags::DIRECTORY | OFlags::RDONLY) {
                // Another process has removed it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
                if is_at(&folder, path) {
                    own(&folder, plan)?;
                    return Ok(Self {
                        path: path.clone(),
                        folder,
                        sockets: plan.sockets.clone(),
                    });
                }
            } else if Instant::now() >= patience {
                return Err(JailError::InUse { path: path.clone() });
            } else {
                sleep(PERIOD);
            }
        }
    }

    /// Removes what a machine leaves that was killed with its helpers, and the folder if nothing else is in it.
    pub fn remove(&self) {
        let _ = self.remove_sockets();
        // It fails if there are logs.
        let _ = std::fs::remove_dir(&self.path);
    }

    /// Removes the machine's sockets, their locks, and each socket with the other name that it has while it is made or removed
    /// ([`beside`]).
    ///
    /// [`beside`]: crate::sys::sockets::beside
    fn remove_sockets(&self) -> io::Result<()> {
        for entry in Dir::read_from(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_of = |socket: &PathBuf| {
                let socket = socket.as_os_str().as_bytes();
                match name.to_bytes().strip_prefix(socket) {
                    Some(b"" | b".memory") => true,
                    Some([b'.', number @ ..]) => is_number(number) && self.is_socket(name),
                    _ => false,
                }
            };
            if self.sockets.iter().any(is_of) {
                let _ = unlinkat(&self.folder, name, AtFlags::empty());
            }
        }
        Ok(())
    }

    fn is_socket(&self, name: &CStr) -> bool {
        statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket)
    }
}

fn is_number(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

/// Returns true if `path` still leads to this folder.
fn is_at(folder: &OwnedFd, path: &Path) -> bool {
    let there = path.symlink_metadata().map(|it| (it.dev(), it.ino()));
    let ours = metadata(folder).map(|it| (it.dev(), it.ino()));
    matches!((there, ours), (Ok(there), Ok(ours)) if there == ours)
}

fn metadata(folder: &OwnedFd) -> io::Result<std::fs::Metadata> {
    File::from(folder.try_clone()?).metadata()
}

/// Gives the machine's user a folder that was made just now.
fn own(folder: &OwnedFd, plan: &Plan) -> Result<(), JailError> {
    let path = || plan.folder.clone();
    let failed = |source| JailError::Folder {
        path: path(),
        source,
    };
    let owner = metadata(folder).map_err(failed)?.uid();
    if owner == plan.jail.uid {
        return Ok(());
    }
    let is_empty = std::fs::read_dir(&plan.folder)
        .map_err(failed)?
        .next()
        .is_none();
    if owner != 0 || !is_empty {
        return Err(JailError::Taken {
            path: path(),
            owner,
        });
    }
    let (uid, gid) = (Uid::from_raw(plan.jail.uid), Gid::from_raw(plan.jail.gid));
    let given = fchmod(folder, Mode::from_raw_mode(MODE))
        .and_then(|()| fchown(folder, Some(uid), Some(gid)));
    given.map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_killed_helpers_leave_is_removed_and_nothing_else() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("machine");
        fs::create_dir(&path).unwrap();
        let folder = Folder {
            path: path.clone(),
            folder: open_unlinked(&path, OFlags::DIRECTORY | OFlags::RDONLY).unwrap(),
            sockets: ["api", "api.v"].map(PathBuf::from).into(),
        };
        for socket in [
            "api", "api.2", "api.v", "api.v.31", "api.x", "other.2", "ap",
        ] {
            UnixListener::bind(path.join(socket)).unwrap();
        }
        for file in ["api.memory", "api.v.memory", "api.1", "log"] {
            fs::write(path.join(file), "").unwrap();
        }
        folder.remove();
        let left = fs::read_dir(&path)
            .unwrap()
            .map(|it| it.unwrap().file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["ap", "api.1", "api.x", "log", "other.2"]);
        for name in left {
            fs::remove_file(path.join(name)).unwrap();
        }
        UnixListener::bind(path.join("api.2")).unwrap();
        folder.remove();
        assert!(!path.exists());
    }
}
