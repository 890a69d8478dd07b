//! Where a benchmark runs.

use std::fs;

use serde::{Deserialize, Serialize};

/// What a reader must know of the host to judge figures.
#[derive(Debug, Deserialize, Serialize)]
pub struct Host {
    /// `direct`, or `nested` when the CPUs are emulated.
    pub platform: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Release of the guests' kernel.
    pub guest_kernel: String,
    /// Model of the CPUs.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Size of the memory.
    pub memory_bytes: u64,
}

impl Host {
    /// Looks around.
    #[must_use]
    pub fn probe() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let uname = rustix::system::uname();
        let memory = value(&read("/proc/meminfo"), "MemTotal")
            .and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
        Self {
            platform: variable("EBB_PLATFORM"),
            kernel: uname.release().to_string_lossy().into_owned(),
            guest_kernel: variable("EBB_GUEST_RELEASE"),
            cpu: value(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory.unwrap_or(0) * 1024,
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The first value in a file of lines `key: value`.
fn value(text: &str, key: &str) -> Option<String> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().to_owned())
}
