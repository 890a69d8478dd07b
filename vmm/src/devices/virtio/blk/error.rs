//! Why a file cannot be a disk.

use std::io;
use std::path::PathBuf;

use super::wire::SECTOR_BYTES;

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
    /// An image that has to be interpreted.
    #[error(
        "disk {path} is a {format} image, and only raw ones are taken: convert it with `qemu-img convert -O raw {path} {path}.raw`"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
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
    /// Not a whole number of blocks.
    #[error(
        "disk {path} is {size} bytes, which is no multiple of {unit}: resize it with `truncate -s %{unit}`"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The size of a block in bytes: that of a sector, or with direct I/O what the host asks for.
        unit: u64,
    },
    /// The file has no direct I/O.
    #[error("disk {0}: its file system has no direct I/O (O_DIRECT); remove direct=on")]
    NoDirect(PathBuf),
    /// Another file has larger blocks than the one that the machine was started with.
    #[error(
        "disk {path} has blocks of {block} bytes, and the guest was told {told}: start the machine with it"
    )]
    Block {
        /// The file.
        path: PathBuf,
        /// Its blocks.
        block: u64,
        /// What the guest was told.
        told: u64,
    },
    /// The disk is another file now, but requests still use the old one.
    #[error(
        "the disk was exchanged, but requests still use {0}: they are late; leave the file alone until its lock is free"
    )]
    Busy(PathBuf),
    /// io_uring cannot be used.
    #[error(
        "disk {path}: io_uring cannot be used here ({source}); write engine=threads or engine=auto"
    )]
    NoRing {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its threads could not be started.
    #[error("disk {path}: its threads could not be started")]
    Threads {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
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

/// The kinds of images that are recognized, by the bytes at a position, and their names.
const FORMATS: [(usize, &[u8], &str); 6] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
];

/// What kind of image begins with these bytes, unless it may be raw.
pub(super) fn format_of(start: &[u8; SECTOR_BYTES as usize]) -> Option<&'static str> {
    let matches = |(at, magic, _): &&(usize, &[u8], _)| start[*at..].starts_with(magic);
    FORMATS.iter().find(matches).map(|(_, _, name)| *name)
}
