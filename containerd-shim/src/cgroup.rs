//! The cgroup of a pod's machine on the host: the one that containerd names for the pod's first container. So limits and counts of
//! the pod hold for its machine, and the monitor sees how short of memory the pod is. Cgroups of version 2 only.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use ebb_pod::error::{Context, Error, Result};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where the cgroups are.
const MOUNT: &str = "/sys/fs/cgroup";

/// How long the processes that free a machine's memory may stay in its cgroup.
const PATIENCE: Duration = Duration::from_secs(60);

/// The cgroup that the specification names, if it names one and the host has cgroups of version 2.
///
/// # Errors
/// It does not name a cgroup below all.
pub fn named(spec: &Spec) -> Result<Option<PathBuf>> {
    let linux = spec.linux().as_ref();
    let name = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let Some(name) = name.filter(|_| Path::new(MOUNT).join("cgroup.controllers").exists()) else {
        return Ok(None);
    };
    let path = below(name).context(format_args!(
        "cgroupsPath {}: write a path, or SLICE:PREFIX:NAME",
        name.display()
    ))?;
    Ok(Some(Path::new(MOUNT).join(path)))
}

/// The path below all cgroups that a specification's word means: a path, or the three words of systemd's unit.
fn below(name: &Path) -> Option<PathBuf> {
    let text = name.to_str()?;
    let words: Vec<&str> = text.split(':').collect();
    let path = match words[..] {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, "", name] => slices(slice)?.join(format!("{name}.scope")),
        [slice, prefix, name] => slices(slice)?.join(format!("{prefix}-{name}.scope")),
        _ => return None,
    };
    let mut parts = path.components();
    let plain = parts.all(|part| matches!(part, Component::Normal(_)));
    (plain && path.parent().is_some()).then_some(path)
}

/// The folder of a slice: `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slices(slice: &str) -> Option<PathBuf> {
    let words = slice.strip_suffix(".slice")?;
    if words == "-" {
        return Some(PathBuf::new());
    }
    let ends = words.match_indices('-').map(|(at, _)| at);
    let folders = ends
        .chain([words.len()])
        .map(|end| format!("{}.slice", &words[..end]));
    Some(folders.collect())
}

/// Starts a program in the cgroup, which is made where it is absent: this program goes there, and back when `start` is done.
///
/// # Errors
/// This program may not go there; what `start` returns.
pub fn within<T>(cgroup: &Path, start: impl FnOnce() -> Result<T>) -> Result<T> {
    make(cgroup)?;
    let own = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = Path::new(MOUNT).join(own.context("this program's cgroup")?);
    join(cgroup)?;
    let started = start();
    if let Err(error) = join(&own) {
        eprintln!("go back to the own cgroup: {error}");
    }
    started
}

/// Makes it, and counts its memory where those above it let us.
fn make(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup).context(cgroup.display())?;
    let above: Vec<&Path> = cgroup.ancestors().skip(1).collect();
    for folder in above.into_iter().rev() {
        if folder.starts_with(MOUNT) {
            let _ = fs::write(folder.join("cgroup.subtree_control"), "+memory");
        }
    }
    Ok(())
}

fn join(cgroup: &Path) -> Result<()> {
    let processes = cgroup.join("cgroup.procs");
    fs::write(&processes, std::process::id().to_string()).context(processes.display())
}

/// Kills all that is in it. It may be gone.
pub fn kill(cgroup: &Path) {
    let file = cgroup.join("cgroup.kill");
    if let Err(error) = fs::write(&file, "1") {
        eprintln!("{}: {error}", file.display());
    }
}

/// Removes it once the machine's last process has left. It may be gone.
pub fn remove(cgroup: &Path) {
    let removed = empty(cgroup).and_then(|()| fs::remove_dir(cgroup).context(cgroup.display()));
    if let Err(error) = removed
        && cgroup.exists()
    {
        eprintln!("remove a cgroup: {error}");
    }
}

/// Waits until no process is in it.
fn empty(cgroup: &Path) -> Result<()> {
    let events = cgroup.join("cgroup.events");
    let what = || events.display();
    let mut file = File::open(&events).context(what())?;
    let end = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        file.rewind().context(what())?;
        file.read_to_string(&mut text).context(what())?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(format!("{}: it has processes", what())));
        }
        let left = Timespec::try_from(left).context(what())?;
        let mut change = [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)];
        poll(&mut change, Some(&left)).context(what())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_a_unit_of_systemd_name_a_cgroup_and_nothing_else_does() {
        let below = |name: &str| below(Path::new(name)).map(|it| it.display().to_string());
        let some = |path: &str| Some(path.to_owned());
        assert_eq!(below("/default/one"), some("default/one"));
        assert_eq!(
            below("kubepods-burstable-pod7.slice:cri-containerd:ab"),
            some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/cri-containerd-ab.scope"
            )
        );
        assert_eq!(below("-.slice::ab"), some("ab.scope"));
        for bad in [
            "",
            "/",
            "/a/../b",
            "a:b",
            "a:b:c",
            "a.slice:b:c:d",
            "a.slice:../b:c",
        ] {
            assert_eq!(below(bad), None, "{bad}");
        }
    }
}
