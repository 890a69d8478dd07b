//! What `ebb jail` and the filters of system calls can have here.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;

use super::{Check, Status, syscalls};
use crate::sys::cgroup::mount_point;
use crate::sys::mounts::{Access, Tree};
use crate::sys::{privileges, seccomp};

/// Controllers that a jail's limits need.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// The newest version of Landlock's interface that is used (Linux 6.12).
const LANDLOCK: i64 = 6;

/// All checks of this file.
pub(super) fn checks() -> Vec<Check> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    vec![
        namespaces(rustix::process::geteuid().is_root(), leave_host()),
        cgroups(mount_point(&mounts).as_deref()),
        landlock(syscalls::landlock_version()),
        filters(seccomp::is_available(seccomp::Mode::On)),
    ]
}

/// Leaves the host in a thread, as a jail does, and ends it.
fn leave_host() -> io::Result<()> {
    let probe = || {
        privileges::give_children_own_pids()?;
        privileges::leave_host()?;
        Tree::of(Path::new("/"), Access::Read).map(drop)
    };
    let ended = thread::Builder::new().spawn(probe)?.join();
    ended.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

fn namespaces(is_root: bool, probe: io::Result<()>) -> Check {
    let name = "jail: namespaces";
    match probe {
        Ok(()) => Check::ok(
            name,
            "mounts, processes, network: a machine can have its own",
        ),
        // Who does not want a jail needs no root.
        Err(_) if !is_root => Check {
            status: Status::Ok,
            ..Check::warn(
                name,
                "ebb jail needs root",
                "only for ebb jail: start it as root; the monitor in it has no privileges",
            )
        },
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Check::warn(
            name,
            "no open_tree(2) and mount_setattr(2): ebb jail cannot be used",
            "use Linux 5.12 or newer",
        ),
        Err(error) => Check::warn(
            name,
            format!("not to be had ({error}): ebb jail cannot be used"),
            "run it outside of containers, or in one with CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN)",
        ),
    }
}

fn cgroups(mounted: Option<&Path>) -> Check {
    let name = "jail: cgroup";
    let remedy = "boot the host with systemd.unified_cgroup_hierarchy=1";
    let Some(mounted) = mounted else {
        return Check::warn(name, "none of version 2: ebb jail cannot be used", remedy);
    };
    let text = fs::read_to_string(mounted.join("cgroup.controllers")).unwrap_or_default();
    let has = |wanted: &&str| text.split_whitespace().any(|it| it == *wanted);
    let (there, missing): (Vec<&str>, Vec<&str>) = CONTROLLERS.into_iter().partition(has);
    if missing.is_empty() {
        let there = there.join(", ");
        return Check::ok(
            name,
            format!("{}, with limits of {there}", mounted.display()),
        );
    }
    let missing = missing.join(", ");
    Check::warn(name, format!("no limits of {missing} for a jail"), remedy)
}

fn landlock(version: io::Result<i64>) -> Check {
    let name = "jail: Landlock";
    match version {
        Ok(version) => Check::ok(
            name,
            format!("version {version}; up to version {LANDLOCK} is used"),
        ),
        Err(error) => Check::warn(
            name,
            format!("not there ({error}): a jail goes without this second belt"),
            "use Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, and landlock in the kernel's lsm=",
        ),
    }
}

fn filters(probe: io::Result<()>) -> Check {
    let name = "seccomp";
    match probe {
        Ok(()) => Check::ok(
            name,
            "threads can be kept from system calls they do not need",
        ),
        Err(error) => Check::warn(
            name,
            format!("no such filters ({error}): start machines with --seccomp off"),
            "use Linux 4.14 or newer with CONFIG_SECCOMP_FILTER",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn a_jail_is_only_missed_where_there_could_be_one() {
        assert_eq!(namespaces(true, Ok(())).status, Status::Ok);
        let unprivileged = namespaces(false, Err(error(libc::EPERM)));
        assert_eq!(unprivileged.status, Status::Ok);
        assert!(unprivileged.remedy.is_some());
        assert_eq!(
            namespaces(true, Err(error(libc::EPERM))).status,
            Status::Warn
        );
        let old = namespaces(true, Err(error(libc::ENOSYS)));
        assert!(old.remedy.is_some_and(|it| it.contains("5.12")));
    }

    #[test]
    fn what_limits_a_jail_can_have() {
        assert_eq!(cgroups(None).status, Status::Warn);
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("cgroup.controllers");
        fs::write(&file, "cpuset cpu memory pids\n").unwrap();
        assert_eq!(cgroups(Some(folder.path())).status, Status::Ok);
        fs::write(&file, "cpu\n").unwrap();
        let check = cgroups(Some(folder.path()));
        assert!(check.detail.contains("memory, pids"), "{check:?}");
    }

    #[test]
    fn a_kernel_without_a_belt_is_told_of() {
        assert!(landlock(Ok(4)).detail.contains("version 4"));
        assert_eq!(landlock(Err(error(libc::EOPNOTSUPP))).status, Status::Warn);
        assert_eq!(filters(Err(error(libc::EINVAL))).status, Status::Warn);
        assert_eq!(filters(Ok(())).status, Status::Ok);
    }
}
