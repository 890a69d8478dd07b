//! `cargo xtask package`: makes the Debian packages and a tarball, and tries them out in a Debian that has neither.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Error, Result};

use crate::cargo::{build, build_malloc};
use crate::image;
use crate::project::{binary, output_folder, root};
use crate::setup;
use crate::shell::{Seconds, Size, command, progress, quietly};

/// The version of the packages.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The packages of the workspace that become Debian packages, and the names of these.
const PACKAGES: [(&str, &str); 3] = [
    ("ebb-vmm", "ebb"),
    ("ebb-guest-agent", "ebb-guest"),
    ("ebb-containerd-shim", "ebb-containerd"),
];

/// The programs that are in them and not static.
pub const PROGRAMS: [&str; 4] = ["ebb", "ebb-top", "containerd-shim-ebb-v2", "ebb-pod-image"];

/// What they depend on that the Debian in which they are tried out lacks.
const NEEDED: [&str; 2] = ["containerd", "erofs-utils"];

/// How exposed systemd may find the unit, in tenths; 100 is a unit without any protection.
const EXPOSURE: &str = "--threshold=33";

/// Arguments of `package`.
#[derive(clap::Args)]
pub struct Arguments {}

/// Runs the subcommand.
pub fn run(_: &Arguments) -> Result<u8> {
    let assets = setup::ensure()?;
    build(&PROGRAMS)?;
    build_malloc()?;
    let _ = fs::remove_file(stamp_file()?); // There is none at first.
    ensure(&assets)?;
    let out = output_folder("package")?;
    image::try_out(&out, &setup::system_base(&assets)?)?;
    let entries = fs::read_dir(&out).context(|| format!("list {}", out.display()))?;
    for entry in entries.flatten() {
        let len = entry.metadata().map_or(0, |it| it.len());
        progress(format_args!("{}: {}", entry.path().display(), Size(len)));
    }
    Ok(0)
}

/// Makes packages and tarball from what was built, and tries them out, unless this was done with the same files.
pub fn ensure(assets: &Assets) -> Result<()> {
    let stamp = stamp()?;
    if fs::read_to_string(stamp_file()?).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let start = std::time::Instant::now();
    let out = output_folder("package")?;
    fs::remove_dir_all(&out).context(|| format!("remove {}", out.display()))?;
    let out = output_folder("package")?;
    let tool = setup::cargo_deb()?;
    progress("making the packages ebb, ebb-guest and ebb-containerd");
    for (package, name) in PACKAGES {
        let words = ["--no-build", "--strip", "--no-dbgsym", "-q", "-p", package];
        let mut make = command(&tool.to_string_lossy(), words);
        make.arg("-o").arg(deb(&out, name));
        make.current_dir(root());
        make.env("CARGO_TARGET_DIR", root().join("target"));
        quietly(make)?;
    }
    tarball(&out, &assets.ebb_guest_agent)?;
    try_out(&out, assets)?;
    fs::write(stamp_file()?, stamp).context(|| "write the packages' stamp".to_owned())?;
    progress(format_args!(
        "packages done in {}",
        Seconds(start.elapsed())
    ));
    Ok(())
}

fn stamp_file() -> Result<PathBuf> {
    Ok(output_folder("package")?.join("stamp"))
}

/// What the packages are made from: paths, sizes and times.
fn stamp() -> Result<String> {
    let mut stamp = String::new();
    let folders = [
        "resources/package",
        "resources/package/ebb",
        "resources/package/ebb-guest",
        "resources/package/ebb-containerd",
    ];
    let manifests = [
        "vmm/Cargo.toml",
        "guest-agent/Cargo.toml",
        "containerd-shim/Cargo.toml",
        "tests/xtask/src/package.rs",
    ];
    let mut files: Vec<PathBuf> = manifests.iter().map(|it| root().join(it)).collect();
    for folder in folders {
        let entries = fs::read_dir(root().join(folder)).context(|| format!("list {folder}"))?;
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.extend(PROGRAMS.map(binary));
    files.push(binary("libebb_malloc.so"));
    files.sort();
    for file in files {
        let data = fs::metadata(&file).context(|| format!("read {}", file.display()))?;
        let time = data
            .modified()
            .ok()
            .and_then(|it| it.duration_since(UNIX_EPOCH).ok());
        stamp.push_str(&format!("{} {} {time:?}\n", file.display(), data.len()));
    }
    Ok(stamp)
}

/// The package of this name.
fn deb(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}_{VERSION}-1_amd64.deb"))
}

/// The guest's program alone, for guests without packages: it needs no library.
fn tarball(out: &Path, agent: &Path) -> Result<()> {
    let folder = agent.parent().unwrap_or(Path::new("/"));
    let mut tar = command("tar", ["--owner=0", "--group=0", "-czf"]);
    tar.arg(out.join(format!("ebb-guest-{VERSION}-x86_64-static.tar.gz")));
    tar.arg("-C").arg(folder).arg("ebb-guest");
    quietly(tar).map(drop)
}

/// Installs, uses and purges the packages in a Debian of its own.
fn try_out(out: &Path, assets: &Assets) -> Result<()> {
    progress("trying the packages out in a clean Debian");
    let base = setup::system_base(assets)?;
    let tree = out.join("root");
    fs::create_dir_all(&tree).context(|| format!("create {}", tree.display()))?;
    let tried = unpack(&base, &tree).and_then(|()| life(out, &tree, assets));
    fs::remove_dir_all(&tree).context(|| format!("remove {}", tree.display()))?;
    tried
}

fn unpack(archive: &Path, folder: &Path) -> Result<()> {
    let mut tar = command("tar", ["-xf"]);
    tar.arg(archive).arg("-C").arg(folder);
    quietly(tar).map(drop)
}

fn life(out: &Path, tree: &Path, assets: &Assets) -> Result<()> {
    // Nobody boots it: an initramfs with the modules that are asked for is made sooner.
    let quick = tree.join("etc/initramfs-tools/conf.d/quick");
    fs::write(&quick, "MODULES=list\nCOMPRESS=gzip\n")
        .context(|| format!("write {}", quick.display()))?;
    let status = tree.join("var/lib/dpkg/status");
    let needs = setup::packages_for_base(assets, &NEEDED, &status)?;
    unpack(&needs, &tree.join("tmp"))?;
    within(tree, "dpkg -i /tmp/*.deb && rm /tmp/*.deb")?;
    let before = files(tree)?;
    for (_, name) in PACKAGES {
        let to = tree.join("tmp/package.deb");
        fs::copy(deb(out, name), &to).context(|| format!("copy {name}"))?;
        within(tree, "dpkg -i /tmp/package.deb && rm /tmp/package.deb")?;
    }
    installed(tree)?;
    runtime(tree, assets)?;
    within(tree, "dpkg --purge ebb ebb-guest ebb-containerd")?;
    let left: Vec<String> = files(tree)?.difference(&before).cloned().collect();
    let users = within(
        tree,
        "{ getent passwd ebb-vm; getent group ebb-vm ebb; } || true",
    )?;
    if left.is_empty() && users.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "purged packages leave {left:?} {users}"
    )))
}

/// Runs a script there, which has to print this.
fn says(tree: &Path, script: &str, part: &str) -> Result<()> {
    match within(tree, script)? {
        said if said.contains(part) => Ok(()),
        said => Err(Error::new(format!(
            "{script:?} says {said:?}, not {part:?}"
        ))),
    }
}

/// Uses containerd's runtime, as far as that needs no guest: its initramfs is the one that tests boot.
fn runtime(tree: &Path, assets: &Assets) -> Result<()> {
    // What containerd asks for when a shim has died. It reads the settings.
    let clean = "cd /tmp && TTRPC_ADDRESS=/none containerd-shim-ebb-v2 -namespace none -id none -address /none delete";
    says(tree, &format!("{clean} && echo cleaned"), "cleaned")?;
    says(tree, "ebb-pod-image --version", VERSION)?;
    says(tree, "ebb-pod-image", "/var/lib/ebb/pod/initramfs")?;
    let read = |path: &Path| fs::read(path).context(|| format!("read {}", path.display()));
    for (made, tested) in [
        ("vmlinuz", &assets.vmlinuz),
        ("initramfs", &assets.pod_initramfs),
    ] {
        let made = tree.join("var/lib/ebb/pod").join(made);
        if read(&made)? != read(tested)? {
            let (made, tested) = (made.display(), tested.display());
            return Err(Error::new(format!("{made} is not {tested}")));
        }
    }
    says(
        tree,
        "cat /var/lib/dpkg/info/ebb-containerd.conffiles",
        "/etc/ebb/pods.toml",
    )
}

/// Uses what else is installed, as far as that needs no guest.
fn installed(tree: &Path) -> Result<()> {
    let says = |script: &str, part: &str| says(tree, script, part);
    says("ebb --version", VERSION)?;
    says("ebb top --help", "--once")?;
    let run = "ebb run --kernel /boot/vmlinuz-* --memory size=1G --dry-run";
    says(run, "\"mem_size_mib\": 1024")?;
    says("ebb-guest --help 2>&1 || true", "install")?;
    says("id ebb-vm", "(ebb-vm)")?;
    says("systemctl is-enabled ebb-arena", "enabled")?;
    let initramfs = "mkdir /tmp/i && cd /tmp/i && unmkinitramfs /boot/initrd.img-* . && grep -r ^ebb: . && rm -r /tmp/i";
    says(initramfs, "etc/group:ebb:")?;
    within(
        tree,
        "systemd-analyze verify --man=no ebb@web.service ebb-arena.service",
    )?;
    says(
        &format!("systemd-analyze security --offline=yes {EXPOSURE} ebb@web.service"),
        "Overall exposure level",
    )?;
    says(
        "bash -n /usr/share/bash-completion/completions/ebb && gzip -t /usr/share/man/man1/ebb*.gz && echo good",
        "good",
    )
}

/// Runs a script of the shell's in the Debian at `tree`, and returns what it printed.
fn within(tree: &Path, script: &str) -> Result<String> {
    let mut chroot = command("chroot", [tree]);
    chroot.args(["sh", "-ec", script]);
    chroot.env("DEBIAN_FRONTEND", "noninteractive");
    quietly(chroot)
}

/// Where systemd, the package manager, the tools for users and initramfs-tools keep their own files.
const OTHERS: [&str; 7] = [
    "./run/systemd",
    "./var/lib/dpkg",
    "./var/log",
    "./var/cache",
    "./var/lib/initramfs-tools",
    "./var/lib/systemd",
    "./etc/",
];

/// All files, but for those of [`OTHERS`] that are not named after Ebb.
fn files(tree: &Path) -> Result<BTreeSet<String>> {
    let mut find = command("find", [".", "-xdev"]);
    find.current_dir(tree);
    let found = quietly(find)?;
    let is_counted =
        |line: &&str| line.contains("ebb") || !OTHERS.iter().any(|it| line.starts_with(it));
    Ok(found
        .lines()
        .filter(is_counted)
        .map(str::to_owned)
        .collect())
}
