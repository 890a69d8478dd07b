//! A node's memory: a cgroup with a limit, in which each pod has one of its own, as Kubernetes makes them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ebb_harness::Images;
use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Error, Result};
use tempfile::TempDir;

/// What the pods of a node may use.
pub struct Node {
    cgroup: Cgroup,
    folder: TempDir,
}

impl Node {
    /// One with this limit in bytes, if it has one.
    pub fn new(name: &str, limit: Option<u64>) -> Result<Self> {
        let cgroup = Cgroup::new(name)?;
        if let Some(limit) = limit {
            cgroup.set("memory.max", limit)?;
        }
        cgroup.set("cgroup.subtree_control", "+memory")?;
        let folder = TempDir::with_prefix("ebb-node-").context("make a temporary folder")?;
        Ok(Self { cgroup, folder })
    }

    /// The monitor; or, if `plain`, a program that starts it without a balloon, and with all that is freed left where it is.
    pub fn monitor(&self, plain: bool) -> Result<PathBuf> {
        let ebb = Images::from_environment()?.ebb;
        if !plain {
            return Ok(ebb);
        }
        let ebb = ebb.display();
        let script = format!("#!/bin/sh\nset -e\n{WITHOUT_BALLOON}exec {ebb} \"$@\"\n");
        let path = self.folder.path().join("monitor");
        fs::write(&path, script).context(path.display())?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, mode).context(path.display())?;
        Ok(path)
    }

    /// The cgroup of a container, as its specification names it.
    pub fn cgroup_of(&self, name: &str) -> Result<String> {
        let own = self.cgroup.path().strip_prefix("/sys/fs/cgroup");
        let own = own.context("the node's cgroup")?;
        Ok(Path::new("/").join(own).join(name).display().to_string())
    }

    /// Bytes in use.
    pub fn used(&self) -> Result<u64> {
        self.cgroup.number("memory.current")
    }

    /// The most that was in use.
    pub fn peak(&self) -> Result<u64> {
        self.cgroup.number("memory.peak")
    }

    /// Processes that were killed for want of memory.
    pub fn oom_kills(&self) -> Result<u64> {
        let events = self.cgroup.text("memory.events")?;
        let count = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.context(format_args!("no oom_kill in {events:?}"))
    }

    /// Removes the cgroups of pods that have ended.
    pub fn clear(&self) -> Result<()> {
        let entries = fs::read_dir(self.cgroup.path()).context("the node's cgroup")?;
        for entry in entries.flatten().filter(|it| it.path().is_dir()) {
            let path = entry.path();
            let gone = || Ok::<_, Error>(fs::remove_dir(&path).is_ok().then_some(()));
            ebb_harness::wait::until(path.display(), ebb_harness::wait::LONG, gone)?;
        }
        Ok(())
    }
}

/// Takes the balloon out of the options, and adds that nothing is given back.
const WITHOUT_BALLOON: &str = "\
left=$#
while [ $left -gt 0 ]; do
    word=$1; shift; left=$((left - 1))
    case $word in
        --balloon) shift; left=$((left - 1)) ;;
        *) set -- \"$@\" \"$word\" ;;
    esac
done
set -- \"$@\" --lazy mode=off,free_pages=off
";
