//! The message that a container leaves for Kubernetes when it ends: a file of the host's, of which the guest has a copy. What is in the
//! copy at the end comes back.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_pod::Connection;
use ebb_pod::error::{Context, Result};
use nix::libc::O_NOFOLLOW;
use oci_spec::runtime::Mount;

use crate::agent;
use crate::hurried::Hurried;
use crate::machine::Machine;

/// The most that Kubernetes takes of one, in bytes (kubelet, `MaxContainerTerminationMessageLength`).
const LONGEST: u64 = 4096;

/// How long the guest may take for all of it: the end of the container waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a container's message comes from and goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The name of the copy.
    pub copy: String,
    /// The host's file.
    pub file: PathBuf,
}

/// True for a mount of a file that a kubelet has made for the message of a container: PODS/UID/containers/NAME/FILE.
pub fn is_one(source: &Path, mount: &Mount) -> bool {
    let mut above = source.iter().rev().skip(2);
    let folder = above.next().is_some_and(|name| name == "containers");
    let pods = above.nth(1).is_some_and(|name| name == "pods");
    let words = mount.options().as_deref().unwrap_or_default();
    let writable = !words.iter().any(|word| word == "ro");
    folder && pods && writable && source.is_file()
}

impl Message {
    /// Fetches it from the container with this id.
    pub fn fetch(&self, machine: &Machine, id: &str) -> Result<()> {
        let wanted = Connection::Copied {
            container: id.to_owned(),
            name: self.copy.clone(),
        };
        let what = || self.file.display();
        let connection = agent::stream(machine, &wanted)?;
        let mut text = Vec::new();
        let guest = Hurried::new(&connection, PATIENCE);
        let read = guest.take(LONGEST).read_to_end(&mut text);
        read.context(what())?;
        let mut options = OpenOptions::new();
        let options = options.write(true).truncate(true).custom_flags(O_NOFOLLOW);
        let file = options.open(&self.file);
        file.and_then(|mut file| file.write_all(&text))
            .context(what())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_what_a_kubelet_has_made_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        let mount = |options: &[&str]| {
            let mut mount = Mount::default();
            let words = options.iter().map(|word| (*word).to_owned());
            mount.set_options(Some(words.collect()));
            mount
        };
        let writable = mount(&["rbind", "rw"]);
        assert!(is_one(&at("pods/7/containers/name/1f"), &writable));
        assert!(!is_one(
            &at("pods/7/containers/name/1f"),
            &mount(&["rbind", "ro"])
        ));
        assert!(!is_one(&at("pods/7/etc-hosts"), &writable));
        assert!(!is_one(&at("pods/7/8/containers/name/1f"), &writable));
        assert!(!is_one(
            &folder.path().join("pods/7/containers/name"),
            &writable
        ));
    }
}
