//! The options of `ebb jail`.

use std::path::PathBuf;

use clap::Args;

use super::keys::{Keys, keys};
use super::limits::MAX_MEMORY;
use super::number::{number, size};
use super::spec::PAIRS;

/// Where a machine is locked in.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct JailSpec {
    /// Number of the unprivileged user that the machine's processes run as; one of its own for each machine
    #[arg(long, value_name = "NUMBER")]
    pub uid: u32,
    /// Number of its group; it has no other group
    #[arg(long, value_name = "NUMBER")]
    pub gid: u32,
    /// The machine's folder, the only place where it makes files: its socket, logs and the serial port's output. It is made,
    /// and removed at the end if it is empty; /run/ebb/jail/ID by default
    #[arg(long, value_name = "PATH")]
    pub folder: Option<PathBuf>,
    /// The machine's cgroup (version 2) and its limits
    #[arg(long, value_name = PAIRS, value_parser = keys::<JailCgroup>(), default_value = "parent=ebb")]
    pub cgroup: JailCgroup,
    /// Look for taps in this network namespace, for instance /run/netns/NAME, instead of the caller's. The machine itself
    /// has an empty one in either case
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
}

/// `--cgroup`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct JailCgroup {
    /// The cgroup below which that of the machine is made, with the machine's name: a path below the root of all
    #[arg(long, value_name = "PATH", default_value = "ebb")]
    pub parent: PathBuf,
    /// Memory above which the kernel slows the machine down, and Ebb makes room
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096))]
    pub memory_high: Option<u64>,
    /// Memory above which the kernel kills
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096))]
    pub memory_max: Option<u64>,
    /// Processor time, in percent of one processor
    #[arg(long, value_name = "PERCENT", value_parser = number::<u32>(1..=1_000_000))]
    pub cpu_max: Option<u32>,
    /// Number of threads, those of the helper processes among them
    #[arg(long, value_name = "NUMBER", value_parser = number::<u32>(1..=1 << 22))]
    pub pids_max: Option<u32>,
}

impl Keys for JailCgroup {}
