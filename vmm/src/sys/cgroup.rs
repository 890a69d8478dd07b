//! The memory limits of this process's cgroup, version 2 (Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::path::{Path, PathBuf};

use super::KeptFile;

/// The cgroup of this process and its ancestors, as far as they control memory. If the process is moved later, this stays
/// the old cgroup.
#[derive(Debug)]
pub struct Cgroup {
    /// Folder of the process's own cgroup.
    folder: PathBuf,
    /// Files of the own cgroup, then of its ancestors; not empty.
    files: Vec<Files>,
}

/// The files of one cgroup.
#[derive(Debug)]
struct Files {
    high: KeptFile,
    max: KeptFile,
    current: KeptFile,
    stat: KeptFile,
}

/// A memory limit, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The lower one of `memory.high` and `memory.max`.
    pub limit: u64,
    /// The part of it that is not in use, or in use for cached files that were not needed for long (`inactive_file`).
    pub available: u64,
}

impl Cgroup {
    /// The cgroup of this process. `None` if no cgroup of version 2 controls its memory.
    #[must_use]
    pub fn own() -> Option<Self> {
        let cgroup = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let (point, path) = own_folder(&cgroup, &mounts)?;
        Self::at(&point, &path)
    }

    /// The cgroup `path` below the mount point `point`.
    fn at(point: &Path, path: &Path) -> Option<Self> {
        let own = point.join(path);
        let controlled = |folder: &&Path| folder.join("memory.current").exists();
        // The root cgroup has no such file; nor has the root of a cgroup namespace.
        let folders = own
            .ancestors()
            .take_while(|folder| folder.starts_with(point));
        let files: Vec<_> = folders.take_while(controlled).map(Files::open).collect();
        (!files.is_empty()).then_some(Self { folder: own, files })
    }

    /// The pressure file of the own cgroup.
    #[must_use]
    pub fn pressure_file(&self) -> PathBuf {
        self.folder.join("memory.pressure")
    }

    /// The present limits, those of the own cgroup first.
    pub fn limits(&self) -> impl Iterator<Item = MemoryLimit> {
        self.files.iter().filter_map(Files::limit)
    }
}

impl Files {
    fn open(folder: &Path) -> Self {
        let open = |name| KeptFile::open(&folder.join(name));
        Self {
            high: open("memory.high"),
            max: open("memory.max"),
            current: open("memory.current"),
            stat: open("memory.stat"),
        }
    }

    fn limit(&self) -> Option<MemoryLimit> {
        // "max" is not a number and means no limit.
        let number = |file: &KeptFile| file.read(|text| text.trim().parse::<u64>().ok());
        let limits = number(&self.high).into_iter().chain(number(&self.max));
        let limit = limits.min()?;
        let inactive = self.stat.read(|stat| Some(inactive_file(stat)))?;
        let used = number(&self.current)?.saturating_sub(inactive);
        Some(MemoryLimit {
            limit,
            available: limit.saturating_sub(used),
        })
    }
}

fn inactive_file(stat: &str) -> u64 {
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    line.and_then(|bytes| bytes.trim().parse().ok())
        .unwrap_or(0)
}

/// Returns the mount point of cgroups of version 2, from `mounts` (/proc/self/mountinfo), and below it the path of the
/// cgroup that `cgroup` (/proc/self/cgroup) names.
fn own_folder(cgroup: &str, mounts: &str) -> Option<(PathBuf, PathBuf)> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // If another cgroup than the namespace's root is mounted there, the path is relative to something else.
        (root == "/" && filesystem.starts_with("cgroup2 ")).then(|| (point.into(), path.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
";

    #[test]
    fn the_own_cgroup_is_found_under_the_unified_mount() {
        let found = |cgroup| own_folder(cgroup, HYBRID);
        let want = ("/sys/fs/cgroup/unified".into(), "vms/one".into());
        assert_eq!(found("4:memory:/x\n0::/vms/one\n"), Some(want));
        assert_eq!(found("4:memory:/x\n"), None);
        let v1 = "30 31 0:32 / /m rw - cgroup cgroup rw";
        assert_eq!(own_folder("0::/", v1), None);
        let bound = "30 31 0:32 /sub /m rw - cgroup2 cgroup2 rw";
        assert_eq!(own_folder("0::/", bound), None);
    }

    #[test]
    fn limits_of_the_own_cgroup_and_of_those_above() {
        let root = tempfile::TempDir::new().unwrap();
        let own = root.path().join("vms/one");
        fs::create_dir_all(&own).unwrap();
        assert!(Cgroup::at(root.path(), Path::new("vms/one")).is_none());
        let write = |folder: &Path, files: [(&str, &str); 4]| {
            for (name, text) in files {
                fs::write(folder.join(format!("memory.{name}")), text).unwrap();
            }
        };
        let (high, max) = (("high", "max\n"), ("max", "max\n"));
        let stat = ("stat", "anon 5\nactive_file 7\ninactive_file 100\n");
        write(&own, [high, max, ("current", "400\n"), stat]);
        write(
            &root.path().join("vms"),
            [
                ("high", "800\n"),
                ("max", "900\n"),
                ("current", "600\n"),
                stat,
            ],
        );
        let cgroup = Cgroup::at(root.path(), Path::new("vms/one")).unwrap();
        let limit = |limit, available| MemoryLimit { limit, available };
        let limits = || cgroup.limits().collect::<Vec<_>>();
        assert_eq!(limits(), [limit(800, 300)]);
        write(
            &own,
            [
                ("high", "max\n"),
                ("max", "250\n"),
                ("current", "400\n"),
                stat,
            ],
        );
        assert_eq!(limits(), [limit(250, 0), limit(800, 300)]);
        assert!(cgroup.pressure_file().ends_with("vms/one/memory.pressure"));
    }
}
