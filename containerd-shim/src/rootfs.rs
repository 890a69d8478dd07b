//! What containerd's mounts of a root file system become: an image of layers, or a disk of the guest with what a block snapshot has.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use containerd_shim::protos::api::Mount;
use ebb_pod::error::{Context, Error, Result};
use ebb_pod::rootfs::LAYER;

use crate::images;

/// File systems of block snapshots that the guest's kernel has the modules for.
const KINDS: &[&str] = &["ext2", "ext3", "ext4", "erofs"];

/// The root file system of a container.
#[derive(Debug, PartialEq)]
pub struct Root {
    /// The file or block device that the guest gets as a disk.
    pub path: PathBuf,
    /// The guest may write to it.
    pub writable: bool,
    /// It is a block snapshot.
    pub is_block: bool,
    /// How the guest mounts it, but for the disk.
    mount: Mount,
}

impl Root {
    /// The root file system of these mounts. An image of layers is made in the folder `images`, unless it is there.
    pub fn find(images: &Path, rootfs: &[Mount]) -> Result<Self> {
        let [mount] = rootfs else {
            return Err(Error::new(format!(
                "a root file system of {} mounts: use containerd's snapshotter overlayfs, devmapper or blockfile",
                rootfs.len()
            )));
        };
        match mount.type_.as_str() {
            "bind" => Self::layers(images, &[PathBuf::from(&mount.source)]),
            "overlay" => Self::layers(images, &layers(mount)?),
            kind if KINDS.contains(&kind) => Self::block(mount),
            other => Err(Error::new(format!(
                "a snapshot of type {other}: use containerd's snapshotter overlayfs, or one of block devices with ext4"
            ))),
        }
    }

    fn layers(images: &Path, layers: &[PathBuf]) -> Result<Self> {
        Ok(Self {
            path: images::image(images, layers)?,
            writable: false,
            is_block: false,
            mount: Mount {
                type_: LAYER.to_owned(),
                ..Mount::default()
            },
        })
    }

    /// A block device, or an image file, that has a file system of its own.
    fn block(mount: &Mount) -> Result<Self> {
        let path = fs::canonicalize(&mount.source).context(&mount.source)?;
        let kind = fs::metadata(&path).context(path.display())?.file_type();
        if !(kind.is_file() || kind.is_block_device()) {
            return Err(Error::new(format!(
                "the snapshot {} is neither a file nor a block device",
                path.display()
            )));
        }
        // The guest has a disk where the host would have a loop device.
        let options = mount.options.iter().filter(|word| *word != "loop");
        Ok(Self {
            path,
            writable: !mount.options.iter().any(|word| word == "ro"),
            is_block: true,
            mount: Mount {
                type_: mount.type_.clone(),
                options: options.cloned().collect(),
                ..Mount::default()
            },
        })
    }

    /// How the guest mounts it from this disk: the first one is vda.
    pub fn on_disk(&self, disk: usize) -> Mount {
        let letter = char::from(b'a' + u8::try_from(disk).unwrap_or(0));
        Mount {
            source: format!("/dev/vd{letter}"),
            ..self.mount.clone()
        }
    }
}

/// The folders of an overlay's layers, the topmost first.
fn layers(mount: &Mount) -> Result<Vec<PathBuf>> {
    let words = mount.options.iter();
    let option = |name: &str| words.clone().find_map(|word| word.strip_prefix(name));
    let lower = option("lowerdir=").context("an overlay without layers")?;
    let upper = option("upperdir=").map(Path::new);
    let mut all: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
    // What was written to the snapshot before.
    if let Some(upper) = upper.filter(|upper| !is_empty(upper)) {
        all.insert(0, upper.to_owned());
    }
    Ok(all)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.display().to_string(),
            options: options.iter().map(|word| (*word).to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn layers_are_those_of_the_overlay_and_what_was_written() {
        let upper = tempfile::tempdir().unwrap();
        let data = format!("upperdir={}", upper.path().display());
        let names = || layers(&mount("overlay", upper.path(), &["lowerdir=/b:/a", &data])).unwrap();
        let below = [PathBuf::from("/b"), PathBuf::from("/a")];
        assert_eq!(names(), below);
        fs::write(upper.path().join("file"), "").unwrap();
        let all = names();
        assert_eq!((all[0].as_path(), &all[1..]), (upper.path(), &below[..]));
    }

    #[test]
    fn a_block_snapshot_is_a_disk_that_may_be_written_as_its_mount_says() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("image"), folder.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("image", &link).unwrap();
        let find = |options: &[&str]| {
            let found = Root::find(folder.path(), &[mount("ext4", &link, options)]);
            found.unwrap()
        };
        let root = find(&["ro", "loop", "noload"]);
        assert_eq!((root.path.as_path(), root.is_block), (&*file, true));
        assert!(!root.writable && find(&["rw"]).writable && find(&[]).writable);
        let wanted = mount("ext4", Path::new("/dev/vdc"), &["ro", "noload"]);
        assert_eq!(root.on_disk(2), wanted);
    }

    #[test]
    fn other_snapshots_are_refused_with_what_to_use() {
        let folder = tempfile::tempdir().unwrap();
        let said = |mounts: &[Mount]| {
            let error = Root::find(folder.path(), mounts).unwrap_err();
            error.to_string()
        };
        let error = said(&[mount("btrfs", folder.path(), &["subvol=1"])]);
        assert!(
            error.contains("type btrfs") && error.contains("overlayfs"),
            "{error}"
        );
        let error = said(&[mount("ext4", folder.path(), &[])]);
        assert!(
            error.contains("neither a file nor a block device"),
            "{error}"
        );
        assert!(said(&[]).contains("of 0 mounts"), "{}", said(&[]));
    }
}
