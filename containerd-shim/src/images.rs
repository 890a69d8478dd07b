//! Images of root file systems: the layers of a snapshot as one read-only EROFS, made once and kept.
//!
//! Guests with the same image share the file, and so the host's page cache.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_pod::error::{Context, Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The image of these layers, the topmost first.
pub fn image(folder: &Path, layers: &[PathBuf]) -> Result<PathBuf> {
    let path = folder.join(format!("{}.erofs", key(layers)?));
    fs::create_dir_all(folder).context(folder.display())?;
    // Two pods may want it at once.
    let lock = folder.join("lock");
    let lock = File::create(&lock).context(lock.display())?;
    lock.lock().context("lock the images")?;
    if !path.exists() {
        make(layers, folder, &path)?;
    }
    Ok(path)
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
