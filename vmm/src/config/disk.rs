//! `--disk`: a block device backed by a raw file.

use std::path::PathBuf;

use clap::ArgAction::Set;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::keys::{Keys, device_id, on_off};
use super::number::number;
use super::rate::Rate;

/// `--disk`: a block device backed by a raw file.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct DiskConfig {
    /// Raw disk image or block device, for instance path=disk.raw; an empty file is a disk whose content comes later
    #[arg(long, value_name = "PATH")]
    pub path: PathBuf,
    /// The guest may not write
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub readonly: bool,
    /// How several requests are under way at once
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub engine: DiskEngine,
    /// Queues, each with a thread of its own; a guest uses one for each vCPU
    #[arg(long, value_parser = number::<u16>(1..=16), default_value = "1")]
    pub queues: u16,
    /// Read and write past the host's cache (O_DIRECT)
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub direct: bool,
    /// Limit of the bytes that are read and written: SIZE in MS milliseconds (1000), and once BURST more
    #[arg(long, value_name = "SIZE/MS+BURST")]
    pub bw: Option<Rate>,
    /// Limit of the requests, in the same form
    #[arg(long, value_name = "N/MS+BURST")]
    pub ops: Option<Rate>,
    /// Name in the API; disk0, disk1 and so on by default
    #[arg(long, value_name = "NAME", value_parser = device_id)]
    pub id: Option<String>,
}

impl Keys for DiskConfig {}

impl DiskConfig {
    /// The name of the disk with this number; the first is 0.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }
}

/// How a disk's requests are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DiskEngine {
    /// by io_uring where the host lets the monitor use it, else by threads
    Auto,
    /// by io_uring
    #[value(name = "io_uring")]
    #[serde(rename = "io_uring")]
    IoUring,
    /// by four threads for each queue
    Threads,
}

impl Default for DiskConfig {
    /// A writable disk without a file.
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            readonly: false,
            engine: DiskEngine::Auto,
            queues: 1,
            direct: false,
            bw: None,
            ops: None,
            id: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::{assert_refused, parse_keys};

    #[test]
    fn keys_become_values() {
        let disk: DiskConfig = parse_keys("path=/d,readonly=on").unwrap();
        assert_eq!((disk.path, disk.readonly), (PathBuf::from("/d"), true));
        assert_eq!((disk.bw, disk.ops), (None, None));
        let readonly = DiskConfig {
            path: "/d".into(),
            readonly: true,
            ..DiskConfig::default()
        };
        assert_eq!(parse_keys("path=/d,readonly=on"), Ok(readonly));
        let disk: DiskConfig = parse_keys("path=/d,engine=io_uring,queues=4,direct=on").unwrap();
        assert_eq!(
            (disk.engine, disk.queues, disk.direct),
            (DiskEngine::IoUring, 4, true)
        );
        let disk: DiskConfig = parse_keys("path=/d,bw=1M/100+2M,ops=7").unwrap();
        assert_eq!(
            (disk.bw, disk.ops),
            ("1M/100+2M".parse().ok(), "7".parse().ok())
        );
        assert_refused::<DiskConfig>(&[
            ("readonly=on", "path is missing"),
            (
                "path=/d,engine=aio",
                "engine=aio: write auto, io_uring or threads",
            ),
            (
                "path=/d,queues=17",
                "queues=17: write a whole number of at most 16",
            ),
            ("path=/d,id=a/b", "id=a/b: use 1 to 64 letters, digits"),
            ("path=/d,id=ä", "id=ä: use 1 to 64 letters, digits"),
        ]);
    }
}
