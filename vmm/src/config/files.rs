//! Checks of the files and sockets that the operator names.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{ConfigError, DiskConfig};
use crate::sys::sockets::{connect_at_once, is_dead, server_of};

/// Maximum length of a unix socket's path in bytes: `sun_path` without the final zero.
const MAX_SOCKET_PATH: usize = 107;
/// A disk is at least one sector long.
const SECTOR: u64 = 512;

/// Checks a kernel or an initial RAM disk: a readable file with something in it.
pub(super) fn check_image(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    let metadata = stat(option, path)?;
    if !metadata.is_file() {
        return refuse(option, path, kind(&metadata), "name a regular file");
    }
    if metadata.len() == 0 {
        return refuse(option, path, "the file is empty", "name another one");
    }
    open(option, path, OpenOptions::new().read(true)).map(drop)
}

pub(super) fn check_disks(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    let mut seen: Vec<(Identity, &DiskConfig)> = Vec::new();
    for disk in disks {
        let identity = check_disk(disk)?;
        let same = seen.iter().find(|(other, _)| *other == identity);
        if let Some((_, other)) = same
            && !(disk.readonly && other.readonly)
        {
            return Err(ConfigError::DiskShared {
                path: other.path.clone(),
                other: disk.path.clone(),
            });
        }
        seen.push((identity, disk));
    }
    Ok(())
}

/// Identifies a file or block device independently of its path.
#[derive(Debug, PartialEq, Eq)]
enum Identity {
    File { device: u64, inode: u64 },
    BlockDevice(u64),
}

fn check_disk(disk: &DiskConfig) -> Result<Identity, ConfigError> {
    let (option, path) = ("--disk", disk.path.as_path());
    let metadata = stat(option, path)?;
    let identity = if metadata.is_file() {
        Identity::File {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    } else if metadata.file_type().is_block_device() {
        Identity::BlockDevice(metadata.rdev())
    } else {
        let remedy = "name a raw disk image or a block device";
        return refuse(option, path, kind(&metadata), remedy);
    };
    let mut options = OpenOptions::new();
    let mut file = open(option, path, options.read(true).write(!disk.readonly))?;
    let length = file
        .seek(SeekFrom::End(0))
        .or_else(|error| refuse_io(option, path, &error))?;
    if (1..SECTOR).contains(&length) {
        let problem = format!("a disk of {length} bytes holds no sector");
        return refuse(option, path, problem, "name a disk of 512 bytes or more");
    }
    Ok(identity)
}

/// Checks folders, and makes their paths absolute ones without links.
pub(super) fn check_folders(
    option: &'static str,
    folders: Vec<PathBuf>,
) -> Result<Vec<PathBuf>, ConfigError> {
    let check = |path: PathBuf| {
        if stat(option, &path)?.is_dir() {
            let real = path.canonicalize();
            return real.or_else(|error| refuse_io(option, &path, &error));
        }
        refuse(option, &path, "is no directory", "name the folder")
    };
    folders.into_iter().map(check).collect()
}

/// Checks a file to be created or overwritten: its folder is there, and it is not a folder itself.
pub(super) fn check_output(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_dir() {
        return refuse(option, path, "is a directory", "name a file");
    }
    check_folder(option, path)
}

fn check_folder(option: &'static str, path: &Path) -> Result<(), ConfigError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if folder.is_dir() {
        return Ok(());
    }
    let problem = format!("there is no folder {}", folder.display());
    refuse(option, path, problem, "create it first")
}

/// What is at the path of a socket that is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketPath {
    /// Nothing.
    Free,
    /// A socket whose server is gone; it may be removed.
    Stale,
}

/// Checks that a socket, which `option` names, can be served at `path`; changes nothing.
///
/// # Errors
/// [`ConfigError::File`] when the path is too long, its folder is missing, something other than a socket is
/// there, or a server answers there.
pub fn check_socket(option: &'static str, path: &Path) -> Result<SocketPath, ConfigError> {
    check_length(option, path, MAX_SOCKET_PATH)?;
    check_folder(option, path)?;
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SocketPath::Free),
        Err(error) => return refuse_io(option, path, &error),
    };
    if !metadata.file_type().is_socket() {
        let remedy = "remove it, or choose another path";
        return refuse(option, path, "is there already, and no socket", remedy);
    }
    let is_served = match connect_at_once(path) {
        // Its helpers may have the descriptor for some moments longer.
        Ok(stream) => !server_of(&stream).is_some_and(is_dead),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => false,
        // The guardian of a dead machine has removed it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SocketPath::Free),
        Err(error) => return refuse_io(option, path, &error),
    };
    if is_served {
        let remedy = "stop it, or choose another path";
        return refuse(option, path, "a running server has this socket", remedy);
    }
    Ok(SocketPath::Stale)
}

fn check_length(option: &'static str, path: &Path, most: usize) -> Result<(), ConfigError> {
    let length = path.as_os_str().as_bytes().len();
    if length <= most {
        return Ok(());
    }
    let problem = format!("the path has {length} bytes, this socket's has at most {most}");
    refuse(option, path, problem, "choose a shorter one")
}

/// As [`check_socket`], for that of a vsock: behind the path there must be room for `_` and a port.
///
/// # Errors
/// As [`check_socket`].
pub fn check_vsock_path(path: &Path) -> Result<SocketPath, ConfigError> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    check_length("--vsock", &path, MAX_SOCKET_PATH - "_4294967295".len())?;
    check_socket("--vsock", &path)
}

fn stat(option: &'static str, path: &Path) -> Result<Metadata, ConfigError> {
    let metadata = path.metadata();
    metadata.or_else(|error| refuse_io(option, path, &error))
}

fn open(option: &'static str, path: &Path, options: &OpenOptions) -> Result<File, ConfigError> {
    let file = options.open(path);
    file.or_else(|error| refuse_io(option, path, &error))
}

fn kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        "is a directory"
    } else {
        "is no regular file"
    }
}

fn refuse<T>(
    option: &'static str,
    path: &Path,
    problem: impl Into<String>,
    remedy: &'static str,
) -> Result<T, ConfigError> {
    Err(ConfigError::File {
        option,
        path: path.to_owned(),
        problem: problem.into(),
        remedy,
    })
}

fn refuse_io<T>(option: &'static str, path: &Path, error: &io::Error) -> Result<T, ConfigError> {
    let (problem, remedy) = match error.kind() {
        io::ErrorKind::NotFound => ("there is no such file", "check the path"),
        io::ErrorKind::PermissionDenied if option == "--disk" => (
            "permission denied",
            "change its permissions, or add readonly=on if you may only read it",
        ),
        io::ErrorKind::PermissionDenied => (
            "permission denied",
            "change its permissions, or run as another user",
        ),
        io::ErrorKind::ReadOnlyFilesystem => ("the file system is read-only", "add readonly=on"),
        _ => return refuse(option, path, error.to_string(), "name another one"),
    };
    refuse(option, path, problem, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_permission_names_its_remedy() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let message = |option| {
            let refused = refuse_io::<()>(option, Path::new("/x"), &denied);
            refused.unwrap_err().to_string()
        };
        assert!(message("--disk").contains("readonly=on"));
        assert!(message("--kernel").contains("--kernel /x: permission denied; change"));
    }
}
