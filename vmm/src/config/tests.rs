//! Whole command lines, checked against each other and against files.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use clap::Parser;
use ebb_core::release::Release;
use tempfile::TempDir;

use super::*;
use crate::sys::sockets;

/// A folder with a kernel, a disk and an empty file in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("kernel"), "MZ").unwrap();
        fs::write(folder.path().join("disk"), [0; 1024]).unwrap();
        fs::write(folder.path().join("empty"), "").unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Checks a machine with these options; `./` in them is this folder.
    fn check(&self, options: &[&str]) -> Result<MachineConfig, ConfigError> {
        let mut words = Vec::from(options);
        if !words.contains(&"--kernel") {
            words.extend(["--kernel", "./kernel"]);
        }
        let here = format!("{}/", self.0.path().display());
        let words = words.into_iter().map(|word| word.replace("./", &here));
        MachineSpec::try_parse_from(words).unwrap().validate()
    }

    /// The complaint about these options; empty when there is none.
    fn complaint(&self, options: &[&str]) -> String {
        let message = self
            .check(options)
            .map_or_else(|error| error.to_string(), |_| String::new());
        assert!(!message.contains('\n'), "{message}");
        message.replace(&format!("{}/", self.0.path().display()), "")
    }
}

#[test]
fn a_good_command_line_becomes_a_machine() {
    let folder = Folder::new();
    let machine = folder.check(&[
        "--disk=path=./disk,readonly=on",
        "--disk=path=./disk,readonly=on",
        "--balloon=size=512M,reporting=eager",
        "--api-sock=./socket",
        "--serial=file=./log",
    ]);
    let machine = machine.unwrap();
    assert_eq!(machine.vcpus, 1);
    assert_eq!(machine.memory.size, 512 << 20);
    assert!(machine.memory.thp && machine.guardian);
    assert_eq!(machine.disks.len(), 2);
    let balloon = machine.balloon.unwrap();
    assert_eq!(
        (balloon.size, balloon.statistics_interval_s),
        (512 << 20, 0)
    );
    assert_eq!(balloon.free_page_reporting, Some(Release::Discard));
    assert_eq!(machine.api_socket, Some(folder.path("socket")));
    assert!(!folder.path("log").exists() && !folder.path("socket").exists());
}

#[test]
fn each_interface_has_its_own_tap_and_address() {
    let folder = Folder::new();
    let complaint = |nets: &[&str]| folder.complaint(nets);
    let machine = folder.check(&["--net=tap=tap0", "--net=tap=tap1,mtu=9000", "--net=fd=3"]);
    let machine = machine.unwrap();
    let taps: Vec<_> = machine.nets.iter().map(|net| net.tap.as_deref()).collect();
    assert_eq!(taps, [Some("tap0"), Some("tap1"), None]);
    assert_eq!(
        (machine.nets[1].mtu, machine.nets[2].fd),
        (Some(9000), Some(3))
    );
    let mac = "mac=02:00:00:00:00:01";
    for (nets, part) in [
        (
            ["tap=tap0", "tap=tap0"],
            "tap=tap0 is given twice".to_owned(),
        ),
        (["fd=3", "fd=3"], "fd=3 is given twice".to_owned()),
        (
            [&format!("tap=tap0,{mac}"), &format!("fd=3,{mac}")],
            format!("{mac} is given twice"),
        ),
    ] {
        let nets = nets.map(|net| format!("--net={net}"));
        let message = complaint(&[&nets[0], &nets[1]]);
        assert!(message.contains(&part), "{message}");
    }
}

#[test]
fn hugepages_and_strict_mode_turn_transparent_pages_off() {
    let folder = Folder::new();
    let thp = |options: &[&str]| folder.check(options).map(|machine| machine.memory.thp);
    let hugepages = "--memory=size=4M,hugepages=on";
    assert_eq!(thp(&[hugepages]), Ok(false));
    assert_eq!(thp(&["--lazy=strict=on"]), Ok(false));
    let both = format!("{hugepages},thp=on");
    assert_eq!(thp(&[&both]), Err(ConfigError::ThpWithHugepages));
    for key in ["thp", "hugepages"] {
        let memory = format!("--memory={key}=on");
        let message = folder.complaint(&[&memory, "--lazy=strict=on"]);
        assert!(message.contains(&format!("remove {key}")), "{message}");
    }
}

#[test]
fn a_balloon_that_runs_itself_fills_in_what_it_needs() {
    let folder = Folder::new();
    let balloon = |memory: &str, balloon: &str| {
        let options = [memory, balloon].map(str::to_owned);
        let machine = folder.check(&[&options[0], &options[1]]).unwrap();
        let balloon = machine.balloon.unwrap();
        let (oom, interval) = (balloon.deflate_on_oom, balloon.statistics_interval_s);
        (balloon.auto_reserve.map(|bytes| bytes >> 20), oom, interval)
    };
    let auto = "--balloon=auto=on";
    assert_eq!(balloon("--memory=size=8G", auto), (Some(1024), true, 1));
    assert_eq!(balloon("--memory=size=256M", auto), (Some(64), true, 1));
    assert_eq!(balloon("--memory=size=64M", auto), (Some(32), true, 1));
    let given = "--balloon=auto=on,reserve=100M,deflate_on_oom=off,statistics=3";
    assert_eq!(balloon("--memory=size=8G", given), (Some(100), false, 3));
    let none = balloon("--memory=size=8G", "--balloon=size=1G");
    assert_eq!(none, (None, false, 0));
}

#[test]
fn values_that_contradict_each_other() {
    let folder = Folder::new();
    let complaint = |option: &str| folder.complaint(&[option]);
    assert!(complaint("--memory=size=0").contains("size=0: a guest needs memory"));
    assert_eq!(complaint("--memory=size=64T"), "");
    let message = complaint("--balloon=size=513M");
    assert!(
        message.contains("size=513M: the guest has only 512M"),
        "{message}"
    );
    for (balloon, lazy, part) in [
        ("auto=on", "mode=off", "remove one of them"),
        ("auto=on", "strict=on", "--lazy strict=on: nothing looks"),
        ("auto=on,reserve=512M", "mode=age", "has only 512M"),
        ("auto=on,reserve=508M", "mode=age", ""),
    ] {
        let (balloon, lazy) = (format!("--balloon={balloon}"), format!("--lazy={lazy}"));
        let message = folder.complaint(&[&balloon, &lazy]);
        assert!(message.contains(part), "{message}");
        assert_eq!(part.is_empty(), message.is_empty(), "{message}");
    }
    let cmdline = |text: &str| folder.complaint(&["--cmdline", text]);
    assert!(cmdline(&"a".repeat(2048)).contains("2048 bytes"));
    assert_eq!(cmdline(&"a".repeat(2047)), "");
    assert!(cmdline("a\nb").contains(r"'\n'"));
    for id in ["", "a b", &"a".repeat(65), "a\nb"] {
        let message = folder.complaint(&["--id", id]);
        assert!(message.contains("use 1 to 64"), "{message}");
    }
    assert_eq!(folder.complaint(&["--id", &"a".repeat(64)]), "");
}

#[test]
fn arenas_that_are_none() {
    let folder = Folder::new();
    let arenas = |texts: &[&str]| {
        let words: Vec<String> = texts.iter().map(|text| format!("--arena={text}")).collect();
        folder.complaint(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert_eq!(arenas(&["size=8T", "size=64M,granule=32M,id=heap"]), "");
    for (text, part) in [
        (
            "size=0",
            "size=0: no granule of 2M is left behind the table; choose at least 4M",
        ),
        ("size=2M", "no granule of 2M is left"),
        (
            "size=3M",
            "size=3M: not a multiple of the granule of 2M; the nearest below is 2M",
        ),
        ("size=1G,id=a b", "id=a b: use 1 to 32"),
        (
            "size=1G,id=abcdefghijklmnopqrstuvwxyz0123456",
            "use 1 to 32",
        ),
    ] {
        let message = arenas(&[text]);
        assert!(message.contains(part), "{text}: {message}");
    }
    let machine = folder.check(&["--arena=size=1G"]).unwrap();
    assert_eq!(machine.cmdline, "console=ttyS0 quiet panic=-1");
    assert_eq!(machine.arenas[0].id, "arena0");
    let without_pci = folder.check(&["--arena=size=1G", "--cmdline=quiet pci=off"]);
    assert_eq!(without_pci.unwrap_err(), ConfigError::ArenaWithoutPci);
    assert!(arenas(&["size=40T", "size=40T"]).contains("choose at most 64T, all arenas together"));
    assert!(arenas(&["size=1G,id=arena1", "size=1G"]).contains("id=arena1 is given twice"));
    assert!(arenas(&["size=1G"; 17]).contains("given 17 times; at most 16"));
    // The bounds themselves are allowed.
    assert_eq!(arenas(&["size=1G"; 16]), "");
    assert_eq!(arenas(&["size=40T", "size=24T"]), "");
    let longest = format!("size=1G,id={}", "a".repeat(32));
    assert_eq!(arenas(&[&longest]), "");
    let words = ["--cmdline=quiet", "--arena=size=1G"];
    assert_eq!(folder.check(&words).unwrap().cmdline, "quiet");
}

#[test]
fn the_transport_is_pci_where_the_guest_may_use_pci() {
    const DEFAULT: &str = MachineSpec::DEFAULT_CMDLINE;
    let folder = Folder::new();
    let off_by_default = format!("{DEFAULT} pci=off");
    for (words, transport, cmdline) in [
        (&[][..], Transport::Pci, DEFAULT),
        (&["--transport=pci"], Transport::Pci, DEFAULT),
        (&["--transport=mmio"], Transport::Mmio, &off_by_default),
        (
            &["--transport=mmio", "--arena=size=1G"],
            Transport::Mmio,
            DEFAULT,
        ),
        (&["--cmdline=quiet"], Transport::Pci, "quiet"),
        (
            &["--cmdline=quiet pci=off"],
            Transport::Mmio,
            "quiet pci=off",
        ),
        (
            &["--transport=mmio", "--cmdline=quiet"],
            Transport::Mmio,
            "quiet",
        ),
    ] {
        let machine = folder.check(words).unwrap();
        let found = (machine.transport, &*machine.cmdline);
        assert_eq!(found, (transport, cmdline), "{words:?}");
    }
    let without_pci = folder.check(&["--transport=pci", "--cmdline=pci=off"]);
    assert_eq!(without_pci.unwrap_err(), ConfigError::TransportWithoutPci);
}

#[test]
fn images_that_are_no_images() {
    let folder = Folder::new();
    let kernel = |name: &str| folder.complaint(&["--kernel", &format!("./{name}")]);
    for (name, expected) in [
        (
            "none",
            "--kernel none: there is no such file; check the path",
        ),
        (".", "--kernel .: is a directory; name a regular file"),
        (
            "empty",
            "--kernel empty: the file is empty; name another one",
        ),
    ] {
        assert_eq!(kernel(name), expected);
    }
    let message = folder.complaint(&["--initramfs=./none"]);
    assert!(message.starts_with("--initramfs none: there is no such file"));
    let _socket = UnixListener::bind(folder.path("socket")).unwrap();
    assert!(kernel("socket").contains("is no regular file"));
}

#[test]
fn disks_that_are_no_disks() {
    let folder = Folder::new();
    let disk = |name: &str| folder.complaint(&[&format!("--disk=path=./{name}")]);
    assert!(disk("none").starts_with("--disk none: there is no such file"));
    assert!(disk(".").starts_with("--disk .: is a directory"));
    fs::write(folder.path("short"), [0; 511]).unwrap();
    assert!(disk("short").contains("a disk of 511 bytes holds no sector"));
}

#[test]
fn one_file_is_not_two_writable_disks() {
    let folder = Folder::new();
    symlink("disk", folder.path("link")).unwrap();
    fs::hard_link(folder.path("disk"), folder.path("hard")).unwrap();
    for other in ["disk", "link", "hard"] {
        for (left, right) in [("off", "off"), ("on", "off"), ("off", "on")] {
            let message = folder.complaint(&[
                &format!("--disk=path=./disk,readonly={left}"),
                &format!("--disk=path=./{other},readonly={right}"),
            ]);
            assert!(message.contains("are one file"), "{other}: {message}");
        }
    }
}

#[test]
fn outputs_need_their_folder() {
    let folder = Folder::new();
    let serial = |name: &str| folder.complaint(&[&format!("--serial=file=./{name}")]);
    assert!(serial("none/log").contains("there is no folder"));
    assert!(serial(".").contains("is a directory"));
}

/// Who asks whether there is a server must not wait until it has time.
#[test]
fn a_server_that_takes_no_more_connections_is_a_running_one() {
    let folder = Folder::new();
    let path = folder.path("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut waiting = Vec::new();
    let full = loop {
        match sockets::connect_at_once(&path) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
    let message = check_socket("--api-socket", &path).unwrap_err().to_string();
    assert!(
        message.contains("a running server has this socket"),
        "{message}"
    );
}

#[test]
fn sockets_free_stale_served_and_impossible() {
    let folder = Folder::new();
    let path = folder.path("socket");
    assert_eq!(check_socket("--api-socket", &path), Ok(SocketPath::Free));
    let listener = UnixListener::bind(&path).unwrap();
    let message = check_socket("--api-socket", &path).unwrap_err().to_string();
    assert!(
        message.contains("a running server has this socket"),
        "{message}"
    );
    drop(listener);
    assert_eq!(check_socket("--api-socket", &path), Ok(SocketPath::Stale));
    let message = |name: &str| folder.complaint(&["--api-socket", &format!("./{name}")]);
    assert!(message("disk").contains("is there already, and no socket"));
    assert!(message("none/socket").contains("there is no folder"));
    assert!(message(&"a".repeat(100)).contains("choose a shorter one"));
}

#[test]
fn a_socket_that_the_guardian_of_a_dead_machine_removes_meanwhile_is_free() {
    let folder = Folder::new();
    let path = folder.path("socket");
    std::thread::scope(|scope| {
        let removes = scope.spawn(|| {
            for _ in 0..20_000 {
                drop(UnixListener::bind(&path).unwrap());
                fs::remove_file(&path).unwrap();
            }
        });
        while !removes.is_finished() {
            // It is served for a moment.
            if let Err(error) = check_socket("--api-socket", &path) {
                assert!(error.to_string().contains("a running server"), "{error}");
            }
        }
    });
    sockets::remove_stale(&path).unwrap();
}
