//! What the node's operator sets: a file in TOML.

use std::path::{Path, PathBuf};

use ebb_pod::error::{Context, Result};
use serde::Deserialize;

/// Where the file is, unless the environment variable `EBB_PODS` says otherwise.
const FILE: &str = "/etc/ebb/pods.toml";

/// The node's settings.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The monitor.
    #[serde(default = "ebb")]
    pub ebb: PathBuf,
    /// The guests' kernel.
    pub kernel: PathBuf,
    /// An initial RAM disk with `ebb-pod-agent` as its `/init`.
    pub initramfs: PathBuf,
    /// Where images of layers are kept.
    #[serde(default = "images")]
    pub images: PathBuf,
    /// Where a pod's sockets and logs are while it runs.
    #[serde(default = "pods")]
    pub pods: PathBuf,
    /// MiB of a guest whose pod has no memory limit.
    #[serde(default = "memory_mib")]
    pub memory_mib: u64,
    /// MiB that a guest has beyond the limit of its pod: for its kernel and the agent.
    #[serde(default = "overhead_mib")]
    pub overhead_mib: u64,
    /// MiB of files and folders of the host that a container gets copies of, at most.
    #[serde(default = "volume_mib")]
    pub volume_mib: u64,
    /// Processors of a guest.
    #[serde(default = "cpus")]
    pub cpus: u8,
}

fn ebb() -> PathBuf {
    "/usr/bin/ebb".into()
}

fn images() -> PathBuf {
    "/var/lib/ebb/images".into()
}

fn pods() -> PathBuf {
    "/run/ebb/pods".into()
}

fn memory_mib() -> u64 {
    2048
}

fn overhead_mib() -> u64 {
    128
}

fn volume_mib() -> u64 {
    16
}

fn cpus() -> u8 {
    1
}

impl Settings {
    /// Reads the file.
    pub fn read() -> Result<Self> {
        let path = std::env::var_os("EBB_PODS").unwrap_or_else(|| FILE.into());
        let path = Path::new(&path);
        let text = std::fs::read_to_string(path).context(path.display())?;
        toml::from_str(&text).context(path.display())
    }
}
