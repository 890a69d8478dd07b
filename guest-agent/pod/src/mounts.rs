//! A container's view of files: its root file system and what is mounted in it (OCI runtime specification, config.md,
//! "Mounts", and config-linux.md, "Default Devices" and "Default Filesystems").

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ebb_pod::Container;
use ebb_pod::error::{Context, Error, Result};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot, sethostname};
use oci_spec::runtime::Mount;

use crate::copies;

/// Devices that every container has.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];

/// The most symbolic links in a path (Linux, include/linux/namei.h, `MAXSYMLINKS`).
const MOST_LINKS: u32 = 40;

/// Links that every container has in /dev.
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Options of mounts that say what is so anyway, or how mounts of the host spread, which are not in the guest.
const DEFAULTS: &[&str] = &[
    "rw",
    "suid",
    "dev",
    "exec",
    "atime",
    "diratime",
    "async",
    "defaults",
    "bind",
    "rbind",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
];

/// Makes `root` the root of this process, which is alone in its mount namespace. What the host has copied is in `copied`, and the
/// process' terminal, if it has one, at `terminal`.
pub fn enter(
    root: &Path,
    copied: &Path,
    container: &Container,
    terminal: Option<&Path>,
) -> Result<()> {
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).context("make mounts private")?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(root), root, none, bind, none).context(root.display())?;
    for wanted in container.spec.mounts().as_deref().unwrap_or_default() {
        match copies::source(copied, wanted) {
            Some(source) => bind_one(root, &source, wanted)?,
            None => mount_one(root, wanted)?,
        }
    }
    devices(root)?;
    if let Some(terminal) = terminal {
        let place = root.join("dev/console");
        make_file(&place)?;
        mount(Some(terminal), &place, none, MsFlags::MS_BIND, none).context("/dev/console")?;
    }
    if let Some(name) = container.spec.hostname() {
        sethostname(name).context("hostname")?;
    }
    // Not pivot_root: it cannot leave the initial RAM disk's file system.
    chdir(root).context(root.display())?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context("move the root")?;
    chroot(".").context("chroot")?;
    chdir("/").context("/")?;
    make_working_folder(container)?;
    hide(container)
}

/// Makes the folder that the container's first process starts in: the image need not have it.
fn make_working_folder(container: &Container) -> Result<()> {
    match container.spec.process() {
        Some(process) if !process.cwd().exists() => {
            let what = process.cwd().display();
            fs::create_dir_all(process.cwd()).context(format_args!("cwd {what}"))
        }
        _ => Ok(()),
    }
}

/// A path of the container's, below `root`: links in it lead to where they lead in the container, and nothing leads out of that.
fn below(root: &Path, path: &Path) -> Result<PathBuf> {
    let parts = |path: &Path| -> Vec<OsString> {
        let parts = path.components().rev();
        parts.map(|part| part.as_os_str().to_owned()).collect()
    };
    let (mut joined, mut left, mut links) = (root.to_owned(), parts(path), 0);
    while let Some(part) = left.pop() {
        match part.as_encoded_bytes() {
            b"/" => root.clone_into(&mut joined),
            b"." => {}
            b".." => {
                if joined != root {
                    joined.pop();
                }
            }
            _ => {
                let next = joined.join(&part);
                let Ok(target) = fs::read_link(&next) else {
                    joined = next;
                    continue;
                };
                links += 1;
                if links > MOST_LINKS {
                    return Err(Error::new(format!("{}: too many links", path.display())));
                }
                left.extend(parts(&target));
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

/// Mounts a volume.
fn bind_one(root: &Path, source: &Path, wanted: &Mount) -> Result<()> {
    let none = None::<&str>;
    let place = below(root, wanted.destination())?;
    let what = || format!("mount {}", wanted.destination().display());
    if source.is_dir() {
        fs::create_dir_all(&place).context(what())?;
    } else {
        make_file(&place).context(what())?;
    }
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), &place, none, bind, none).context(what())?;
    let (flags, _) = options(wanted.options().as_deref().unwrap_or_default());
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(none, &place, none, flags, none).context(what())
}

/// Makes a file to mount another one on, unless it is there.
fn make_file(place: &Path) -> Result<()> {
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder).context(folder.display())?;
    }
    let mut options = File::options();
    let made = options.append(true).create(true).open(place);
    made.map(drop).context(place.display())
}

/// Flags of mount(2), and the options that are the file system's own.
pub fn options(words: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for word in words {
        match word.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            other if DEFAULTS.contains(&other) => {}
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
    fn links_in_a_path_lead_to_where_they_lead_in_the_container() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("var/lib")).unwrap();
        for (to, at) in [
            ("/run", "var/run"),
            ("../../../..", "var/lib/up"),
            ("name", "name"),
            ("run/conf", "conf"),
        ] {
            symlink(to, root.join(at)).unwrap();
        }
        let found = |path: &str| below(root, Path::new(path)).unwrap();
        // Debian's images have this link, and Kubernetes mounts its secrets there.
        assert_eq!(found("/var/run/secrets"), root.join("run/secrets"));
        assert_eq!(found("/conf"), root.join("run/conf"));
        assert_eq!(found("/etc/./hosts"), root.join("etc/hosts"));
        assert_eq!(found("/../etc"), root.join("etc"));
        assert_eq!(found("/var/lib/up/etc"), root.join("etc"));
        let error = below(root, Path::new("/name/x")).unwrap_err();
        assert!(error.to_string().contains("too many links"), "{error}");
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let words = ["nosuid", "ro", "mode=755", "size=64k", "rprivate"].map(str::to_owned);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_RDONLY;
        assert_eq!(options(&words), (flags, "mode=755,size=64k".to_owned()));
    }
}
