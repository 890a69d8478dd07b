//! `cargo xtask setup`: installs and caches what is missing.

mod apt;
mod cargo_deb;
mod kernel;
mod other_kernel;
mod program_disk;
mod prometheus;
mod python_clients;
mod qemu;
mod root_disk;
mod stamp;
mod system_disk;

use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::initramfs;
use rustix::fs::{FlockOperation, flock};

use crate::cargo::build_static;
use crate::project::root;
use crate::shell::{Seconds, Size, command, progress, quietly};

/// Debian packages that tests and images are made with.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "mmdebstrap",
    "e2fsprogs",
    "kmod",
    "mount",
    "dmsetup",
    "strace",
    "systemd",
    "util-linux",
    "crun",
    "podman",
    "containerd",
    "containernetworking-plugins",
    "iproute2",
    "protobuf-compiler",
    "erofs-utils",
    "binutils",
    "gcc",
    "libc6-dev",
    "make",
    "python3-venv",
];

/// Arguments of `setup`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Look for a newer kernel even where one is cached
    #[arg(long)]
    refresh: bool,
}

/// Runs the subcommand.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let start = std::time::Instant::now();
    let assets = prepare(arguments.refresh)?;
    progress(format_args!(
        "ready in {}: {}",
        Seconds(start.elapsed()),
        assets.release
    ));
    Ok(0)
}

/// Sets up what is missing and returns where everything is. Every other subcommand calls it first.
pub fn ensure() -> Result<Assets> {
    prepare(false)
}

fn prepare(refresh: bool) -> Result<Assets> {
    let root = root();
    let cache = root.join(".cache");
    fs::create_dir_all(&cache).context(|| format!("create {}", cache.display()))?;
    let _lock = lock(&cache)?;
    apt::install(PACKAGES)?;
    qemu::ensure(&cache)?;
    prometheus::ensure(&cache, "promtool")?;
    let release = kernel::ensure(&cache, refresh)?;
    let assets = Assets::locate(&root, &release);
    thread::scope(|scope| {
        // Unpacking packages keeps about one processor busy, and downloads none.
        let disk = scope.spawn(|| root_disk::ensure(&root, &assets.root_disk));
        let agents = build_agents();
        disk.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        agents
    })?;
    initramfs::write_guest(&assets)?;
    initramfs::write_pod(&assets)?;
    other_kernel::ensure(&cache, &assets)?;
    let size = fs::metadata(&assets.guest_initramfs).map_or(0, |meta| meta.len());
    progress(format_args!("guest initramfs: {}", Size(size)));
    Ok(assets)
}

/// Builds what runs in guests.
fn build_agents() -> Result<()> {
    progress("building the agents of guests, pods and the nested machine (static)");
    build_static(
        "ebb-nested-machine",
        "nested-agent",
        &["--no-default-features"],
    )?;
    build_static("ebb-guest-agent", "ebb-guest", &[])?;
    build_static("ebb-pod", "ebb-pod-agent", &[])
}

/// Makes the image of a Debian with `ebb-guest` installed, for tests.
pub fn installed(assets: &Assets) -> Result<()> {
    let root = root();
    let _lock = lock(&root.join(".cache"))?;
    system_disk::ensure(&root, assets)
}

/// Debian's Prometheus, for a benchmark.
pub fn prometheus() -> Result<()> {
    let cache = root().join(".cache");
    let _lock = lock(&cache)?;
    prometheus::ensure(&cache, "prometheus")
}

/// Installs clients of Firecracker in Python, for tests.
pub fn clients() -> Result<()> {
    let root = root();
    let cache = root.join(".cache");
    let _lock = lock(&cache)?;
    python_clients::ensure(&root, &cache)
}

/// The Debian of [`installed`] without `ebb-guest`, packed.
pub fn system_base(assets: &Assets) -> Result<PathBuf> {
    let root = root();
    let _lock = lock(&root.join(".cache"))?;
    system_disk::base(&root, &root.join(".cache"), assets)
}

/// The program that makes Debian packages.
pub fn cargo_deb() -> Result<PathBuf> {
    let cache = root().join(".cache");
    let _lock = lock(&cache)?;
    cargo_deb::ensure(&cache)
}

/// An archive with the files of Debian packages, and of all that they need, that the Debian of [`system_base`] lacks. `status` is
/// the list of what is installed there.
pub fn packages_for_base(assets: &Assets, packages: &[&str], status: &Path) -> Result<PathBuf> {
    let base = system_base(assets)?.with_extension("stamp");
    let base = fs::read_to_string(&base).context(|| format!("read {}", base.display()))?;
    let cache = root().join(".cache");
    let _lock = lock(&cache)?;
    let packed = cache.join("system-needs.tar");
    let stamp = format!("{}\n{base}", packages.join(" "));
    stamp::ensure(&packed, stamp.as_bytes(), |folder| {
        apt::download(packages, status, folder)?;
        let mut tar = command("tar", ["--exclude=partial", "--exclude=lock", "-cf"]);
        tar.arg(&packed).arg("-C").arg(folder).arg(".");
        quietly(tar).map(drop)
    })?;
    Ok(packed)
}

/// Installs those of `packages` that are absent, for a subcommand that alone needs them.
pub fn debian_packages(packages: &[&str]) -> Result<()> {
    apt::install(packages)
}

/// Makes the image of a Debian with systemd and programs, for benchmarks.
pub fn programs(assets: &Assets) -> Result<()> {
    let root = root();
    // A lock of its own: nobody else needs it, and it takes minutes.
    let folder = root.join(".cache/programs");
    fs::create_dir_all(&folder).context(|| format!("create {}", folder.display()))?;
    let _lock = lock(&folder)?;
    program_disk::ensure(&root, assets)
}

/// Locks the cache, so that two setups of one repository do not run at once.
fn lock(cache: &Path) -> Result<fs::File> {
    let path = cache.join("lock");
    let what = || format!("lock {}", path.display());
    let file = fs::File::create(&path).context(what)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        progress("another setup is running: waiting for it");
        flock(&file, FlockOperation::LockExclusive).context(what)?;
    }
    Ok(file)
}
