//! The machine's cgroup (Documentation/admin-guide/cgroup-v2.rst).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::JailError;
use super::plan::Plan;
use crate::config::JailCgroup;
use crate::sys::cgroup::mount_point;

/// How long the kernel may take to forget the processes of a cgroup that have ended.
const PATIENCE: Duration = Duration::from_secs(10);
const PERIOD: Duration = Duration::from_millis(10);
/// In microseconds, see `cpu.max`.
const CPU_PERIOD: u64 = 100_000;

/// A limit: the key that asks for it, the controller, its file, and what is written there.
type Limit = (&'static str, &'static str, &'static str, String);

/// The cgroup of one machine.
#[derive(Debug)]
pub(super) struct Group {
    /// Where cgroups are mounted.
    root: PathBuf,
    path: PathBuf,
}

impl Group {
    /// Makes it, empty and with its limits. One that is left of a machine which has ended is replaced.
    pub fn create(plan: &Plan) -> Result<Self, JailError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let root = mount_point(&mounts).ok_or(JailError::NoCgroups)?;
        let wanted = &plan.jail.cgroup;
        let limits = limits(wanted);
        let above = prepare(&root, &wanted.parent, &limits)?;
        let group = Self {
            path: above.join(&plan.id),
            root,
        };
        group.make()?;
        for (_, _, file, text) in &limits {
            group.write(file, text)?;
        }
        // A trigger of pressure is written there. A kernel without PSI has no such file.
        let pressure = group.path.join("memory.pressure");
        let _ = std::os::unix::fs::chown(&pressure, Some(plan.jail.uid), None);
        Ok(group)
    }

    fn make(&self) -> Result<(), JailError> {
        let failed = |source| JailError::Cgroup {
            path: self.path.clone(),
            source,
        };
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map_err(failed),
        }
        if !self.remove() {
            let path = self.path.clone();
            return Err(JailError::BusyCgroup { path });
        }
        fs::create_dir(&self.path).map_err(failed)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), JailError> {
        write(&self.path.join(file), text)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cgroups above it, but for the root, which has no limits.
    pub fn above(&self) -> impl Iterator<Item = &Path> {
        let all = self.path.ancestors().skip(1);
        all.take_while(|folder| *folder != self.root)
    }

    /// Moves the calling process into it.
    pub fn enter(&self) -> Result<(), JailError> {
        self.write("cgroup.procs", "0")
    }

    /// Removes it. Returns false if it has processes for longer than a moment.
    pub fn remove(&self) -> bool {
        let patience = Instant::now() + PATIENCE;
        loop {
            match fs::remove_dir(&self.path) {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < patience =>
                {
                    sleep(PERIOD);
                }
                removed => return removed.is_ok(),
            }
        }
    }
}

/// Makes the cgroup `parent` below `root`, and hands down the controllers that `limits` need. Returns its folder.
fn prepare(root: &Path, parent: &Path, limits: &[Limit]) -> Result<PathBuf, JailError> {
    let mut folder = root.to_owned();
    hand_down(&folder, limits)?;
    for name in parent.components() {
        let Component::Normal(name) = name else {
            return Err(JailError::Parent(parent.to_owned()));
        };
        folder.push(name);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(JailError::Cgroup {
                    path: folder,
                    source: error,
                });
            }
            _ => hand_down(&folder, limits)?,
        }
    }
    Ok(folder)
}

/// Lets the cgroups below `folder` have the controllers of `limits`.
fn hand_down(folder: &Path, limits: &[Limit]) -> Result<(), JailError> {
    let has = |file: &str, name: &str| {
        let list = fs::read_to_string(folder.join(file)).unwrap_or_default();
        list.split_whitespace().any(|it| it == name)
    };
    for (key, controller, ..) in limits {
        if has("cgroup.subtree_control", controller) {
            continue;
        }
        if !has("cgroup.controllers", controller) {
            return Err(JailError::NoController {
                key,
                controller,
                place: folder.to_owned(),
            });
        }
        write(
            &folder.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        )?;
    }
    Ok(())
}

fn limits(wanted: &JailCgroup) -> Vec<Limit> {
    let cpu = wanted.cpu_max.map(|percent| {
        let quota = u64::from(percent) * CPU_PERIOD / 100;
        format!("{quota} {CPU_PERIOD}")
    });
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    let all = [
        (
            "memory_high",
            "memory",
            "memory.high",
            number(wanted.memory_high),
        ),
        (
            "memory_max",
            "memory",
            "memory.max",
            number(wanted.memory_max),
        ),
        ("cpu_max", "cpu", "cpu.max", cpu),
        (
            "pids_max",
            "pids",
            "pids.max",
            number(wanted.pids_max.map(u64::from)),
        ),
    ];
    let all = all.into_iter();
    all.filter_map(|(key, controller, file, text)| Some((key, controller, file, text?)))
        .collect()
}

fn write(path: &Path, text: &str) -> Result<(), JailError> {
    let open = || -> io::Result<File> { OpenOptions::new().write(true).open(path) };
    let written = open().and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| JailError::Cgroup {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_keys;

    fn cgroup(text: &str) -> JailCgroup {
        parse_keys(text).unwrap()
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        assert_eq!(limits(&cgroup("parent=x")), []);
        let all = limits(&cgroup(
            "memory_high=1G,memory_max=2G,cpu_max=150,pids_max=64",
        ));
        let files: Vec<_> = all
            .iter()
            .map(|(_, _, file, text)| (*file, text.as_str()))
            .collect();
        let expected = [
            ("memory.high", "1073741824"),
            ("memory.max", "2147483648"),
            ("cpu.max", "150000 100000"),
            ("pids.max", "64"),
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn controllers_are_handed_down_or_missed() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::write(root.join("cgroup.controllers"), "cpu memory\n").unwrap();
        fs::write(root.join("cgroup.subtree_control"), "memory\n").unwrap();
        let limits = |text| limits(&cgroup(text));
        assert!(hand_down(root, &limits("memory_max=1G")).is_ok());
        assert!(hand_down(root, &limits("cpu_max=10")).is_ok());
        let control = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap();
        assert!(control.starts_with("+cpu"), "{control}");
        let error = hand_down(root, &limits("pids_max=9"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("pids_max=") && error.contains("leave the limit out"),
            "{error}"
        );
        for parent in ["/ebb", "../ebb", "a/../b"] {
            let error = prepare(root, Path::new(parent), &[]).unwrap_err();
            assert!(error.to_string().contains(parent), "{error}");
        }
        assert_eq!(
            prepare(root, Path::new("a/b"), &[]).unwrap(),
            root.join("a/b")
        );
    }
}
