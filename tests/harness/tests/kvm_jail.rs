//! Machines that are locked in: what they see, what they are refused, how they end, and that nothing of them is left.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use ebb_harness::Launch;
use ebb_harness::error::{Context, Result};
use ebb_harness::idle::signal_to;
use ebb_harness::jail::Jail;
use ebb_harness::network::Tap;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until, until_often};
use ebb_hypercall_abi::Operation;
use ebb_payload::{FREE_START, Program, Transport};
use rustix::process::Signal;

/// Pages of the guest that frees lazily: 32 MiB.
const PAGES: u64 = 8192;

fn sleeper() -> Program {
    let mut program = Program::kernel();
    program.halt();
    program
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).context(path)
}

/// The names in a folder.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).context(folder.display())?.flatten();
    Ok(entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// Every thread of the machine has given up all privileges, and has a filter.
fn all_are_unprivileged(jail: &Jail) -> Result<()> {
    let user = jail.user().to_string();
    let four = [user.as_str(); 4].join("\t");
    let none = "0000000000000000";
    let wanted = [
        ("Uid", four.as_str()),
        ("Gid", &four),
        ("Groups", ""),
        ("CapInh", none),
        ("CapPrm", none),
        ("CapEff", none),
        ("CapBnd", none),
        ("CapAmb", none),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ];
    let (mut threads, mut kinds) = (0, BTreeSet::new());
    for (pid, name) in jail.processes()? {
        kinds.insert(name);
        for task in names(Path::new(&format!("/proc/{pid}/task")))? {
            let status = read(&format!("/proc/{pid}/task/{task}/status"))?;
            for (field, value) in wanted {
                let line = format!("{field}:\t{value}");
                let found = status.lines().any(|it| it.trim_end() == line.trim_end());
                assert!(found, "{pid}/{task} lacks {line:?}: {status}");
            }
            threads += 1;
        }
    }
    assert_eq!(kinds, set(["ebb", "ebb-guardian", "ebb-reaper"]));
    assert!(threads > 8, "{threads}");
    Ok(())
}

/// The root has what the machine needs, on its own mounts, and there is no way to the network.
fn little_is_seen(jail: &Jail, disk: &Path) -> Result<()> {
    let monitor = jail.monitor()?;
    let root = format!("/proc/{monitor}/root");
    let inside = |path: &Path| Path::new(&root).join(path.strip_prefix("/").unwrap());
    let mut top = set(["dev", "proc", "run", "sys"]);
    let first = disk.components().nth(1).context("a disk at the root")?;
    top.insert(first.as_os_str().to_string_lossy().into_owned());
    assert_eq!(names(Path::new(&root))?, top);
    assert_eq!(names(&inside(Path::new("/dev")))?, set(["kvm", "null"]));
    let folder = disk.parent().context("a disk without a folder")?;
    assert_eq!(names(&inside(folder))?, set(["disk", "image", "kernel"]));
    assert_eq!(
        names(&inside(&jail.folder()))?,
        set(["api", "api.memory", "log"])
    );
    let processes = names(&inside(Path::new("/proc")))?;
    let numbers = processes.iter().filter(|name| name.parse::<u32>().is_ok());
    // Process 1, the monitor, its reaper and guardian.
    assert_eq!(numbers.count(), 4, "{processes:?}");

    let mounts = read(&format!("/proc/{monitor}/mountinfo"))?;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (point, options) = (fields[4], fields[5]);
        let known = ["/", "/proc", "/run/ebb/peers"].contains(&point)
            || point.starts_with("/sys/fs/cgroup/ebb")
            || Path::new(point) == jail.folder()
            || Path::new(point).parent() == Some(folder);
        assert!(known, "{line}");
        assert!(
            options.contains("nosuid") && options.contains("noexec"),
            "{line}"
        );
        let readonly = ["/image", "/kernel", "ebb/memory."];
        let readonly = point == "/" || readonly.into_iter().any(|part| point.contains(part));
        assert_eq!(options.starts_with("ro,"), readonly, "{line}");
    }
    let interfaces = read(&format!("/proc/{monitor}/net/dev"))?;
    let interfaces: Vec<&str> = interfaces.lines().skip(2).collect();
    assert!(
        interfaces.len() == 1 && interfaces[0].trim().starts_with("lo:"),
        "{interfaces:?}"
    );
    for space in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).context(space);
        assert_ne!(of(&monitor.to_string())?, of("self")?, "{space}");
    }
    Ok(())
}

/// With disks, a tap, a log, limits: all works from inside, and from inside little is seen.
#[test]
fn a_jailed_machine_has_what_it_needs_and_no_more() -> Result<()> {
    let limits = "memory_high=1G,memory_max=2G,cpu_max=150,pids_max=200";
    let jail = Jail::new("sees", &sleeper())?.with(&["--cgroup", limits]);
    let tap = Tap::create("ebbjail0", Ipv4Addr::new(10, 77, 9, 1), 1500)?;
    let (disk, image) = (jail.disk("disk")?, jail.disk("image")?);
    let disks = [&disk, &image].map(|path| format!("path={}", path.display()));
    let words = [
        "-v",
        "--log-file",
        "log",
        "--net",
        "tap=ebbjail0",
        "--balloon",
        "statistics=1",
    ];
    let more = [
        "--disk",
        &disks[0],
        "--disk",
        &format!("{},readonly=on", disks[1]),
    ];
    let mut machine = jail.start(&[&words[..], &more].concat())?;
    little_is_seen(&jail, &disk)?;
    until("all threads have their filter", LONG, || {
        Ok(all_are_unprivileged(&jail).ok())
    })
    .or_else(|_| all_are_unprivileged(&jail))?;
    for (file, text) in [
        ("memory.high", "1073741824"),
        ("memory.max", "2147483648"),
        ("cpu.max", "150000 100000"),
        ("pids.max", "200"),
    ] {
        let found = read(&jail.cgroup().join(file).to_string_lossy())?;
        assert_eq!(found.trim(), text, "{file}");
    }
    // The monitor found its cgroup from inside: it watches its stalls and limits.
    let log = jail.folder().join("log");
    let log = read(&log.to_string_lossy())?;
    assert!(!log.contains("WARN"), "{log}");
    drop(tap);
    jail.api().stop()?;
    assert_eq!(machine.wait()?.code(), Some(0));
    assert!(machine.said().is_empty(), "{}", machine.said());
    // The operator's log stays.
    assert_eq!(names(&jail.folder())?, set(["log"]));
    fs::remove_dir_all(jail.folder()).context("remove the log")?;
    jail.vanished()
}

/// A limit of the jail's cgroup is reached: the monitor hears it from inside, and gives lazily freed memory back.
#[test]
fn reclaim_hears_the_limit_of_the_jail() -> Result<()> {
    let mut guest = Program::kernel();
    guest.fill(FREE_START, PAGES, 0x5eed_0000_0000_0000);
    guest.call(Transport::Port, Operation::LazyFree, FREE_START, PAGES);
    guest.halt();
    let jail = Jail::new("limit", &guest)?.with(&["--cgroup", "memory_high=1G"]);
    let machine = jail.start(&[])?;
    let api = jail.api();
    until_often("the guest has freed its memory", LONG, || {
        Ok((api.lazy()?["lazy_bytes"] == PAGES * 4096).then_some(()))
    })?;
    let cgroup = jail.cgroup();
    let current = read(&cgroup.join("memory.current").to_string_lossy())?;
    let current: u64 = current.trim().parse().context("memory.current")?;
    let high = cgroup.join("memory.high");
    fs::write(&high, (current - 4 * MIB).to_string()).context("memory.high")?;
    let taken = until_often("lazily freed memory is taken", LONG, || {
        Ok(Some(api.lazy()?).filter(|it| it["reclaimed_bytes_total"] >= 4 * MIB))
    })?;
    assert!(taken["pressure_events_total"] > 0, "{taken:?}");
    machine.signal(Signal::TERM);
    drop(machine);
    jail.vanished()
}

/// In each way the machine ends with its memory, and starts again at once under the same name.
#[test]
fn every_end_leaves_nothing_and_the_machine_starts_again() -> Result<()> {
    type End = fn(&Jail, u32) -> Result<()>;
    let ends: [(&str, End, Option<i32>); 6] = [
        ("stop", |jail, _| jail.api().stop(), Some(0)),
        ("SIGTERM", |_, outer| end(outer, Signal::TERM), Some(0)),
        (
            "kill the monitor",
            |jail, _| end(jail.monitor()?, Signal::KILL),
            Some(137),
        ),
        (
            "kill process 1",
            |jail, _| end(jail.init()?, Signal::KILL),
            Some(137),
        ),
        (
            "kill the outer process",
            |_, outer| end(outer, Signal::KILL),
            None,
        ),
        (
            "kill the cgroup",
            |jail, _| fs::write(jail.cgroup().join("cgroup.kill"), "1").context("cgroup.kill"),
            Some(137),
        ),
    ];
    let jail = Jail::new("ends", &sleeper())?;
    let disk = format!("path={}", jail.disk("disk")?.display());
    for (name, how, status) in ends {
        let mut machine = jail.start(&["--disk", &disk]).context(name)?;
        let (monitor, init) = (jail.monitor()?, jail.init()?);
        how(&jail, machine.pid()).context(name)?;
        assert_eq!(machine.wait()?.code(), status, "{name}: {}", machine.said());
        if status.is_some() {
            let left = [jail.folder(), jail.cgroup()].map(|place| place.exists());
            let files = names(&jail.folder());
            assert_eq!(left, [false; 2], "{name}: {files:?}");
        }
        // Only when the outer process was killed does process 1 still clean up.
        let mut next = jail.start(&["--disk", &disk]).context(name)?;
        until_often("the processes of the first machine are gone", LONG, || {
            let is_left = |pid| Path::new(&format!("/proc/{pid}")).exists();
            Ok((![monitor, init].into_iter().any(is_left)).then_some(()))
        })
        .context(name)?;
        end(next.pid(), Signal::TERM)?;
        assert_eq!(next.wait()?.code(), Some(0), "{name}: {}", next.said());
        jail.vanished().context(name)?;
    }
    Ok(())
}

/// Process 1 ends after the guardian, which has the socket to remove: the kernel would kill the guardian with its namespace.
#[test]
fn a_jail_ends_after_its_guardian() -> Result<()> {
    let jail = Jail::new("guardian", &sleeper())?;
    let mut machine = jail.start(&[])?;
    let guardian = until_often("the guardian has its name", LONG, || {
        let processes = jail.processes()?;
        Ok(processes.into_iter().find(|(_, it)| it == "ebb-guardian"))
    })?;
    let (pid, only) = (guardian.0, [guardian]);
    signal_to(pid, Signal::STOP);
    end(jail.monitor()?, Signal::KILL)?;
    until_often("the guardian alone is left", LONG, || {
        Ok((jail.processes()? == only).then_some(()))
    })?;
    // Long enough for one that does not wait to end, also beside other work.
    sleep(Duration::from_secs(1));
    assert_eq!(jail.processes()?, only);
    signal_to(pid, Signal::CONT);
    assert_eq!(machine.wait()?.code(), Some(137), "{}", machine.said());
    let left = [jail.folder(), jail.cgroup()].map(|place| place.exists());
    assert_eq!(left, [false; 2]);
    Ok(())
}

fn end(pid: u32, signal: Signal) -> Result<()> {
    signal_to(pid, signal);
    Ok(())
}

/// Both processes around the machine are killed: nobody is left who could clean up. The next machine takes its place.
#[test]
fn a_jail_whose_keepers_are_all_killed_is_replaced() -> Result<()> {
    let jail = Jail::new("keepers", &sleeper())?;
    let mut machine = jail.start(&[])?;
    let init = jail.init()?;
    // So process 1 does not see the end of the outer one before its own.
    signal_to(init, Signal::STOP);
    machine.signal(Signal::KILL);
    machine.wait()?;
    signal_to(init, Signal::KILL);
    let left = [jail.folder(), jail.cgroup()].map(|place| place.exists());
    assert_eq!(left, [true; 2]);
    let mut next = jail.start(&[])?;
    next.signal(Signal::TERM);
    assert_eq!(next.wait()?.code(), Some(0), "{}", next.said());
    jail.vanished()
}

/// What must not be used is refused in one line with a remedy, and leaves nothing.
#[test]
fn what_a_jail_refuses() -> Result<()> {
    let jail = Jail::new("refuses", &sleeper())?;
    let disk = jail.disk("disk")?;
    let option = |path: &Path| format!("path={}", path.display());
    let refused = |more: &[&str], parts: &[&str]| -> Result<()> {
        let said = jail.refused(more).context(format_args!("{more:?}"))?;
        let missing = parts.iter().find(|part| !said.contains(**part));
        assert_eq!(missing, None, "{said}");
        Ok(())
    };
    // Links in the place of a disk, on the way to it, and in the place of the socket and the log.
    let link = jail.file("link");
    symlink(&disk, &link).context("link")?;
    refused(
        &["--disk", &option(&link)],
        &["--disk", "link", "symbolic link", "realpath"],
    )?;
    let way = jail.file("way");
    symlink(disk.parent().context("folder")?, &way).context("link")?;
    refused(
        &["--disk", &option(&way.join("disk"))],
        &["way/disk has a symbolic link"],
    )?;
    jail.vanished()?;
    for (name, option) in [("api", "--api-socket"), ("log", "--log-file")] {
        fs::create_dir_all(jail.folder()).context("make the folder")?;
        chown(jail.folder(), Some(jail.user()), None).context("give it away")?;
        let there = jail.folder().join(name);
        symlink(jail.file("target"), &there).context("link")?;
        refused(&["--log-file", "log"], &[option])?;
        // What has the socket's name goes with the machine, and so does an empty folder.
        let _ = fs::remove_file(&there);
    }
    assert!(!jail.file("target").exists());
    let _ = fs::remove_dir(jail.folder());
    // Files of others.
    let private = jail.file("private");
    fs::write(&private, [0; 512]).context("make a disk")?;
    let user = jail.user().to_string();
    refused(
        &["--disk", &option(&private)],
        &["private", &user, "read and write", "readonly=on"],
    )?;
    fs::create_dir_all(jail.folder().join("x")).context("make a folder")?;
    refused(&[], &["belongs to user 0", "--id"])?;
    fs::remove_dir_all(jail.folder()).context("remove it")?;
    refused(
        &["--disk", "path=/nowhere"],
        &["/nowhere", "check the path"],
    )?;
    refused(&["--net", "tap=ebbnone0"], &["tap ebbnone0 does not exist"])?;
    jail.vanished()
}

/// A network namespace with the tap `ebbjail1`, and a process that keeps it until this is dropped.
struct Namespace(Child);

impl Namespace {
    fn start() -> Result<Self> {
        let script = "busybox tunctl -t ebbjail1 >/dev/null && busybox ip addr add 10.77.8.1/24 dev ebbjail1 && \
                      busybox ip link set dev ebbjail1 up && echo ready && exec busybox cat >/dev/null";
        let mut command = Command::new("busybox");
        command.args(["unshare", "--net", "busybox", "sh", "-c", script]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut space = Self(child.context("busybox unshare")?);
        let mut line = String::new();
        let output = space.0.stdout.take().context("its output")?;
        BufReader::new(output)
            .read_line(&mut line)
            .context("its output")?;
        assert_eq!(line, "ready\n");
        Ok(space)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A Debian guest boots in a jail, reaches a network of a namespace that is not the caller's, and is asked to end. Its vsock's
/// socket goes with it.
#[test]
fn a_stock_guest_runs_in_a_jail_and_reaches_its_network() -> Result<()> {
    let space = Namespace::start()?;
    let launch = Launch::new()?.jailed(64_099, &["--netns", &space.path()])?;
    let vsock = launch.folder().join("v");
    let mut monitor = launch
        .option("--net", "tap=ebbjail1")
        .option("--vsock", "cid=3,path=v")
        .start()?;
    let mut guest = monitor.guest()?;
    assert!(guest.must("uname -r")?.contains("amd64"));
    guest.must("ip addr add 10.77.8.2/24 dev eth0 && ip link set dev eth0 up")?;
    guest.must("ping -c 1 -W 60 10.77.8.1")?;
    UnixStream::connect(&vsock).context("connect to the vsock")?;
    let info = monitor.api().get("/")?;
    assert_eq!(info["pid"], 2, "{info}");
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    assert!(!vsock.exists() && !Path::new("/sys/fs/cgroup/ebb/stock").exists());
    Ok(())
}
