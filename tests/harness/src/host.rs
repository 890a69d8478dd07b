//! What the host's kernel says of a process and its virtual machine.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// The name of the process that frees a monitor's memory.
pub const REAPER: &str = "ebb-reaper";

/// Where KVM keeps its counters.
const DEBUGFS: &str = "/sys/kernel/debug/kvm";

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).context(path)
}

/// Runs a program that must succeed, without input, and returns what it said.
///
/// # Errors
/// It cannot be started, or failed, with what it said.
pub fn succeeded(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.context(format_args!("{command:?}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{command:?}: {said}")))
}

/// Resident bytes of a process, counted page by page.
///
/// # Errors
/// When the process is gone.
pub fn rss(pid: u32) -> Result<u64> {
    in_all_mappings(pid, "Rss")
}

/// Those of them that no file stands behind.
///
/// # Errors
/// When the process is gone.
pub fn anonymous(pid: u32) -> Result<u64> {
    in_all_mappings(pid, "Anonymous")
}

/// Bytes that a process has changed and shares with no other: what it costs.
///
/// # Errors
/// When the process is gone.
pub fn own(pid: u32) -> Result<u64> {
    in_all_mappings(pid, "Private_Dirty")
}

fn in_all_mappings(pid: u32, name: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    field(&read(&path)?, name).context(format_args!("{path} has no {name}"))
}

/// What the threads of all monitors do, looked at twice, a second apart: whether a vCPU runs, waits or stands still. For the
/// messages of tests that wait in vain.
#[must_use]
pub fn monitors() -> String {
    let before = monitor_threads();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let after = monitor_threads();
    after
        .iter()
        .fold(String::new(), |mut text, (path, thread)| {
            let earlier = before.get(path).map(|thread| thread.ticks);
            let Thread {
                name,
                state,
                wait,
                ticks,
            } = thread;
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "\n    {path} {name}: {state}, in {wait}, ticks {earlier:?} then {ticks}"
            );
            text
        })
}

/// A thread as the kernel sees it.
struct Thread {
    name: String,
    state: String,
    /// The kernel's function that it waits in; 0 while it runs.
    wait: String,
    /// Clock ticks that it has run.
    ticks: u64,
}

/// The processes of this name.
pub fn processes_named(name: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = entries.filter(|entry| {
        // It may end at any time.
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        comm.trim_end() == name
    });
    named
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// A process of a machine: its monitor, or a helper of that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relative {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// The living processes of the machines whose files are in `folder`, by name: those whose command line has its path.
/// A dead process has no command line.
///
/// # Errors
/// When /proc cannot be read.
pub fn relatives(folder: &Path) -> Result<Vec<Relative>> {
    let folder = folder.as_os_str().as_encoded_bytes();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let entry = entry.context("/proc")?;
        let Some(pid) = entry.file_name().to_str().and_then(|it| it.parse().ok()) else {
            continue;
        };
        // A process may end at any time.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && line.windows(folder.len()).any(|part| part == folder) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(Relative {
                pid,
                name: name.trim().to_owned(),
            });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Resident bytes of the machines whose files are in `folder`, by the kernel's running counts. A monitor shares its memory
/// with the helper that frees it, so the largest process counts; 0 when none is left.
pub fn machine_rss(folder: &Path) -> u64 {
    let processes = relatives(folder).unwrap_or_default();
    // Each may end at any time.
    let resident = processes
        .iter()
        .filter_map(|process| rss_estimate(process.pid).ok());
    resident.max().unwrap_or(0)
}

/// The threads of the processes named ebb, by their folder in /proc.
fn monitor_threads() -> BTreeMap<String, Thread> {
    let folders = |path: &str| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let text = |path: PathBuf| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let monitors = folders("/proc")
        .into_iter()
        .filter(|folder| text(folder.join("comm")) == "ebb");
    let threads = monitors.flat_map(|folder| folders(&folder.join("task").to_string_lossy()));
    threads
        .map(|folder| {
            let stat = text(folder.join("stat"));
            let fields: Vec<&str> = stat
                .rsplit_once(") ")
                .map_or(Vec::new(), |(_, rest)| rest.split(' ').collect());
            let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
            let thread = Thread {
                name: text(folder.join("comm")),
                state: fields.first().copied().unwrap_or_default().to_owned(),
                wait: text(folder.join("wchan")),
                // utime and stime, see proc_pid_stat(5).
                ticks: number(11).unwrap_or(0) + number(12).unwrap_or(0),
            };
            (folder.display().to_string(), thread)
        })
        .collect()
}

/// Resident bytes of a process that the kernel may drop when it is short of memory (`MADV_FREE`).
///
/// # Errors
/// When the process is gone.
pub fn lazy_free(pid: u32) -> Result<u64> {
    in_all_mappings(pid, "LazyFree")
}

/// A field of /proc/meminfo: bytes, or a count where it has no unit.
///
/// # Errors
/// When there is no such field.
pub fn meminfo(name: &str) -> Result<u64> {
    const PATH: &str = "/proc/meminfo";
    let text = read(PATH)?;
    field(&text, name).context(format_args!("{PATH} has no {name}"))
}

/// Page faults of a process that needed no disk.
///
/// # Errors
/// When the process is gone.
pub fn minor_faults(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = read(&path)?;
    // The second field is the program's name in parentheses, which may hold anything.
    let count = text
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(7)?.parse().ok());
    count.context(format_args!("{path}: {text:?}"))
}

/// Resident bytes of a process by the kernel's running count: cheap, and a little behind.
///
/// # Errors
/// When the process is gone.
pub fn rss_estimate(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let text = read(&path)?;
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    let page = rustix::param::page_size() as u64;
    pages
        .map(|pages| pages * page)
        .context(format_args!("{path}: {text:?}"))
}

/// Resident bytes of a process beside its guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overhead {
    /// Memory that this process alone has.
    pub own: u64,
    /// Unchanged pages of its program and libraries, which all processes of the same program share.
    pub shared: u64,
}

/// Resident bytes of everything in a process but its guest's memory, which are the anonymous mappings of
/// `guest_bytes` in all.
///
/// # Errors
/// When the process is gone, or no such mappings are found.
pub fn overhead(pid: u32, guest_bytes: u64) -> Result<Overhead> {
    let path = format!("/proc/{pid}/smaps");
    beside_guest(&mappings(&read(&path)?), guest_bytes).context(format_args!(
        "{path} has no mapping for {guest_bytes} bytes of guest memory"
    ))
}

/// Where the guest's memory lies in a process: anonymous mappings of `guest_bytes` in all.
///
/// # Errors
/// When the process is gone, or no such mappings are found.
pub fn guest_memory(pid: u32, guest_bytes: u64) -> Result<Vec<Range<u64>>> {
    let path = format!("/proc/{pid}/smaps");
    let mappings = mappings(&read(&path)?);
    let (guest, _) = split_guest(&mappings, guest_bytes).context(format_args!(
        "{path} has no mapping for {guest_bytes} bytes of guest memory"
    ))?;
    Ok(guest.iter().map(|m| m.start..m.start + m.size).collect())
}

/// One mapping of a process.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    anonymous: bool,
    size: u64,
    rss: u64,
    /// The part of `rss` that is unchanged pages of a program or a library.
    shared: u64,
}

impl Mapping {
    /// A mapping's part of /proc/PID/smaps.
    fn new(part: &str) -> Self {
        let head = part.lines().next().unwrap_or_default();
        let words: Vec<&str> = head.split_whitespace().collect();
        let bytes = |name| field(part, name).unwrap_or(0);
        let code = words.len() == 6 && words[5].starts_with('/') && !words[5].starts_with("/dev/");
        Self {
            start: start(part),
            anonymous: words.len() == 5,
            size: bytes("Size"),
            rss: bytes("Rss"),
            shared: u64::from(code) * (bytes("Rss") - bytes("Anonymous")),
        }
    }
}

/// The mappings of /proc/PID/smaps.
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut part = String::new();
    // A mapping's first line starts with its address, the others with a name and a colon.
    for line in smaps.lines().chain(["0-0 end"]) {
        let is_head = line
            .split(' ')
            .next()
            .is_some_and(|word| !word.ends_with(':'));
        if is_head && !part.is_empty() {
            found.push(Mapping::new(&part));
            part.clear();
        }
        part.push_str(line);
        part.push('\n');
    }
    found
}

/// The address that a mapping's part of /proc/PID/smaps starts with.
fn start(part: &str) -> u64 {
    let digits = part.split('-').next().unwrap_or_default();
    u64::from_str_radix(digits, 16).unwrap_or(0)
}

/// Resident bytes outside of the guest's memory.
fn beside_guest(mappings: &[Mapping], guest_bytes: u64) -> Option<Overhead> {
    let (_, others) = split_guest(mappings, guest_bytes)?;
    let shared = others.iter().map(|mapping| mapping.shared).sum();
    let rss: u64 = others.iter().map(|mapping| mapping.rss).sum();
    let own = rss - shared;
    Some(Overhead { own, shared })
}

/// The guest's memory, and the rest: the largest anonymous mapping that is not larger than the guest's is
/// the guest's, and so on until all of it is found.
fn split_guest(mappings: &[Mapping], guest_bytes: u64) -> Option<(Vec<&Mapping>, Vec<&Mapping>)> {
    let mut sorted: Vec<&Mapping> = mappings.iter().collect();
    sorted.sort_by_key(|mapping| std::cmp::Reverse(mapping.size));
    let mut left = guest_bytes;
    let (guest, others) = sorted.into_iter().partition(|mapping| {
        let guest = mapping.anonymous && mapping.size <= left && mapping.size >= 1 << 20;
        if guest {
            left -= mapping.size;
        }
        guest
    });
    (left == 0).then_some((guest, others))
}

/// The bytes of a line `Name:  123 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
        .trim();
    match value.strip_suffix(" kB") {
        Some(kib) => Some(kib.parse::<u64>().ok()? * 1024),
        None => value.parse().ok(),
    }
}

/// KVM's own counters for one virtual machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmCounters {
    /// Flushes that were sent to vCPUs.
    pub remote_tlb_flush: u64,
    /// Flushes that were asked for.
    pub remote_tlb_flush_requests: u64,
    /// Exits of all vCPUs.
    pub exits: u64,
}

/// Reads KVM's counters for the machine of a process.
///
/// # Errors
/// When debugfs is not there or not readable, or the process has no machine.
pub fn kvm_counters(pid: u32) -> Result<KvmCounters> {
    let folder = kvm_folder(pid)?;
    let count = |name: &str| {
        let path = folder.join(name);
        let text = fs::read_to_string(&path).context(path.display())?;
        text.trim().parse().context(path.display())
    };
    Ok(KvmCounters {
        remote_tlb_flush: count("remote_tlb_flush")?,
        remote_tlb_flush_requests: count("remote_tlb_flush_requests")?,
        exits: count("exits")?,
    })
}

/// How many pages of 4 KiB and of 2 MiB KVM maps into the machine of a process just now.
///
/// # Errors
/// As for [`kvm_counters`].
pub fn kvm_pages(pid: u32) -> Result<(u64, u64)> {
    let folder = kvm_folder(pid)?;
    let count = |name: &str| {
        let path = folder.join(name);
        let text = fs::read_to_string(&path).context(path.display())?;
        text.trim().parse().context(path.display())
    };
    Ok((count("pages_4k")?, count("pages_2m")?))
}

fn kvm_folder(pid: u32) -> Result<PathBuf> {
    let entries = fs::read_dir(DEBUGFS).context(format_args!(
        "{DEBUGFS}: mount debugfs and run the tests as root"
    ))?;
    let prefix = format!("{pid}-");
    let mut entries = entries.filter_map(|entry| Some(entry.ok()?.path()));
    entries
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        })
        .ok_or_else(|| Error::new(format!("{DEBUGFS} has no machine of process {pid}")))
}

/// The names of a process's threads, without the kernel's own among them: those for its io_uring come and go as it likes, and
/// that for huge pages of its machine is there from the moment that a vCPU first runs.
///
/// # Errors
/// When the process is gone.
pub fn threads(pid: u32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/task");
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).context(&path)? {
        let comm = entry.context(&path)?.path().join("comm");
        // A thread may end at any time.
        names.extend(fs::read_to_string(comm).map(|name| name.trim().to_owned()));
    }
    names.retain(|name| !name.starts_with("iou-wrk-") && !name.starts_with("kvm-nx-lpage"));
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0-55e0 r-xp 00000000 fe:01 123   /bin/ebb
Size:               2048 kB
Rss:                 700 kB
Anonymous:             8 kB
VmFlags: rd ex
7f00-7f80 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               90000 kB
7f90-7fa0 rw-p 00000000 00:00 0          [heap]
Size:                132 kB
Rss:                  40 kB
";

    #[test]
    fn mappings_of_smaps() {
        let found = mappings(SMAPS);
        assert_eq!(found.len(), 3);
        let ram = Mapping {
            start: 0x7f00,
            anonymous: true,
            size: 128 << 20,
            rss: 90_000 << 10,
            shared: 0,
        };
        assert_eq!(found[1], ram);
        assert!(!found[0].anonymous && !found[2].anonymous);
    }

    #[test]
    fn overhead_is_what_the_guest_does_not_account_for() {
        let found = mappings(SMAPS);
        let overhead = Overhead {
            own: 48 << 10,
            shared: 692 << 10,
        };
        assert_eq!(beside_guest(&found, 128 << 20), Some(overhead));
        assert_eq!(beside_guest(&found, 256 << 20), None);
    }

    #[test]
    fn this_process_has_memory_and_threads() {
        let pid = std::process::id();
        assert!(rss(pid).unwrap() > 1 << 20 && rss_estimate(pid).unwrap() > 1 << 20);
        assert!(lazy_free(pid).is_ok() && minor_faults(pid).unwrap() > 10);
        assert!(!threads(pid).unwrap().is_empty());
        assert!(kvm_counters(pid).is_err());
    }
}
