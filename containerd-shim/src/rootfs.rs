//! Images of root file systems: the layers of a snapshot as one read-only EROFS, made once and kept.
//!
//! Guests with the same image share the file, and so the host's page cache.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim::protos::api::Mount;
use ebb_pod::error::{Context, Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The image of a snapshot's layers.
pub fn image(folder: &Path, rootfs: &[Mount]) -> Result<PathBuf> {
    let layers = layers(rootfs)?;
    let path = folder.join(format!("{}.erofs", key(&layers)?));
    fs::create_dir_all(folder).context(folder.display())?;
    // Two pods may want it at once.
    let lock = folder.join("lock");
    let lock = File::create(&lock).context(lock.display())?;
    lock.lock().context("lock the images")?;
    if !path.exists() {
        make(&layers, folder, &path)?;
    }
    Ok(path)
}

/// The folders of the layers, the topmost first.
fn layers(rootfs: &[Mount]) -> Result<Vec<PathBuf>> {
    let [mount] = rootfs else {
        return Err(Error::new(format!(
            "a root file system of {} mounts",
            rootfs.len()
        )));
    };
    let option = |name: &str| {
        mount
            .options
            .iter()
            .find_map(|word| word.strip_prefix(name))
    };
    match mount.type_.as_str() {
        "bind" => Ok(vec![PathBuf::from(&mount.source)]),
        "overlay" => {
            let lower = option("lowerdir=").context("an overlay without layers")?;
            let upper = option("upperdir=").map(Path::new);
            let mut all: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
            // What was written to the snapshot before.
            if let Some(upper) = upper.filter(|upper| !is_empty(upper)) {
                all.insert(0, upper.to_owned());
            }
            Ok(all)
        }
        other => Err(Error::new(format!(
            "a snapshot of type {other}: use containerd's overlayfs snapshotter"
        ))),
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// A name for layers. A folder that was replaced has another inode or change time, though its path may be the same.
fn key(layers: &[PathBuf]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for layer in layers {
        let meta = fs::metadata(layer).context(layer.display())?;
        let (second, nanosecond) = (meta.ctime(), meta.ctime_nsec());
        let line = format!(
            "{} {} {} {second} {nanosecond}\n",
            layer.display(),
            meta.dev(),
            meta.ino()
        );
        hasher.update(line.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn make(layers: &[PathBuf], folder: &Path, path: &Path) -> Result<()> {
    let merged = Merged::new(layers)?;
    let part = tempfile::Builder::new().prefix("part-").tempfile_in(folder);
    let part = part.context(folder.display())?;
    let output = Command::new("mkfs.erofs")
        .arg("--quiet")
        .arg(part.path())
        .arg(merged.path())
        .output()
        .context("mkfs.erofs (package erofs-utils)")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(format!("mkfs.erofs: {said}")));
    }
    part.persist(path).map(drop).context(path.display())
}

/// Layers as one tree.
struct Merged {
    mounted: Option<TempDir>,
    only: PathBuf,
}

impl Merged {
    fn new(layers: &[PathBuf]) -> Result<Self> {
        if let [only] = layers {
            return Ok(Self {
                mounted: None,
                only: only.clone(),
            });
        }
        let place = TempDir::with_prefix("ebb-layers-").context("a temporary folder")?;
        let names: Vec<String> = layers.iter().map(|it| it.display().to_string()).collect();
        let data = format!("lowerdir={}", names.join(":"));
        let kind = Some("overlay");
        mount(
            kind,
            place.path(),
            kind,
            MsFlags::MS_RDONLY,
            Some(data.as_str()),
        )
        .context(&data)?;
        Ok(Self {
            only: place.path().to_owned(),
            mounted: Some(place),
        })
    }

    fn path(&self) -> &Path {
        &self.only
    }
}

impl Drop for Merged {
    fn drop(&mut self) {
        if self.mounted.is_some()
            && let Err(error) = umount2(&self.only, MntFlags::MNT_DETACH)
        {
            eprintln!("unmount {}: {error}", self.only.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(lower: &str, upper: &Path) -> Mount {
        Mount {
            type_: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={lower}"),
                format!("upperdir={}", upper.display()),
            ],
            ..Mount::default()
        }
    }

    #[test]
    fn layers_are_those_of_the_overlay_and_what_was_written() {
        let upper = tempfile::tempdir().unwrap();
        let names = |mount: Mount| layers(&[mount]).unwrap();
        let below = [PathBuf::from("/b"), PathBuf::from("/a")];
        assert_eq!(names(overlay("/b:/a", upper.path())), below);
        fs::write(upper.path().join("file"), "").unwrap();
        let all = names(overlay("/b:/a", upper.path()));
        assert_eq!((all[0].as_path(), &all[1..]), (upper.path(), &below[..]));
    }

    #[test]
    fn a_block_snapshot_is_refused() {
        let mount = Mount {
            type_: "ext4".to_owned(),
            ..Mount::default()
        };
        let error = layers(&[mount]).unwrap_err().to_string();
        assert!(
            error.contains("type ext4") && error.contains("overlayfs"),
            "{error}"
        );
    }

    #[test]
    fn another_folder_at_the_same_path_has_another_key() {
        let folder = tempfile::tempdir().unwrap();
        let layer = vec![folder.path().join("layer")];
        fs::create_dir(&layer[0]).unwrap();
        let first = key(&layer).unwrap();
        assert_eq!(key(&layer).unwrap(), first);
        // Kept, so that its inode is not used again.
        fs::rename(&layer[0], folder.path().join("old")).unwrap();
        fs::create_dir(&layer[0]).unwrap();
        assert_ne!(key(&layer).unwrap(), first);
    }
}
