//! The machines of this host: found by their processes, and asked over their sockets. Nothing is kept anywhere: what /proc
//! shows to the caller is what there is. Whoever calls itself `ebb` may answer anything or nothing, so all is bounded.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hyper::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::client::{ClientError, request};
use crate::control::{
    BalloonState, BalloonStatistics, InstanceInfo, InstanceState, LazyMemoryState,
};

/// What the main thread of a monitor may be called.
const NAMES: [&str; 2] = ["ebb", "firecracker"];
/// Subcommands that are machines.
const COMMANDS: [&str; 3] = ["run", "restore", "firecracker"];
/// Time that a machine has for an answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Machines that are asked at the same time.
const ASKED_AT_ONCE: usize = 16;
/// No file of /proc is read further.
const MAX_READ: u64 = 16 << 20;
/// Descriptors of a process that are looked at.
const MAX_DESCRIPTORS: usize = 4096;
/// Sockets of a process that are asked. A monitor listens on two, the API's and the vsock's.
const MAX_SOCKETS: usize = 4;
/// In the flags of a socket in `/proc/net/unix`: it listens (`__SO_ACCEPTCON`, include/linux/net.h).
const LISTENS: u32 = 0x10000;

/// The process of a monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Bytes of its memory that are resident, the guest's included.
    pub resident_bytes: u64,
    /// The sockets on which it listens.
    pub sockets: Vec<PathBuf>,
}

/// A machine, as far as it answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The monitor's process id.
    pub pid: u32,
    /// Bytes of the monitor's memory that are resident, the guest's included.
    pub resident_bytes: u64,
    /// Bytes of the guest's RAM.
    pub memory_bytes: Option<u64>,
    /// The API's socket.
    pub socket: Option<PathBuf>,
    /// Why there is no more than that.
    pub trouble: Option<String>,
    /// Its name, state and age.
    pub info: Option<InstanceInfo>,
    /// Its lazily free memory.
    pub lazy_memory: Option<LazyMemoryState>,
    /// Its balloon.
    pub balloon: Option<BalloonState>,
    /// What its guest says.
    pub statistics: Option<BalloonStatistics>,
}

/// What `ebb top` is told. Its own program reads it again.
#[derive(Clone, Debug, clap::Args)]
pub struct ViewOptions {
    /// Only these machines, by the process ids of their monitors; all by default
    #[arg(value_name = "PID")]
    pub pids: Vec<u32>,
    /// Print one picture, with the rates of one interval, and end
    #[arg(long)]
    pub once: bool,
    /// Print one JSON list instead, as `ebb ps --json`
    #[arg(long, requires = "once")]
    pub json: bool,
    /// Seconds between two looks, 1 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

impl ViewOptions {
    /// Time between two looks.
    #[must_use]
    pub const fn interval(&self) -> Duration {
        Duration::from_secs(self.interval)
    }
}

/// How much is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Name and state.
    Name,
    /// Everything in [`Machine`].
    All,
}

/// The monitors among the processes under `proc`, which is `/proc`, by their ids. Those of other users are seen by root only.
///
/// # Errors
/// readdir(3)'s.
pub fn processes(proc: &Path) -> io::Result<Vec<Process>> {
    let own = std::process::id();
    let pids = fs::read_dir(proc)?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut pids: Vec<u32> = pids.filter(|pid| *pid != own).collect();
    pids.sort_unstable();
    Ok(pids
        .into_iter()
        .filter_map(|pid| process(proc, pid))
        .collect())
}

fn process(proc: &Path, pid: u32) -> Option<Process> {
    let folder = proc.join(pid.to_string());
    if !NAMES.contains(&read(&folder.join("comm"))?.trim_end()) {
        return None;
    }
    let sockets = sockets(&folder);
    let words = read(&folder.join("cmdline")).unwrap_or_default();
    let command = words.split('\0').nth(1).unwrap_or_default();
    if sockets.is_empty() && !COMMANDS.contains(&command) {
        return None;
    }
    let status = read(&folder.join("status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Some(Process {
        pid,
        resident_bytes: kib.unwrap_or_default().saturating_mul(1024),
        sockets,
    })
}

/// The beginning of a file; `None` if it cannot be read.
fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_READ)
        .read_to_end(&mut bytes)
        .ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Paths of the unix sockets on which the process listens, as this process sees them.
fn sockets(folder: &Path) -> Vec<PathBuf> {
    let Ok(descriptors) = fs::read_dir(folder.join("fd")) else {
        return Vec::new();
    };
    let targets = descriptors.flatten().take(MAX_DESCRIPTORS);
    let inodes = targets.filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let number = target.to_str()?.strip_prefix("socket:[")?;
        number.strip_suffix(']')?.parse().ok()
    });
    let inodes: BTreeSet<u64> = inodes.collect();
    let table = read(&folder.join("net/unix")).unwrap_or_default();
    let listening = table.lines().filter_map(|line| listening(line, &inodes));
    let some = listening.take(MAX_SOCKETS);
    some.map(|path| by_its_name(seen_from_here(folder, path)))
        .collect()
}

/// A monitor binds its socket beside the path that it gets when it listens (`sys::sockets::bind`), and the kernel remembers the
/// first: with a dot and a number behind the name.
fn by_its_name(path: PathBuf) -> PathBuf {
    let number = path.extension().and_then(|it| it.to_str());
    let is_aside = number.is_some_and(|it| it.parse::<u32>().is_ok());
    if is_aside && !path.exists() {
        path.with_extension("")
    } else {
        path
    }
}

/// The path in a line of `/proc/net/unix` (proc(5)), if that is a socket which listens and is one of `inodes`.
fn listening<'a>(line: &'a str, inodes: &BTreeSet<u64>) -> Option<&'a Path> {
    // Num RefCount Protocol Flags Type St Inode Path; a path may have spaces.
    let mut rest = line;
    let mut fields = [""; 7];
    for field in &mut fields {
        (*field, rest) = rest.trim_start().split_once(' ')?;
    }
    let flags = u32::from_str_radix(fields[3], 16).ok()?;
    let inode = fields[6].parse().ok()?;
    // A name that begins with @ is no file.
    let is_file = !rest.is_empty() && !rest.starts_with('@');
    (flags & LISTENS != 0 && inodes.contains(&inode) && is_file).then(|| Path::new(rest))
}

/// A process in a jail has another root, and one may have bound its socket by a relative path.
fn seen_from_here(folder: &Path, path: &Path) -> PathBuf {
    let root = fs::read_link(folder.join("root"));
    let is_ours = root.map_or(true, |root| root == Path::new("/"));
    match path.strip_prefix("/") {
        Ok(_) if is_ours => path.to_owned(),
        Ok(inside) => folder.join("root").join(inside),
        Err(_) => match fs::read_link(folder.join("cwd")) {
            Ok(cwd) if is_ours => cwd.join(path),
            _ => folder.join("cwd").join(path),
        },
    }
}

/// Asks these machines, several at a time. One that does not answer within a second is in the list with the reason.
#[must_use]
pub fn ask(processes: &[Process], depth: Depth) -> Vec<Machine> {
    let share = processes.len().div_ceil(ASKED_AT_ONCE).max(1);
    thread::scope(|scope| {
        let asking = processes.chunks(share).map(|some| {
            scope.spawn(move || some.iter().map(|it| ask_one(it, depth)).collect::<Vec<_>>())
        });
        // All are started before the first is waited for.
        let asking: Vec<_> = asking.collect();
        let answers = asking
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_default());
        answers.collect()
    })
}

fn ask_one(process: &Process, depth: Depth) -> Machine {
    let mut machine = Machine {
        pid: process.pid,
        resident_bytes: process.resident_bytes,
        trouble: Some("it has no --api-socket that can be seen".to_owned()),
        ..Machine::default()
    };
    for socket in &process.sockets {
        match get::<InstanceInfo>(socket, "/") {
            Ok(info) if info.app_name == "Ebb" => {
                machine.trouble = None;
                machine.socket = Some(socket.clone());
                machine.info = Some(info);
                break;
            }
            // Another socket of it, such as that of its vsock.
            Ok(_) | Err(ClientError::Broken { .. }) => {}
            Err(error) => machine.trouble = Some(error.to_string()),
        }
    }
    let is_built =
        |info: &InstanceInfo| matches!(info.state, InstanceState::Running | InstanceState::Paused);
    if let (Depth::All, Some(socket)) = (depth, &machine.socket)
        && machine.info.as_ref().is_some_and(is_built)
    {
        match get(socket, "/lazy-memory") {
            Ok(lazy) => machine.lazy_memory = Some(lazy),
            // It is stuck or ends: the rest would take as long.
            Err(error) => {
                machine.trouble = Some(error.to_string());
                return machine;
            }
        }
        let config: Option<serde_json::Value> = get(socket, "/vm/config").ok();
        let mib = config.and_then(|it| it["machine-config"]["mem_size_mib"].as_u64());
        machine.memory_bytes = mib.map(|mib| mib.saturating_mul(1 << 20));
        machine.balloon = get(socket, "/balloon").ok();
        machine.statistics = get(socket, "/balloon/statistics").ok();
    }
    machine
}

fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ClientError> {
    let answer = request(socket, Method::GET, path, None, PATIENCE)?;
    serde_json::from_value(answer).map_err(|error| ClientError::Broken {
        what: "the answer is not understood",
        cause: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use tempfile::TempDir;

    use super::*;

    /// A folder that looks like /proc/PID.
    fn fake(proc: &Path, pid: &str, name: &str, command: &str) -> PathBuf {
        let folder = proc.join(pid);
        fs::create_dir_all(folder.join("fd")).unwrap();
        fs::create_dir_all(folder.join("net")).unwrap();
        fs::write(folder.join("comm"), format!("{name}\n")).unwrap();
        fs::write(
            folder.join("cmdline"),
            format!("ebb\0{command}\0--kernel\0k\0"),
        )
        .unwrap();
        fs::write(folder.join("status"), "Name:\tebb\nVmRSS:\t  2048 kB\n").unwrap();
        folder
    }

    #[test]
    fn monitors_are_told_from_their_helpers_and_clients() {
        let proc = TempDir::new().unwrap();
        fake(proc.path(), "30", "ebb", "run");
        fake(proc.path(), "4", "ebb", "restore");
        fake(proc.path(), "5", "ebb", "ctl");
        fake(proc.path(), "6", "ebb-reaper", "run");
        fake(proc.path(), "7", "bash", "run");
        fake(proc.path(), "self", "ebb", "run");
        fs::create_dir(proc.path().join("8")).unwrap();
        let found = processes(proc.path()).unwrap();
        let found: Vec<_> = found.iter().map(|it| (it.pid, it.resident_bytes)).collect();
        assert_eq!(found, [(4, 2 << 20), (30, 2 << 20)]);
    }

    #[test]
    fn sockets_are_found_wherever_they_are() {
        const TABLE: &str = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000: 00000002 00000000 00010000 0001 01   71 /run/a b\n\
            0000: 00000002 00000000 00010000 0001 01    72 relative\n\
            0000: 00000003 00000000 00000000 0001 03    73 /run/connected\n\
            0000: 00000002 00000000 00010000 0001 01    74 /run/of-another\n\
            0000: 00000002 00000000 00010000 0001 01    75 @abstract\n\
            0000: 00000002 00000000 00010000 0001 01    76\n\
            rubbish\n";
        let proc = TempDir::new().unwrap();
        let folder = fake(proc.path(), "4", "ebb", "run");
        fs::write(folder.join("net/unix"), TABLE).unwrap();
        for (number, inode) in [71, 72, 73, 75, 76].iter().enumerate() {
            symlink(
                format!("socket:[{inode}]"),
                folder.join("fd").join(number.to_string()),
            )
            .unwrap();
        }
        symlink("/srv", folder.join("cwd")).unwrap();
        symlink("/", folder.join("root")).unwrap();
        assert_eq!(
            sockets(&folder),
            [Path::new("/run/a b"), Path::new("/srv/relative")]
        );
        // In a jail.
        fs::remove_file(folder.join("root")).unwrap();
        symlink("/jail", folder.join("root")).unwrap();
        let expected = [folder.join("root/run/a b"), folder.join("cwd/relative")];
        assert_eq!(sockets(&folder), expected);
    }

    #[test]
    fn a_socket_is_found_by_the_name_that_it_got_after_all() {
        let folder = TempDir::new().unwrap();
        // The name may end with a number of its own.
        let paths = ["api", "api.7"].map(|name| folder.path().join(name));
        let bound = paths
            .each_ref()
            .map(|path| crate::sys::sockets::bind(path).unwrap().0);
        let plain = UnixListener::bind(folder.path().join("plain.8")).unwrap();
        // As if these were all that the process has.
        let own = fake(folder.path(), "4", "ebb", "run");
        symlink("/", own.join("root")).unwrap();
        fs::copy("/proc/self/net/unix", own.join("net/unix")).unwrap();
        for listener in bound.iter().chain([&plain]) {
            let number = listener.as_raw_fd().to_string();
            let target = fs::read_link(Path::new("/proc/self/fd").join(&number)).unwrap();
            symlink(target, own.join("fd").join(number)).unwrap();
        }
        let mut found = sockets(&own);
        found.sort();
        let plain = folder.path().join("plain.8");
        assert_eq!(found, [paths.to_vec(), vec![plain]].concat());
    }

    /// Each socket may take a second, so one process must not have many.
    #[test]
    fn few_sockets_of_a_process_are_asked() {
        let proc = TempDir::new().unwrap();
        let folder = fake(proc.path(), "4", "ebb", "run");
        let mut table = String::new();
        for inode in 100..200 {
            table += &format!("0000: 00000002 00000000 00010000 0001 01 {inode} /run/{inode}\n");
            let target = format!("socket:[{inode}]");
            symlink(target, folder.join("fd").join(inode.to_string())).unwrap();
        }
        fs::write(folder.join("net/unix"), table).unwrap();
        symlink("/", folder.join("root")).unwrap();
        assert_eq!(sockets(&folder).len(), MAX_SOCKETS);
    }

    /// Listens at `path` and writes `answer` to the first who comes, then nothing more.
    fn liar(path: &Path, answer: &'static [u8]) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer);
            // Until the client goes.
            let _ = stream.read(&mut [0; 1]);
        })
    }

    #[test]
    fn one_that_is_silent_or_lies_holds_up_nobody_for_long() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        let silent = UnixListener::bind(at("silent")).unwrap();
        let rubbish = liar(
            &at("rubbish"),
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]",
        );
        let endless = liar(
            &at("endless"),
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        );
        let process = |pid, names: &[&str]| Process {
            pid,
            resident_bytes: 1,
            sockets: names.iter().map(|name| at(name)).collect(),
        };
        let all = [
            process(1, &["silent"]),
            process(2, &["rubbish", "endless"]),
            process(3, &["gone"]),
            process(4, &[]),
        ];
        let machines = ask(&all, Depth::All);
        let pids: Vec<u32> = machines.iter().map(|it| it.pid).collect();
        assert_eq!(pids, [1, 2, 3, 4]);
        let trouble = |index: usize| machines[index].trouble.as_deref().unwrap();
        assert!(
            trouble(0).contains("no answer within 1 s"),
            "{}",
            trouble(0)
        );
        assert!(trouble(2).contains("gone"), "{}", trouble(2));
        assert!(trouble(3).contains("--api-socket"), "{}", trouble(3));
        assert!(machines.iter().all(|it| it.info.is_none()));
        drop(silent);
        rubbish.join().unwrap();
        endless.join().unwrap();
    }
}
