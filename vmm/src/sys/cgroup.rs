//! The memory limits of this process's cgroup. Version 2: Documentation/admin-guide/cgroup-v2.rst; version 1, without
//! events: Documentation/admin-guide/cgroup-v1/memory.rst.

use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::KeptFile;

/// The file that says in which cgroups this process is.
const MEMBERSHIP: &str = "/proc/self/cgroup";

/// The cgroup of this process and its ancestors, as far as they control memory.
#[derive(Debug)]
pub struct Cgroup {
    membership: KeptFile,
    /// What that file said.
    member_of: String,
    pressure: Option<PathBuf>,
    /// The own cgroup, then its ancestors.
    levels: Vec<Level>,
}

/// One cgroup that controls memory.
#[derive(Debug)]
pub struct Level {
    id: u64,
    /// Files with limits.
    limits: Vec<KeptFile>,
    current: KeptFile,
    stat: KeptFile,
    /// The line of `stat` with cached files that were not needed for long.
    inactive: &'static str,
    events: Option<KeptFile>,
    /// How often a limit was reached, as `events` said last.
    reached: u64,
}

/// A memory limit, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The lower one of `memory.high` and `memory.max`, or `memory.limit_in_bytes` (version 1).
    pub limit: u64,
    /// The part of it that is not in use, or in use for cached files that were not needed for long (`inactive_file`).
    pub available: u64,
}

impl Cgroup {
    /// The cgroup in which this process is now.
    #[must_use]
    pub fn own() -> Self {
        let membership = KeptFile::open(Path::new(MEMBERSHIP));
        let member_of = membership.read(|text| Some(text.to_owned()));
        let member_of = member_of.unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let unified = own_folder(&member_of, &mounts, Version::Two);
        let pressure = unified.as_ref().map(|(point, path)| point.join(path));
        // The root's pressure is that of the host.
        let pressure = pressure.filter(|folder| folder.join("cgroup.type").exists());
        let levels = |folder: Option<(PathBuf, PathBuf)>, version| {
            let (point, path) = folder.unwrap_or_default();
            levels(&point, &path, version)
        };
        let mut found = levels(unified, Version::Two);
        if found.is_empty() {
            let folder = own_folder(&member_of, &mounts, Version::One);
            found = levels(folder, Version::One);
        }
        Self {
            membership,
            member_of,
            pressure: pressure.map(|folder| folder.join("memory.pressure")),
            levels: found,
        }
    }

    /// The cgroup `path` of version 2 below `point`, in which this process is not.
    #[cfg(test)]
    pub(crate) fn at(point: &Path, path: &str) -> Self {
        Self {
            member_of: "0::/elsewhere\n".into(),
            levels: levels(point, Path::new(path), Version::Two),
            ..Self::own()
        }
    }

    /// Returns false if the process has been moved since [`Cgroup::own`]. A cgroup is not removed before that.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let same = self.membership.read(|now| Some(now == self.member_of));
        same.unwrap_or(true)
    }

    /// The pressure file of the own cgroup (version 2).
    #[must_use]
    pub fn pressure_file(&self) -> Option<&Path> {
        self.pressure.as_deref()
    }

    /// The own cgroup, then its ancestors.
    #[must_use]
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// Looks where a limit was reached since it was last asked, and returns in how many cgroups. What cannot be read any
    /// more, because the cgroup is gone, is not watched any more: such a file polls for ever.
    pub fn take_events(&mut self) -> u64 {
        let levels = self.levels.iter_mut();
        levels.map(|level| u64::from(level.take_event())).sum()
    }
}

impl Level {
    fn open(folder: &Path, version: Version) -> Option<Self> {
        let open = |name| KeptFile::open(&folder.join(name));
        let id = fs::metadata(folder.join(version.current())).ok()?.ino();
        let mut level = match version {
            Version::Two => Self {
                id,
                limits: ["memory.high", "memory.max"].map(open).into(),
                current: open("memory.current"),
                stat: open("memory.stat"),
                inactive: "inactive_file ",
                // Not `memory.events`, which also counts the limits of cgroups below.
                events: Some(open("memory.events.local")),
                reached: 0,
            },
            Version::One => Self {
                id,
                limits: vec![open("memory.limit_in_bytes")],
                current: open("memory.usage_in_bytes"),
                stat: open("memory.stat"),
                inactive: "total_inactive_file ",
                events: None,
                reached: 0,
            },
        };
        level.take_event();
        Some(level)
    }

    /// A number that the cgroup has as long as it exists: that of the inode of a file in it.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Its present limit; `None` if it has none.
    #[must_use]
    pub fn limit(&self) -> Option<MemoryLimit> {
        let number = |file: &KeptFile| file.read(|text| text.trim().parse::<u64>().ok());
        let limits = self.limits.iter().filter_map(number);
        // No limit is "max", which is no number, or a number beyond all memory (version 1).
        let limit = limits.filter(|limit| *limit < 1 << 60).min()?;
        let inactive = self.stat.read(|stat| Some(self.inactive_file(stat)))?;
        let used = number(&self.current)?.saturating_sub(inactive);
        Some(MemoryLimit {
            limit,
            available: limit.saturating_sub(used),
        })
    }

    /// The descriptor that polls `POLLPRI` when a limit of this cgroup is reached.
    #[must_use]
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref()?.descriptor()
    }

    fn take_event(&mut self) -> bool {
        let Some(events) = &self.events else {
            return false;
        };
        let Some(reached) = events.read(|text| Some(reached(text))) else {
            self.events = None;
            return false;
        };
        std::mem::replace(&mut self.reached, reached) != reached
    }

    fn inactive_file(&self, stat: &str) -> u64 {
        field(stat, self.inactive).unwrap_or(0)
    }
}

/// How often a limit was reached, from the text of `memory.events.local`.
fn reached(events: &str) -> u64 {
    let counts = ["high ", "max "].map(|name| field(events, name).unwrap_or(0));
    counts[0].wrapping_add(counts[1])
}

/// The number after `name` in a text of such lines.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// The file with the memory in use, which each cgroup has that controls memory.
    const fn current(self) -> &'static str {
        match self {
            Self::One => "memory.usage_in_bytes",
            Self::Two => "memory.current",
        }
    }
}

/// The cgroup `path` below the mount point `point`, and those above it that control memory. Of those above the mount point
/// only files may be there.
fn levels(point: &Path, path: &Path, version: Version) -> Vec<Level> {
    let own = point.join(path);
    let current = version.current();
    // The root cgroup of version 2 has no such file.
    let folders = own
        .ancestors()
        .take_while(|folder| folder.join(current).exists());
    folders
        .map_while(|folder| Level::open(folder, version))
        .collect()
}

/// Where all cgroups of version 2 that this process may see are mounted, from `mounts` (/proc/self/mountinfo).
#[must_use]
pub fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/").then(|| point.into())
    })
}

/// Returns the mount point of the cgroups that may control memory, from `mounts` (/proc/self/mountinfo), and below it the
/// path of the cgroup that `cgroup` (/proc/self/cgroup) names.
fn own_folder(cgroup: &str, mounts: &str, version: Version) -> Option<(PathBuf, PathBuf)> {
    let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
    let path = cgroup.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let ours = match version {
            Version::One => has_memory(controllers),
            Version::Two => line.starts_with("0::"),
        };
        ours.then_some(path)
    })?;
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let ours = match version {
            Version::One => {
                let options = filesystem.rsplit(' ').next()?;
                filesystem.starts_with("cgroup ") && has_memory(options)
            }
            Version::Two => filesystem.starts_with("cgroup2 "),
        };
        // Only a part of the tree may be mounted, and the cgroup may be outside of it.
        let below = Path::new(path).strip_prefix(root).ok()?;
        ours.then(|| (point.into(), below.into()))
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
    fn the_own_cgroup_is_found_where_it_is_mounted() {
        let found = |cgroup, version| own_folder(cgroup, HYBRID, version);
        let text = "12:pids:/\n4:cpu,memory:/x\n0::/vms/one\n";
        assert_eq!(mount_point(HYBRID), Some("/sys/fs/cgroup/unified".into()));
        let two = ("/sys/fs/cgroup/unified".into(), "vms/one".into());
        assert_eq!(found(text, Version::Two), Some(two));
        let one = ("/sys/fs/cgroup/memory".into(), "x".into());
        assert_eq!(found(text, Version::One), Some(one));
        assert_eq!(found("4:memory:/x\n", Version::Two), None);
        assert_eq!(found("4:memories:/x\n0::/\nx\n", Version::One), None);
        let v1 = "30 31 0:32 / /m rw - cgroup cgroup rw,memory";
        assert_eq!(own_folder("0::/", v1, Version::Two), None);
        let v2 = "30 31 0:32 / /m rw - cgroup2 cgroup2 rw,memory";
        assert_eq!(own_folder("1:memory:/", v2, Version::One), None);
        // A container sees its own part of the tree.
        let bound = "30 31 0:32 /sub /m rw - cgroup2 cgroup2 rw";
        assert_eq!(own_folder("0::/", bound, Version::Two), None);
        let below = Some(("/m".into(), "a".into()));
        assert_eq!(own_folder("0::/sub/a", bound, Version::Two), below);
    }

    fn write(folder: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            fs::write(folder.join(format!("memory.{name}")), text).unwrap();
        }
    }

    const fn limit(limit: u64, available: u64) -> Option<MemoryLimit> {
        Some(MemoryLimit { limit, available })
    }

    #[test]
    fn limits_of_the_own_cgroup_and_of_those_above() {
        let root = tempfile::TempDir::new().unwrap();
        let above = root.path().join("vms");
        let own = above.join("one");
        fs::create_dir_all(&own).unwrap();
        let open = || levels(root.path(), Path::new("vms/one"), Version::Two);
        assert!(open().is_empty());
        let (high, max) = (("high", "max\n"), ("max", "max\n"));
        let stat = ("stat", "anon 5\nactive_file 7\ninactive_file 100\n");
        write(&own, &[high, max, ("current", "400\n"), stat]);
        assert_eq!(open().len(), 1);
        write(
            &above,
            &[
                ("high", "800\n"),
                ("max", "900\n"),
                ("current", "600\n"),
                stat,
            ],
        );
        let levels = open();
        let limits = || levels.iter().map(Level::limit).collect::<Vec<_>>();
        assert_eq!(limits(), [None, limit(800, 300)]);
        write(&own, &[("max", "250\n")]);
        assert_eq!(limits(), [limit(250, 0), limit(800, 300)]);
        let file = above.join("memory.current");
        assert_eq!(levels[1].id(), fs::metadata(file).unwrap().ino());
        // In a jail only the own cgroup is mounted, and the files of those above.
        let mounted = super::levels(&own, Path::new(""), Version::Two);
        assert_eq!(mounted.len(), 2);
    }

    #[test]
    fn limits_of_version_1_are_read_too_and_unlimited_is_a_large_number() {
        let root = tempfile::TempDir::new().unwrap();
        let own = root.path().join("one");
        fs::create_dir(&own).unwrap();
        let none = "9223372036854771712\n";
        let stat = ("stat", "inactive_file 1\ntotal_inactive_file 100\n");
        for folder in [root.path(), &own] {
            let files = [("limit_in_bytes", none), ("usage_in_bytes", "400\n"), stat];
            write(folder, &files);
        }
        let levels = levels(root.path(), Path::new("one"), Version::One);
        assert_eq!(levels.len(), 2);
        assert!(levels.iter().all(|level| level.events().is_none()));
        assert_eq!(levels[0].limit(), None);
        write(&own, &[("limit_in_bytes", "1000\n")]);
        assert_eq!(levels[0].limit(), limit(1000, 700));
    }

    #[test]
    fn events_are_limits_that_were_reached_since_the_last_look() {
        let root = tempfile::TempDir::new().unwrap();
        let own = root.path();
        let events = |high, max, oom| {
            let text = format!("low 3\nhigh {high}\nmax {max}\noom {oom}\n");
            write(own, &[("events.local", &text)]);
        };
        write(own, &[("current", "1")]);
        events(7, 2, 0);
        let mut cgroup = Cgroup::at(own, "");
        assert_eq!(cgroup.take_events(), 0, "that was before");
        events(8, 2, 0);
        assert_eq!((cgroup.take_events(), cgroup.take_events()), (1, 0));
        events(8, 3, 0);
        assert_eq!(cgroup.take_events(), 1);
        events(8, 3, 1);
        assert_eq!(cgroup.take_events(), 0, "no limit");
        assert!(cgroup.levels[0].events().is_some());
    }

    #[test]
    fn a_cgroup_that_is_gone_is_not_watched_any_more() {
        let root = tempfile::TempDir::new().unwrap();
        write(root.path(), &[("current", "1")]);
        // Reading a folder fails, as reading the file of a removed cgroup does.
        fs::create_dir(root.path().join("memory.events.local")).unwrap();
        let mut cgroup = Cgroup::at(root.path(), "");
        assert_eq!(cgroup.take_events(), 0);
        assert!(cgroup.levels[0].events().is_none());
    }

    #[test]
    fn a_process_that_was_moved_has_another_cgroup() {
        let mut cgroup = Cgroup::own();
        assert!(cgroup.is_current());
        cgroup.member_of.push('x');
        assert!(!cgroup.is_current());
        cgroup.membership = KeptFile::open(Path::new("/nowhere"));
        assert!(cgroup.is_current(), "nobody says so");
    }
}
