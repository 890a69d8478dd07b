//! Mounts that are attached nowhere yet, and a root made of them (open_tree(2), mount_setattr(2): Linux 5.12).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount,
    open_tree, unmount,
};

/// A mount that is attached nowhere yet.
#[derive(Debug)]
pub struct Tree {
    mount: OwnedFd,
    stat: Stat,
}

/// What can be done with the files of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// They can be read.
    Read,
    /// They can be written, too.
    Write,
}

/// Opens what is at `path`, only to say what it is. There is no symbolic link on the way, and none at its end.
///
/// # Errors
/// openat2(2)'s; `ELOOP`: there is a link.
pub fn open_unlinked(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // Not O_NOFOLLOW: with O_PATH it opens a link.
    let flags = flags | OFlags::CLOEXEC;
    Ok(openat2(CWD, path, flags, Mode::empty(), resolve)?)
}

impl Tree {
    /// What is at `path`, a file or a folder, with `access`. No program in it can be started.
    ///
    /// # Errors
    /// As for [`open_unlinked`]; open_tree(2)'s, mount_setattr(2)'s.
    pub fn of(path: &Path, access: Access) -> io::Result<Self> {
        let file = open_unlinked(path, OFlags::PATH)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let mount = open_tree(&file, c"", flags)?;
        let tree = Self {
            stat: fstat(&file)?,
            mount,
        };
        let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        if tree.kind() != FileType::BlockDevice {
            attributes |= libc::MOUNT_ATTR_NODEV;
        }
        if access == Access::Read {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        tree.set(attributes)?;
        Ok(tree)
    }

    /// What the kernel says of the processes in this one's namespace (/proc).
    ///
    /// # Errors
    /// fsopen(2)'s and the like.
    pub fn of_processes() -> io::Result<Self> {
        Self::new("proc", libc::MOUNT_ATTR_NODEV)
    }

    /// An empty folder in memory, for a root. Devices can be made in it.
    ///
    /// # Errors
    /// fsopen(2)'s and the like.
    pub fn of_nothing() -> io::Result<Self> {
        Self::new("tmpfs", 0)
    }

    fn new(kind: &str, more: u64) -> io::Result<Self> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(&context, flags, MountAttrFlags::empty())?;
        let tree = Self {
            stat: fstat(&mount)?,
            mount,
        };
        tree.set(libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | more)?;
        Ok(tree)
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Lets nothing in it be made, removed or written from now on. Devices can still be used.
    ///
    /// # Errors
    /// mount_setattr(2)'s.
    pub fn seal(&self) -> io::Result<()> {
        self.set(libc::MOUNT_ATTR_RDONLY)
    }

    /// Sets these attributes, and leaves the others.
    fn set(&self, attr_set: u64) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set,
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        };
        // SAFETY: the kernel reads an empty string and a structure of the size that it is told, both of which outlive the call.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Attaches it at `path`, which is relative to `folder`.
    ///
    /// # Errors
    /// move_mount(2)'s.
    pub fn attach(&self, folder: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.mount, c"", folder, path, flags)?)
    }

    /// Makes it the root of this process, and lets go of everything that was mounted before. The mounts of this process must
    /// be its own.
    ///
    /// # Errors
    /// Those of pivot_root(2) and the like; then the process may have any root.
    pub fn become_root(self) -> io::Result<()> {
        rustix::process::fchdir(&self.mount)?;
        // The old root gets on top of the new one, and is detached there (pivot_root(2), NOTES).
        rustix::process::pivot_root(c".", c".")?;
        unmount(c".", UnmountFlags::DETACH)?;
        Ok(rustix::process::chdir(c"/")?)
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// Lets no mount or unmount of this process's reach others, nor theirs this one.
pub(super) fn make_private() -> io::Result<()> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change(c"/", flags)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_link_is_followed_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("sub")).unwrap();
        std::fs::write(real.join("sub/file"), "").unwrap();
        symlink("sub", real.join("link")).unwrap();
        symlink("file", real.join("sub/last")).unwrap();
        let open = |path: &str| open_unlinked(&real.join(path), OFlags::PATH);
        assert!(open("sub/file").is_ok());
        for path in ["link/file", "sub/last"] {
            let error = open(path).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{path}");
        }
    }
}
