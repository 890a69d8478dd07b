//! A container's view of files: its root file system and what is mounted in it (OCI runtime specification, config.md,
//! "Mounts", and config-linux.md, "Default Devices" and "Default Filesystems").

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{Container, CopiedFile};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, sethostname};
use oci_spec::runtime::Mount;

/// Devices that every container has.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// Links that every container has in /dev.
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes `root` the root of this process, which is alone in its mount namespace.
pub fn enter(root: &Path, container: &Container) -> Result<()> {
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).context("make mounts private")?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(root), root, none, bind, none).context(root.display())?;
    for wanted in container.spec.mounts().as_deref().unwrap_or_default() {
        mount_one(root, wanted)?;
    }
    devices(root)?;
    for file in &container.files {
        copy(root, file)?;
    }
    if let Some(name) = container.spec.hostname() {
        sethostname(name).context("hostname")?;
    }
    // Not pivot_root: it cannot leave the initial RAM disk's file system.
    chdir(root).context(root.display())?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context("move the root")?;
    chroot(".").context("chroot")?;
    chdir("/").context("/")?;
    hide(container)
}

/// A path of the container's, below `root`, with no component that leaves it. A link in the image that points elsewhere is
/// followed by the guest's kernel: what it reaches is the guest's, which is the container's own.
fn below(root: &Path, path: &Path) -> Result<PathBuf> {
    let mut joined = root.to_owned();
    for component in path.components() {
        match component {
            Component::Normal(name) => joined.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::new(format!("{}: has ..", path.display())));
            }
        }
    }
    Ok(joined)
}

fn mount_one(root: &Path, wanted: &Mount) -> Result<()> {
    let place = below(root, wanted.destination())?;
    let what = || format!("mount {}", wanted.destination().display());
    fs::create_dir_all(&place).context(what())?;
    let kind = match wanted.typ().as_deref() {
        // Of either version: the guest has the second.
        Some("cgroup") => "cgroup2",
        Some(kind) => kind,
        None => return Err(Error::new(format!("{}: no type", what()))),
    };
    let (flags, data) = options(wanted.options().as_deref().unwrap_or_default());
    let data = if kind == "cgroup2" { "" } else { &data };
    mount(Some(kind), &place, Some(kind), flags, Some(data)).context(what())
}

/// Flags of mount(2), and the options that are the file system's own.
fn options(words: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for word in words {
        match word.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "rw" | "defaults" | "private" | "rprivate" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

fn devices(root: &Path) -> Result<()> {
    let folder = root.join("dev");
    for name in DEVICES {
        let place = folder.join(name);
        File::create(&place).context(place.display())?;
        let own = Path::new("/dev").join(name);
        let none = None::<&str>;
        mount(Some(&own), &place, none, MsFlags::MS_BIND, none).context(place.display())?;
    }
    for (name, to) in LINKS {
        let place = folder.join(name);
        match symlink(to, &place) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).context(place.display());
            }
            _ => {}
        }
    }
    Ok(())
}

fn copy(root: &Path, file: &CopiedFile) -> Result<()> {
    let place = below(root, &file.destination)?;
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder).context(folder.display())?;
    }
    fs::write(&place, &file.content).context(file.destination.display())?;
    let mode = fs::Permissions::from_mode(file.mode);
    fs::set_permissions(&place, mode).context(file.destination.display())
}

/// Makes paths read-only or invisible, and the root read-only, as the container asks.
fn hide(container: &Container) -> Result<()> {
    let none = None::<&str>;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let linux = container.spec.linux().as_ref();
    let paths = linux.and_then(|linux| linux.readonly_paths().as_ref());
    for path in paths.into_iter().flatten().map(Path::new) {
        if path.exists() {
            mount(Some(path), path, none, bind, none).context(path.display())?;
            mount(none, path, none, read_only, none).context(path.display())?;
        }
    }
    let paths = linux.and_then(|linux| linux.masked_paths().as_ref());
    for path in paths.into_iter().flatten().map(Path::new) {
        if path.is_dir() {
            let flags = MsFlags::MS_RDONLY;
            mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("size=0"))
                .context(path.display())?;
        } else if path.exists() {
            mount(Some("/dev/null"), path, none, bind, none).context(path.display())?;
        }
    }
    let root = container.spec.root().as_ref();
    if root.is_some_and(|root| root.readonly().unwrap_or(false)) {
        mount(none, "/", none, read_only, none).context("a read-only root")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_below_the_root() {
        let root = Path::new("/run/guest");
        assert_eq!(
            below(root, Path::new("/etc/./hosts")).unwrap(),
            Path::new("/run/guest/etc/hosts")
        );
        assert!(below(root, Path::new("/../etc")).is_err());
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let words = ["nosuid", "ro", "mode=755", "size=64k", "rprivate"].map(str::to_owned);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_RDONLY;
        assert_eq!(options(&words), (flags, "mode=755,size=64k".to_owned()));
    }
}
