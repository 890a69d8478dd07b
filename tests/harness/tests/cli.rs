//! Bad command lines, found out before there is a machine. No KVM is needed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::refusal::Bench;

/// A bench with something that looks like a kernel as long as nobody opens it, and two disks.
fn bench() -> Result<Bench> {
    let bench = Bench::new()?;
    bench.file("kernel", b"MZ")?;
    bench.file("disk", &[0; 4096])?;
    bench.file("empty", b"")?;
    Ok(bench)
}

const KERNEL: [&str; 2] = ["--kernel", "kernel"];

/// With a kernel that is fine so far.
fn refused(bench: &Bench, words: &[&str], parts: &[&str]) -> Result<()> {
    bench.run_refused(&[&KERNEL, words].concat(), parts)
}

#[test]
fn kernels_and_initramfs() -> Result<()> {
    let bench = bench()?;
    bench.run_refused(&[], &["--kernel", "not provided"])?;
    for (name, parts) in [
        ("none", ["--kernel none", "no such file", "check the path"]),
        (".", ["--kernel .", "is a directory", "name a regular file"]),
        ("empty", ["--kernel empty", "empty", "name another"]),
    ] {
        bench.run_refused(&["--kernel", name], &parts)?;
    }
    refused(
        &bench,
        &["--initramfs", "none"],
        &["--initramfs none", "check the path"],
    )?;
    refused(
        &bench,
        &["--kernel-entry", "side"],
        &["side", "auto or image"],
    )
}

#[test]
fn memory_and_vcpus() -> Result<()> {
    let bench = bench()?;
    for (option, value, parts) in [
        ("--memory", "size=0", ["size=0", "for instance size=1G"]),
        ("--memory", "size=128T", ["size=128T", "choose at most"]),
        ("--memory", "size=3M", ["size=3M", "nearest below is 2M"]),
        ("--memory", "size=1X", ["1X", "K, M, G, T"]),
        ("--memory", "siez=1G", ["siez", "did you mean 'size'?"]),
        (
            "--memory",
            "colour=red",
            ["colour", "size, thp, hugepages, prefault, shared"],
        ),
        ("--memory", "size=1G,size=2G", ["size", "keep one"]),
        (
            "--memory",
            "size=1G,thp=perhaps",
            ["thp=perhaps", "on or off"],
        ),
        ("--cpus", "boot=0", ["boot=0", "choose 1 to"]),
        ("--cpus", "boot=100000", ["boot=100000", "at most"]),
        ("--balloon", "size=2G", ["size=2G", "choose less"]),
        ("--cmdline", "a\nb", ["--cmdline", "remove it"]),
    ] {
        refused(&bench, &[option, value], &parts)?;
    }
    Ok(())
}

#[test]
fn configuration_files() -> Result<()> {
    let bench = bench()?;
    bench.file("vm.toml", b"kernel = 'none'\nmemory = { size = '3M' }")?;
    bench.file("vm.json", br#"{"kernel": "kernel", "colour": "red"}"#)?;
    for (words, parts) in [
        (
            &["--config", "vm.toml"][..],
            ["--config vm.toml: ", "nearest below is 2M"],
        ),
        // The command line wins, so what is left is the file's kernel.
        (
            &["--config", "vm.toml", "--memory", "size=4M"],
            ["--kernel none", "check the path"],
        ),
        (
            &["--config", "vm.json"],
            ["--config vm.json: unknown key 'colour'", "kernel-entry"],
        ),
        (&["--config", "none"], ["--config none", "you may read"]),
    ] {
        bench.run_refused(words, &parts)?;
    }
    Ok(())
}

#[test]
fn disks() -> Result<()> {
    let bench = bench()?;
    fs::hard_link(bench.path("disk"), bench.path("hard")).context("hard link")?;
    std::os::unix::fs::symlink("disk", bench.path("link")).context("link")?;
    for (value, parts) in [
        ("path=none", ["--disk none", "check the path"]),
        ("path=.", ["--disk .", "raw disk image"]),
        (
            "path=disk,readnoly=on",
            ["readnoly", "did you mean 'readonly'?"],
        ),
        ("readonly=on", ["path is missing", "path=disk.raw"]),
    ] {
        refused(&bench, &["--disk", value], &parts)?;
    }
    for other in ["disk", "hard", "link"] {
        let other = format!("path={other}");
        let words = ["--disk", "path=disk,readonly=on", "--disk", &other];
        refused(&bench, &words, &["one file", "readonly=on"])?;
    }
    Ok(())
}

#[test]
fn outputs() -> Result<()> {
    let bench = bench()?;
    let listener = UnixListener::bind(bench.path("served")).context("listen")?;
    let long = "s".repeat(120);
    for (option, value, parts) in [
        (
            "--serial",
            "file=none/serial",
            ["none/serial", "create it first"],
        ),
        ("--serial", "pty", ["pty", "tty, null or file=PATH"]),
        (
            "--api-socket",
            "disk",
            ["--api-socket disk", "choose another path"],
        ),
        (
            "--api-socket",
            "served",
            ["--api-socket served", "choose another path"],
        ),
        ("--api-socket", &long, [&long, "choose a shorter one"]),
        ("--log-file", "none/log", ["none/log", "you may write"]),
        (
            "--id",
            "two words",
            ["two words", "letters, digits or hyphens"],
        ),
    ] {
        refused(&bench, &[option, value], &parts)?;
    }
    drop(listener);
    Ok(())
}

/// Runs a monitor whose /dev is its own, which `prepare` has filled.
fn with_own_dev(bench: &Bench, prepare: &str) -> Command {
    let mut command = Command::new("unshare");
    // Root needs no user namespace, and everybody else gets one.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let run = bench.run(&KERNEL);
    command.args([
        "--mount",
        "sh",
        "-c",
        &format!("mount -t tmpfs none /dev && {prepare}"),
        "sh",
    ]);
    command.arg(run.get_program()).args(run.get_args());
    command.current_dir(bench.path("."));
    command
}

#[test]
fn a_host_without_kvm() -> Result<()> {
    let bench = bench()?;
    let command = with_own_dev(&bench, r#"exec "$@""#);
    bench.refused(command, &["/dev/kvm", "does not exist", "ebb doctor"])
}

#[test]
fn a_user_who_may_not_use_kvm() -> Result<()> {
    let bench = bench()?;
    // Without its capabilities root is a user like others.
    let prepare = r#"touch /dev/kvm && chmod 0 /dev/kvm &&
        exec setpriv --bounding-set=-all --inh-caps=-all --securebits=+noroot -- "$@""#;
    // The folder must be open to a user who has lost the right to override permissions.
    let everyone = fs::Permissions::from_mode(0o777);
    fs::set_permissions(bench.path("."), everyone).context("open the folder")?;
    bench.refused(
        with_own_dev(&bench, prepare),
        &["/dev/kvm", "permission denied", "run as root"],
    )
}

#[test]
fn nobody_listens() -> Result<()> {
    let bench = Bench::new()?;
    let mut command = Command::new(bench.run(&[]).get_program());
    command
        .args(["ctl", "--api-socket", "api", "status"])
        .current_dir(bench.path("."));
    let output = command.output().context("ebb ctl")?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.starts_with("ebb: ") && text.lines().count() == 1 && text.contains("api"),
        "{text}"
    );
    Ok(())
}
