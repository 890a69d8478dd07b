//! What process 1 does before anything else.

use std::fs::{self, File};
use std::path::Path;

use ebb_pod::error::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::copies;

/// Modules to load, a path in each line, those that others need first.
const MODULES: &str = "/etc/modules";

/// What is mounted: type, where, options.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620"),
    ("tmpfs", "/run", "mode=0755"),
    ("tmpfs", copies::FOLDER, "mode=0755"),
    ("cgroup2", "/sys/fs/cgroup", ""),
];

/// Mounts what programs expect and loads the modules.
pub fn prepare() -> Result<()> {
    for (kind, place, options) in MOUNTS {
        fs::create_dir_all(place).context(place)?;
        let flags = MsFlags::MS_NOSUID;
        mount(Some(*kind), *place, Some(*kind), flags, Some(*options))
            .context(format_args!("mount {place}"))?;
    }
    let list = fs::read_to_string(MODULES).context(MODULES)?;
    for path in list.lines() {
        load(Path::new(path))?;
    }
    let controllers = "+memory +pids +cpu";
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", controllers).context("the cgroups")
}

fn load(path: &Path) -> Result<()> {
    let file = File::open(path).context(path.display())?;
    let done = nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty());
    match done {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).context(format_args!("load {}", path.display())),
    }
}
