//! The jail's root: a folder in memory with what the machine needs.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dev, FileType, Mode, OFlags, chownat, mkdirat, mknodat, openat};
use rustix::process::{Gid, Uid};

use super::JailError;
use super::cgroup::Group;
use super::plan::{Item, Plan};
use crate::sys::mounts::{Access, Tree};

/// What reclaim reads of a cgroup above the machine's.
const LIMITS: [&str; 5] = [
    "memory.high",
    "memory.max",
    "memory.current",
    "memory.stat",
    "memory.events.local",
];
/// By which the monitors of a host share what it needs.
const PEERS: &str = "/run/ebb/peers";
/// Devices that the machine opens, and whether they are its user's only.
const DEVICES: [(&str, bool); 2] = [("/dev/kvm", true), ("/dev/null", false)];

/// Gives this process a root with nothing but what `plan` lists. Its mounts must be its own.
pub(super) fn enter(plan: &Plan, group: &Group) -> Result<(), JailError> {
    // As long as the host's files are there.
    let mut parts = Vec::new();
    for item in &plan.items {
        parts.push((item.path.clone(), brought_in(item)?));
    }
    parts.extend(cgroups(group)?);
    if let Ok(peers) = Tree::of(Path::new(PEERS), Access::Write) {
        parts.push((PEERS.into(), peers));
    }
    let devices = devices()?;
    let step = JailError::step;
    let folder =
        Tree::of(&plan.folder, Access::Write).map_err(step("open_tree(2) of the folder"))?;
    parts.push((plan.folder.clone(), folder));
    // The processes of the new namespace, this one's.
    let processes = Tree::of_processes().map_err(step("mounting /proc"))?;
    parts.push(("/proc".into(), processes));

    let root = Tree::of_nothing().map_err(step("mounting a tmpfs"))?;
    root.attach(rustix::fs::CWD, Path::new("/"))
        .map_err(step("move_mount(2)"))?;
    for (path, device, own) in devices {
        make_device(&root, path, device, own.then_some(plan)).map_err(step("mknod(2)"))?;
    }
    for (path, part) in parts {
        attach(&root, &path, &part).map_err(step("move_mount(2)"))?;
    }
    root.seal().map_err(step("mount_setattr(2)"))?;
    root.become_root().map_err(step("pivot_root(2)"))
}

fn brought_in(item: &Item) -> Result<Tree, JailError> {
    let (option, path) = (item.option, || item.path.clone());
    let tree = Tree::of(&item.path, item.access).map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => JailError::Link {
            option,
            path: path(),
        },
        _ => JailError::File {
            option,
            path: path(),
            source,
        },
    })?;
    if tree.kind() == FileType::Directory {
        return Err(JailError::NotAFile {
            option,
            path: path(),
        });
    }
    Ok(tree)
}

/// The machine's cgroup, and the limits of those above.
fn cgroups(group: &Group) -> Result<Vec<(PathBuf, Tree)>, JailError> {
    let failed = JailError::step("open_tree(2) of the cgroup");
    // Its files are root's, but for that which takes a trigger.
    let own = Tree::of(group.path(), Access::Write).map_err(&failed)?;
    let mut parts = vec![(group.path().to_owned(), own)];
    for file in group
        .above()
        .flat_map(|above| LIMITS.map(|name| above.join(name)))
    {
        match Tree::of(&file, Access::Read) {
            // It does not control memory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            tree => parts.push((file, tree.map_err(&failed)?)),
        }
    }
    Ok(parts)
}

/// The numbers of the devices, as the host has them.
fn devices() -> Result<Vec<(&'static str, Dev, bool)>, JailError> {
    let number = |(path, own)| {
        let metadata = fs::metadata(path);
        let device = metadata.map_err(|source| JailError::File {
            option: "the device",
            path: PathBuf::from(path),
            source,
        })?;
        Ok((path, device.rdev(), own))
    };
    DEVICES.into_iter().map(number).collect()
}

fn make_device(root: &Tree, path: &str, device: Dev, of: Option<&Plan>) -> io::Result<()> {
    let path = inside(Path::new(path));
    make_folders(root, path)?;
    let (kind, mode) = (
        FileType::CharacterDevice,
        if of.is_some() { 0o600 } else { 0o666 },
    );
    mknodat(root, path, kind, Mode::from_raw_mode(mode), device)?;
    // Whatever the caller's mask is.
    rustix::fs::chmodat(root, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    if let Some(plan) = of {
        let (uid, gid) = (Uid::from_raw(plan.jail.uid), Gid::from_raw(plan.jail.gid));
        chownat(root, path, Some(uid), Some(gid), AtFlags::empty())?;
    }
    Ok(())
}

/// Attaches `part` at `path`, which is made for it.
fn attach(root: &Tree, path: &Path, part: &Tree) -> io::Result<()> {
    let path = inside(path);
    make_folders(root, path)?;
    let made = if part.kind() == FileType::Directory {
        make_folder(root, path)
    } else {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(root, path, flags, Mode::from_raw_mode(0o600))
            .map(drop)
            .map_err(io::Error::from)
    };
    made?;
    part.attach(root.as_fd(), path)
}

/// Makes the folders above `path`.
fn make_folders(root: &Tree, path: &Path) -> io::Result<()> {
    let above = path
        .ancestors()
        .skip(1)
        .filter(|it| !it.as_os_str().is_empty());
    let mut above: Vec<&Path> = above.collect();
    above.reverse();
    above
        .into_iter()
        .try_for_each(|folder| make_folder(root, folder))
}

fn make_folder(root: &Tree, path: &Path) -> io::Result<()> {
    match mkdirat(root, path, Mode::from_raw_mode(0o755)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        made => Ok(made.and_then(|()| {
            rustix::fs::chmodat(root, path, Mode::from_raw_mode(0o755), AtFlags::empty())
        })?),
    }
}

/// An absolute path, as one relative to the root.
fn inside(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}
