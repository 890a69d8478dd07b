//! What the host's kernel offers besides KVM: memory pressure, huge pages, ways to free memory.

use std::fs;
use std::io;
use std::path::Path;

use super::{Check, Status, syscalls};
use crate::sys::Userfault;
use crate::sys::pagemap::PageMap;

/// There is a warning if less memory than this is available.
const LITTLE_MEMORY: u64 = 512 << 20;

/// All checks of this file.
pub(super) fn checks() -> Vec<Check> {
    vec![
        pressure(fs::read_to_string("/proc/pressure/memory")),
        cgroup(
            Path::new("/sys/fs/cgroup/cgroup.controllers"),
            Path::new("/proc/self/cgroup"),
        ),
        transparent_huge_pages(fs::read_to_string(
            "/sys/kernel/mm/transparent_hugepage/enabled",
        )),
        process_madvise(syscalls::process_madvise_self()),
        page_map(PageMap::open().and_then(|map| map.held(0, 4096))),
        process_mrelease(syscalls::has_process_mrelease()),
        available_memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        huge_pages(fs::read_to_string(
            "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
        )),
        userfaultfd(Userfault::open().map(drop)),
    ]
}

fn pressure(file: io::Result<String>) -> Check {
    let name = "memory pressure (PSI)";
    match file {
        Ok(text) if text.contains("some") => Check::ok(
            name,
            "/proc/pressure/memory tells when the host is short of memory",
        ),
        _ => Check::warn(
            name,
            "no /proc/pressure/memory: reclaim can only watch MemAvailable, and starts later",
            "boot the host with psi=1 (needs CONFIG_PSI)",
        ),
    }
}

fn cgroup(controllers: &Path, own: &Path) -> Check {
    let name = "cgroup";
    if let Ok(controllers) = fs::read_to_string(controllers) {
        if controllers.split_whitespace().any(|it| it == "memory") {
            return Check::ok(name, "version 2, with the memory controller");
        }
        return Check::warn(
            name,
            "version 2, without the memory controller: guests cannot be limited in memory",
            "boot the host without cgroup_disable=memory",
        );
    }
    let own = fs::read_to_string(own).unwrap_or_default();
    let v1_memory = own
        .lines()
        .filter_map(|line| line.split(':').nth(1))
        .any(|controllers| controllers.split(',').any(|it| it == "memory"));
    let found = if v1_memory {
        "the memory controller is of version 1, which reports no pressure of its own"
    } else {
        "no cgroup has a memory controller"
    };
    Check::warn(
        name,
        format!("{found}: reclaim watches the whole host"),
        "boot the host with systemd.unified_cgroup_hierarchy=1",
    )
}

fn transparent_huge_pages(file: io::Result<String>) -> Check {
    let name = "transparent huge pages";
    let text = file.unwrap_or_default();
    let setting = text.split('[').nth(1).and_then(|it| it.split(']').next());
    match setting {
        Some("always" | "madvise") => Check::ok(
            name,
            format!("{}: guests get them", setting.unwrap_or_default()),
        ),
        Some(setting) => Check::warn(
            name,
            format!("{setting}: guests get small pages only, and run slower"),
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        None => Check::warn(
            name,
            "the host's kernel has none: guests get small pages only, and run slower",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

fn process_madvise(probe: io::Result<()>) -> Check {
    let name = "process_madvise";
    match probe {
        Ok(()) => Check::ok(name, "many ranges can be discarded by one call"),
        Err(error) => Check::warn(
            name,
            format!("not for a process's own memory ({error}): one madvise per range is used"),
            "use Linux 6.13 or newer, if reclaim has to be as fast as possible",
        ),
    }
}

fn page_map(probe: io::Result<usize>) -> Check {
    let name = "PAGEMAP_SCAN";
    match probe {
        Ok(_) => Check::ok(
            name,
            "tells which free pages of a guest the host holds, and which are huge",
        ),
        Err(error) => Check::warn(
            name,
            format!("not there ({error}): free pages are taken in small pieces, and not from swap"),
            "use Linux 6.7 or newer",
        ),
    }
}

fn process_mrelease(there: bool) -> Check {
    let name = "process_mrelease";
    if there {
        return Check::ok(name, "a killed monitor's memory can be freed from outside");
    }
    Check::warn(
        name,
        "not there: a killed monitor's memory goes as fast as the kernel frees it",
        "use Linux 5.15 or newer, and a container that allows the call",
    )
}

fn available_memory(meminfo: &str) -> Check {
    let name = "available memory";
    let bytes = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib << 10);
    match bytes {
        Some(bytes) if bytes >= LITTLE_MEMORY => Check::ok(name, format!("{} MiB", bytes >> 20)),
        Some(bytes) => Check::warn(
            name,
            format!("{} MiB is little for a guest", bytes >> 20),
            "end what is not needed",
        ),
        None => Check::warn(
            name,
            "/proc/meminfo does not tell MemAvailable",
            "mount /proc",
        ),
    }
}

fn huge_pages(free: io::Result<String>) -> Check {
    let name = "hugetlb pages";
    match free.unwrap_or_default().trim() {
        "" => Check::ok(
            name,
            "none of 2 MiB on this host: hugepages=on cannot be used",
        ),
        "0" => Check::ok(
            name,
            "no free one; only for hugepages=on: sudo sysctl vm.nr_hugepages=NUMBER",
        ),
        free => Check::ok(name, format!("{free} of 2 MiB are free, for hugepages=on")),
    }
}

fn userfaultfd(probe: io::Result<()>) -> Check {
    let name = "userfaultfd";
    match probe {
        Ok(()) => Check::ok(name, "can be used, for --lazy strict=on"),
        // Only developers of guests need it, so its lack is no warning.
        Err(error) => Check {
            status: Status::Ok,
            ..Check::warn(
                name,
                format!("not for faults of the kernel ({error}): --lazy strict=on cannot be used"),
                "only for --lazy strict=on: run as root or with CAP_SYS_PTRACE, or \
                 sudo sysctl vm.unprivileged_userfaultfd=1, or give your user /dev/userfaultfd",
            )
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing() -> io::Result<String> {
        Err(io::ErrorKind::NotFound.into())
    }

    #[test]
    fn pressure_and_pages() {
        let text = Ok("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n".to_owned());
        assert_eq!(pressure(text).status, Status::Ok);
        assert_eq!(pressure(missing()).status, Status::Warn);
        for (text, status) in [
            ("always [madvise] never\n", Status::Ok),
            ("[always] madvise never\n", Status::Ok),
            ("always madvise [never]\n", Status::Warn),
        ] {
            assert_eq!(transparent_huge_pages(Ok(text.to_owned())).status, status);
        }
        assert_eq!(transparent_huge_pages(missing()).status, Status::Warn);
        assert!(huge_pages(Ok("12\n".to_owned())).detail.starts_with("12"));
        assert!(huge_pages(missing()).detail.starts_with("none"));
    }

    #[test]
    fn a_host_without_a_scan_of_pages_is_warned() {
        assert_eq!(page_map(Ok(0)).status, Status::Ok);
        let old = page_map(Err(io::Error::from_raw_os_error(libc::ENOTTY)));
        assert_eq!(old.status, Status::Warn);
    }

    #[test]
    fn a_host_without_userfaultfd_is_fine_and_is_told_what_to_do_for_strict_mode() {
        assert_eq!(userfaultfd(Ok(())).remedy, None);
        let check = userfaultfd(Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(check.status, Status::Ok);
        assert!(
            check
                .remedy
                .is_some_and(|it| it.contains("vm.unprivileged_userfaultfd=1"))
        );
    }

    #[test]
    fn memory() {
        let check = available_memory("MemTotal: 9 kB\nMemAvailable:   1048576 kB\n");
        assert_eq!(
            (check.status, check.detail.as_str()),
            (Status::Ok, "1024 MiB")
        );
        assert_eq!(available_memory("MemAvailable: 1 kB").status, Status::Warn);
        assert_eq!(available_memory("").status, Status::Warn);
    }

    #[test]
    fn cgroups_of_both_versions() {
        let folder = tempfile::TempDir::new().unwrap();
        let (controllers, own) = (folder.path().join("controllers"), folder.path().join("own"));
        fs::write(&own, "4:memory:/x\n0::/\n").unwrap();
        let check = cgroup(&controllers, &own);
        assert!(check.detail.contains("version 1"), "{check:?}");
        fs::write(&controllers, "cpu memory pids\n").unwrap();
        assert_eq!(cgroup(&controllers, &own).status, Status::Ok);
        fs::write(&controllers, "cpu\n").unwrap();
        assert_eq!(cgroup(&controllers, &own).status, Status::Warn);
    }
}
