//! The root file system of a container, from disks of the guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Mount;
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::rootfs::LAYER;
use nix::mount::{MntFlags, MsFlags, mount as mount_, umount2};

use crate::mounts::options;

/// The file system of a layer.
const FILE_SYSTEM: &str = "erofs";

/// How long a disk may need to come.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked for: the kernel has no event that says how large a disk has become before a reader could see it.
const PAUSE: Duration = Duration::from_millis(2);

/// Where [`mount`] puts the root file system.
pub fn root(folder: &Path) -> PathBuf {
    folder.join("root")
}

/// Mounts the layers in `folder`, and over them, if they are read-only, a file system in memory.
pub fn mount(folder: &Path, rootfs: &[Mount]) -> Result<()> {
    let done = mount_all(folder, rootfs);
    done.inspect_err(|_| unmount(folder))
}

fn mount_all(folder: &Path, rootfs: &[Mount]) -> Result<()> {
    let none = None::<&str>;
    let root = root(folder);
    fs::create_dir_all(&root).context(root.display())?;
    if let [only] = rootfs
        && only.type_ != LAYER
    {
        await_disk(&only.source)?;
        let (source, kind) = (Some(only.source.as_str()), Some(only.type_.as_str()));
        let (flags, data) = options(&only.options);
        let done = mount_(source, &root, kind, flags, Some(data.as_str()));
        return done.context(format_args!("{} as {}", only.source, only.type_));
    }
    let lower = layers(folder, rootfs)?;
    let scratch = folder.join("scratch");
    fs::create_dir_all(&scratch).context(scratch.display())?;
    mount_(
        Some("tmpfs"),
        &scratch,
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .context("scratch")?;
    for name in ["upper", "work"] {
        fs::create_dir(scratch.join(name)).context(name)?;
    }
    let (lower, scratch) = (lower.join(":"), scratch.display());
    let options = format!("lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work");
    mount_(
        Some("overlay"),
        &root,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .context("overlay")
}

/// Mounts each layer, and returns where.
fn layers(folder: &Path, rootfs: &[Mount]) -> Result<Vec<String>> {
    let mut lower = Vec::new();
    for (number, layer) in rootfs.iter().enumerate() {
        if layer.type_ != LAYER {
            return Err(Error::new(format!("a layer of type {}", layer.type_)));
        }
        await_disk(&layer.source)?;
        let place = folder.join(format!("layer{number}"));
        fs::create_dir_all(&place).context(place.display())?;
        let (source, kind) = (Some(layer.source.as_str()), Some(FILE_SYSTEM));
        mount_(source, &place, kind, MsFlags::MS_RDONLY, None::<&str>).context(&layer.source)?;
        lower.push(place.display().to_string());
    }
    if lower.is_empty() {
        return Err(Error::new("the container has no root file system"));
    }
    Ok(lower)
}

/// Waits until a disk has content: the host has given it one just now.
fn await_disk(path: &str) -> Result<()> {
    let name = path.strip_prefix("/dev/").context(path)?;
    let size = format!("/sys/class/block/{name}/size");
    let end = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(&size).context(&size)?;
        if text.trim() != "0" {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(Error::new(format!("{path} has no content")));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Unmounts all that is in `folder` and removes it.
pub fn unmount(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let ours = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let mut ours: Vec<&Path> = ours
        .map(Path::new)
        .filter(|path| path.starts_with(folder))
        .collect();
    // The last one mounted first.
    ours.reverse();
    for path in ours {
        if let Err(error) = umount2(path, MntFlags::empty()) {
            eprintln!("ebb-pod-agent: unmount {}: {error}", path.display());
        }
    }
    if let Err(error) = fs::remove_dir_all(folder) {
        eprintln!("ebb-pod-agent: {}: {error}", folder.display());
    }
}
