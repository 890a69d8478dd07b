//! What the agent tells the program that becomes a container's process, in a file.

use std::fs;
use std::path::{Path, PathBuf};

use ebb_pod::Container;
use ebb_pod::error::{Context, Result};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

/// A process to start.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container's cgroup, a folder.
    pub cgroup: PathBuf,
    /// What to run.
    pub process: Process,
    /// Its standard streams: descriptors of the agent.
    pub streams: [i32; 3],
    /// Where it runs.
    pub place: Place,
}

/// Where a process runs.
#[derive(Debug, Serialize, Deserialize)]
pub enum Place {
    /// In namespaces of its own, made for this container whose root file system is in this folder.
    New {
        /// The folder.
        root: PathBuf,
        /// The folder with what the host has copied for it.
        copies: PathBuf,
        /// The container.
        container: Box<Container>,
        /// The first process of the pod's first container, if this is another one.
        sandbox: Option<u32>,
    },
    /// In those of this process of the guest.
    Beside(u32),
}

impl Request {
    /// Writes it to a file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).context("the request")?;
        fs::write(path, bytes).context(path.display())
    }

    /// Reads it.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).context(path.display())?;
        serde_json::from_slice(&bytes).context(path.display())
    }
}
