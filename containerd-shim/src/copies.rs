//! What a container's specification asks of the host: its mounts from there become copies, or are refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ebb_pod::error::{Context, Error, Result};
use ebb_pod::{Container, CopiedFile};
use oci_spec::runtime::{Mount, MountBuilder, Spec};

/// The longest file that is copied, in bytes: such as resolv.conf.
const LONGEST: u64 = 1 << 20;

/// The container of a bundle.
pub fn container(bundle: &Path) -> Result<Container> {
    let path = bundle.join("config.json");
    let mut spec = Spec::load(&path).context(path.display())?;
    let (mut files, mut mounts) = (Vec::new(), Vec::new());
    for mount in spec.mounts().clone().unwrap_or_default() {
        match from_host(&mount) {
            None => mounts.push(mount),
            Some(source) if source.is_file() => files.push(copy(source, &mount)?),
            Some(_) if mount.destination() == Path::new("/dev/shm") => {
                mounts.push(shared_memory()?)
            }
            Some(source) => {
                let (from, to) = (source.display(), mount.destination().display());
                return Err(Error::new(format!(
                    "volume {from} at {to}: a guest cannot share a folder with the host yet; put the files into the image"
                )));
            }
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(Container { spec, files })
}

/// The path on the host, of a mount that binds one.
fn from_host(mount: &Mount) -> Option<&Path> {
    let words = mount.options().as_deref().unwrap_or_default();
    let binds = words.iter().any(|word| word == "bind" || word == "rbind");
    let binds = binds || mount.typ().as_deref() == Some("bind");
    binds.then(|| mount.source().as_deref().unwrap_or(Path::new("")))
}

fn copy(source: &Path, mount: &Mount) -> Result<CopiedFile> {
    let meta = fs::metadata(source).context(source.display())?;
    if meta.len() > LONGEST {
        let text = format!(
            "{}: {} bytes; at most {LONGEST} are copied",
            source.display(),
            meta.len()
        );
        return Err(Error::new(text));
    }
    Ok(CopiedFile {
        destination: mount.destination().clone(),
        mode: meta.permissions().mode() & 0o777,
        content: fs::read(source).context(source.display())?,
    })
}

fn shared_memory() -> Result<Mount> {
    let mount = MountBuilder::default()
        .destination("/dev/shm")
        .typ("tmpfs")
        .source("shm")
        .options(["nosuid", "nodev", "noexec", "mode=1777"].map(str::to_owned))
        .build();
    mount.context("/dev/shm")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bundle whose only mount binds this path of the host at /there.
    fn bundle(source: &Path) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/there", "type": "bind", "source": source, "options": ["rbind"]},
            ],
        });
        fs::write(folder.path().join("config.json"), spec.to_string()).unwrap();
        folder
    }

    #[test]
    fn a_file_of_the_host_is_copied() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "nameserver").unwrap();
        let container = container(bundle(file.path()).path()).unwrap();
        let [copy] = &container.files[..] else {
            panic!("{:?}", container.files);
        };
        assert_eq!(copy.destination, Path::new("/there"));
        assert_eq!((copy.mode, &copy.content[..]), (0o600, &b"nameserver"[..]));
        let mounts = container.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 1, "the copy is not mounted, too: {mounts:?}");
    }

    #[test]
    fn a_folder_and_a_long_file_are_refused_by_name() {
        let error = container(bundle(Path::new("/usr")).path()).unwrap_err();
        assert!(
            error.to_string().starts_with("volume /usr at /there"),
            "{error}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LONGEST + 1).unwrap();
        let error = container(bundle(file.path()).path()).unwrap_err();
        assert!(error.to_string().contains("1048577 bytes"), "{error}");
    }
}
