//! Volumes of containers: copies of what the host has, and folders that the pod's containers share.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ebb_pod::Container;
use ebb_pod::error::{Context, Result};
use ebb_pod::volumes::{COPY, SHARED};
use oci_spec::runtime::Mount;

/// Where they are: a file system in memory of their own, which containers may fill.
pub const FOLDER: &str = "/run/volumes";

/// Where the copies for a container are.
pub fn folder(id: &str) -> PathBuf {
    Path::new(FOLDER).join("copies").join(id)
}

fn shared(name: &Path) -> PathBuf {
    Path::new(FOLDER).join("shared").join(name)
}

/// Makes the folders that the container shares with others, if it is the first of them.
pub fn make_shared(container: &Container) -> Result<()> {
    for mount in container.spec.mounts().as_deref().unwrap_or_default() {
        if let Some(name) = of_type(mount, SHARED) {
            let folder = shared(name);
            fs::create_dir_all(&folder).context(folder.display())?;
            // Of whatever user a container's programs are.
            fs::set_permissions(&folder, Permissions::from_mode(0o777))
                .context(folder.display())?;
        }
    }
    Ok(())
}

/// Unpacks what the host copies into a container.
pub fn receive(id: &str, archive: impl Read) -> Result<()> {
    let folder = folder(id);
    fs::create_dir_all(&folder).context(folder.display())?;
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.unpack(&folder).context("unpack the copies")
}

/// Opens a copy, a file of this name in the archive.
pub fn open(id: &str, name: &str) -> Result<File> {
    let path = folder(id).join(name);
    File::open(&path).context(path.display())
}

/// Removes a container's copies, if it has any. What it shares stays until the machine ends.
pub fn remove(id: &str) {
    let _ = fs::remove_dir_all(folder(id));
}

/// What a mount binds, if it is that of a volume.
pub fn source(copies: &Path, mount: &Mount) -> Option<PathBuf> {
    let copy = of_type(mount, COPY).map(|name| copies.join(name));
    copy.or_else(|| of_type(mount, SHARED).map(shared))
}

fn of_type<'a>(mount: &'a Mount, kind: &str) -> Option<&'a Path> {
    let found = mount.source().as_deref();
    found.filter(|_| mount.typ().as_deref() == Some(kind))
}
