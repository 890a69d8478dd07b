//! What a container's specification asks of the host: its mounts from there become copies, or folders that the pod's containers
//! share in the guest.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_pod::error::{Context, Error, Result};
use ebb_pod::volumes::{COPY, SHARED};
use ebb_pod::{Container, LONGEST_LINE};
use oci_spec::runtime::{Mount, Spec};

use crate::guest::one_line;
use crate::hurried::Hurried;
use crate::messages::{self, Message};

/// The most files and folders that are copied into a container.
const MOST_FILES: u64 = 10_000;

/// How long the guest may take for all of it, and a second for each MiB.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

/// The name of Kubernetes' plugin for volumes that start empty, in the paths of these.
const EMPTY: &str = "kubernetes.io~empty-dir";

/// What of the host is copied into a container: the first one is the volume 0.
#[derive(Debug, Default)]
pub struct Copies {
    sources: Vec<PathBuf>,
    /// Bytes of all files.
    bytes: u64,
    /// The one that comes back.
    pub message: Option<Message>,
}

/// The container of a bundle, and what is to be copied into it: `limit` bytes at most.
pub fn container(bundle: &Path, limit: u64) -> Result<(Container, Copies)> {
    let path = bundle.join("config.json");
    let mut spec = Spec::load(&path).context(path.display())?;
    let mut copies = Copies::default();
    let mut left = Left {
        bytes: limit,
        files: MOST_FILES,
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let Some(source) = from_host(mount) else {
            continue;
        };
        let name = if mount.destination() == Path::new("/dev/shm") {
            Some("shm".to_owned())
        } else {
            is_empty_volume(&source).then(|| name_of(&source))
        };
        if let Some(name) = name {
            mount.set_typ(Some(SHARED.to_owned()));
            mount.set_source(Some(name.into()));
            continue;
        }
        let (from, to) = (source.display(), mount.destination().display());
        let source = fs::canonicalize(&source).context(format_args!("volume {from} at {to}"))?;
        left.take(&source).map_err(|error| {
            let remedy = "raise volume_mib in pods.toml, or put the files into the image";
            Error::new(format!(
                "volume {from} at {to}: {error}: a guest gets copies of {limit} bytes at most in all; {remedy}"
            ))
        })?;
        let name = copies.sources.len().to_string();
        if messages::is_one(&source, mount) {
            copies.message = Some(Message {
                copy: name.clone(),
                file: source.clone(),
            });
        }
        mount.set_typ(Some(COPY.to_owned()));
        mount.set_source(Some(name.into()));
        copies.sources.push(source);
    }
    copies.bytes = limit - left.bytes;
    spec.set_mounts(Some(mounts));
    let container = Container {
        spec,
        network: None,
        sandbox: None,
    };
    Ok((container, copies))
}

/// The path on the host, of a mount that binds one.
fn from_host(mount: &Mount) -> Option<PathBuf> {
    let words = mount.options().as_deref().unwrap_or_default();
    let binds = words.iter().any(|word| word == "bind" || word == "rbind");
    let binds = binds || mount.typ().as_deref() == Some("bind");
    binds.then(|| mount.source().clone().unwrap_or_default())
}

/// True for the folder of a volume of Kubernetes' that starts empty: all containers of the pod have the same one.
fn is_empty_volume(source: &Path) -> bool {
    source
        .parent()
        .is_some_and(|parent| parent.ends_with(EMPTY))
}

/// A name for a folder that no other has.
fn name_of(source: &Path) -> String {
    let digest = blake3::hash(source.as_os_str().as_encoded_bytes());
    digest.to_hex().chars().take(32).collect()
}

/// How much more may be copied.
struct Left {
    bytes: u64,
    files: u64,
}

impl Left {
    fn take(&mut self, path: &Path) -> Result<()> {
        let meta = fs::symlink_metadata(path).context(path.display())?;
        let kind = meta.file_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            return Err(Error::new(format!(
                "{} is neither file nor folder",
                path.display()
            )));
        }
        let bytes = if kind.is_file() { meta.len() } else { 0 };
        let left = (self.bytes.checked_sub(bytes)).zip(self.files.checked_sub(1));
        (self.bytes, self.files) = left.context(format_args!("{} is too much", path.display()))?;
        if kind.is_dir() {
            for entry in fs::read_dir(path).context(path.display())? {
                self.take(&entry.context(path.display())?.path())?;
            }
        }
        Ok(())
    }
}

impl Copies {
    /// True if there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Sends them to the guest, which says when it has them.
    pub fn send(&self, connection: &UnixStream) -> Result<()> {
        let limit = PATIENCE + Duration::from_secs(self.bytes >> 20);
        let mut guest = Hurried::new(connection, limit);
        let mut archive = tar::Builder::new(&mut guest);
        archive.follow_symlinks(false);
        for (number, source) in self.sources.iter().enumerate() {
            let name = number.to_string();
            let added = if source.is_dir() {
                archive.append_dir_all(name, source)
            } else {
                File::open(source).and_then(|mut file| archive.append_file(name, &mut file))
            };
            added.context(source.display())?;
        }
        archive.finish().context("the copies")?;
        drop(archive);
        connection.shutdown(Shutdown::Write).context("the copies")?;
        let mut line = String::new();
        let mut reader = BufReader::new(guest).take(LONGEST_LINE);
        reader.read_line(&mut line).context("the guest's copies")?;
        match line.as_str() {
            "\n" => Ok(()),
            other => Err(Error::new(format!(
                "the guest's copies: {}",
                one_line(other.trim_end())
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A bundle with a mount that binds this path of the host at /there.
    fn bundle(source: &Path) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/there", "type": "bind", "source": source, "options": ["rbind", "ro"]},
            ],
        });
        fs::write(folder.path().join("config.json"), spec.to_string()).unwrap();
        folder
    }

    /// What becomes of the mount.
    fn mount(source: &Path, limit: u64) -> Result<(Mount, Copies)> {
        let (container, copies) = container(bundle(source).path(), limit)?;
        let mounts = container.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 2);
        Ok((mounts[1].clone(), copies))
    }

    #[test]
    fn files_and_folders_of_the_host_are_copied() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("below")).unwrap();
        fs::write(folder.path().join("below/file"), "12345").unwrap();
        std::os::unix::fs::symlink("below/file", folder.path().join("link")).unwrap();
        let (mount, copies) = mount(folder.path(), 5).unwrap();
        assert_eq!(mount.typ().as_deref(), Some(COPY));
        assert_eq!(mount.source().as_deref(), Some(Path::new("0")));
        assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()));

        let (host, guest) = UnixStream::pair().unwrap();
        let place = tempfile::tempdir().unwrap();
        let into = place.path().to_owned();
        let thread = std::thread::spawn(move || {
            tar::Archive::new(&guest).unpack(into).unwrap();
            std::io::Write::write_all(&mut &guest, b"\n").unwrap();
        });
        copies.send(&host).unwrap();
        thread.join().unwrap();
        let read = |name: &str| fs::read_to_string(place.path().join(name)).unwrap();
        assert_eq!(
            (read("0/below/file").as_str(), read("0/link").as_str()),
            ("12345", "12345")
        );
    }

    #[test]
    fn a_guest_that_takes_nothing_or_says_nothing_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("file")).unwrap();
        for len in [(1 << 20) - 1, 5] {
            file.set_len(len).unwrap();
            let (_, copies) = mount(folder.path(), 1 << 20).unwrap();
            // What is short fits into the socket.
            let (host, _guest) = UnixStream::pair().unwrap();
            let error = copies.send(&host).unwrap_err().to_string();
            assert!(error.ends_with("the guest takes too long"), "{error}");
        }
    }

    #[test]
    fn a_guest_that_answers_byte_by_byte_has_no_more_time() {
        let folder = tempfile::tempdir().unwrap();
        let (_, copies) = mount(folder.path(), 0).unwrap();
        let (host, mut guest) = UnixStream::pair().unwrap();
        let drips = std::thread::spawn(move || {
            while guest.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let error = copies.send(&host).unwrap_err().to_string();
        assert!(error.ends_with("the guest takes too long"), "{error}");
        drop(host);
        drips.join().unwrap();
    }

    #[test]
    fn what_is_too_much_or_no_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "12345").unwrap();
        let error = mount(folder.path(), 4).unwrap_err().to_string();
        assert!(
            error.contains("file is too much") && error.contains("volume_mib"),
            "{error}"
        );
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        let error = mount(folder.path(), 5).unwrap_err().to_string();
        assert!(
            error.contains("socket is neither file nor folder"),
            "{error}"
        );
        let error = mount(Path::new("/nothing/here"), 5)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("volume /nothing/here at /there"),
            "{error}"
        );
    }

    #[test]
    fn an_empty_volume_is_shared_and_not_copied() {
        let path = |name: &str| {
            let path = format!("/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/{name}");
            let (mount, copies) = mount(Path::new(&path), 0).unwrap();
            assert!(copies.is_empty());
            assert_eq!(mount.typ().as_deref(), Some(SHARED));
            mount.source().clone().unwrap()
        };
        assert_eq!(path("one"), path("one"));
        assert_ne!(path("one"), path("two"));
    }
}
