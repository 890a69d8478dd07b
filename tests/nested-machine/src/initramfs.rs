//! Builds the initramfs of the nested machine and that of the guests.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::assets::{Assets, Module};
use crate::cpio::Archive;
use crate::error::{Context, Error, Result};

/// Modules of a guest.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_balloon",
    "virtio-rng",
    "ext4",
    "pvpanic-mmio",
];

/// Modules that create `/dev/daxN.M` for arenas. A guest loads them only if it has an arena.
const ARENA_MODULES: &[&str] = &["device_dax", "dax_hmem"];

/// Modules of a guest with a network interface.
const NET_MODULES: &[&str] = &["virtio_net"];

/// Modules of a guest with a vsock.
const VSOCK_MODULES: &[&str] = &["vmw_vsock_virtio_transport"];

/// The module that tells the monitor where the kernel's note is. Tests load it; a Debian with udev does so by itself.
const NOTE_MODULES: &[&str] = &["qemu_fw_cfg"];

/// Modules that a guest loads when it is told to.
const MORE_MODULES: &[&str] = &["overlay", "virtio_mem"];

/// Modules of a guest that runs the containers of a pod.
const POD_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_balloon",
    "virtio-rng",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "qemu_fw_cfg",
    "overlay",
    "erofs",
    "ext4",
];

/// Modules of the nested machine: KVM, taps, disks that fail, and the vsock of its kernel.
const NESTED_MODULES: &[&str] = &[
    "irqbypass",
    "kvm",
    "kvm-amd",
    "tun",
    "loop",
    "dm-mod",
    "overlay",
    "vhost_vsock",
];

/// Parameters of these modules. Halted vCPUs must not poll, because the host is shared.
const NESTED_PARAMETERS: &[(&str, &str)] = &[("kvm", "halt_poll_ns=0")];

/// The guests' init.
const GUEST_INIT: &str = include_str!("../../../resources/guest-init.sh");

/// A host folder that the nested machine sees at the same path.
#[derive(Clone, Debug)]
pub struct Share {
    /// Absolute path.
    pub path: PathBuf,
    /// True if the machine may write to it.
    pub writable: bool,
}

/// The nested machine's initramfs.
///
/// # Errors
/// If a file cannot be read, or if a share's path is not absolute or has a line end.
pub fn nested_machine(assets: &Assets, shares: &[Share]) -> Result<Vec<u8>> {
    let mut archive = skeleton();
    archive.dir("/ebb");
    archive.file("/init", 0o755, &read(&assets.nested_agent)?);
    let modules = assets.load_modules(NESTED_MODULES)?;
    add_modules(&mut archive, &modules, "/ebb/modules", NESTED_PARAMETERS);
    let mut lines = String::new();
    for Share { path, writable } in shares {
        let text = path
            .to_str()
            .filter(|text| !text.contains('\n') && path.is_absolute());
        let text = text.context(|| format!("cannot share {path:?}"))?;
        let _ = writeln!(lines, "{} {text}", if *writable { "rw" } else { "ro" });
    }
    archive.file("/ebb/shares", 0o644, lines.as_bytes());
    Ok(archive.finish())
}

/// The guests' initramfs. `resources/guest-init.sh` describes it.
///
/// # Errors
/// If a file cannot be read.
pub fn guest(assets: &Assets) -> Result<Vec<u8>> {
    let mut archive = skeleton();
    for folder in [
        "/bin",
        "/sbin",
        "/usr",
        "/usr/bin",
        "/usr/sbin",
        "/etc",
        "/root",
        "/tmp",
    ] {
        archive.dir(folder);
    }
    archive.file("/bin/busybox", 0o755, &read(&assets.busybox)?);
    archive.symlink("/bin/sh", "busybox");
    archive.file("/init", 0o755, GUEST_INIT.as_bytes());
    if assets.ebb_guest_agent.exists() {
        archive.file("/bin/ebb-guest", 0o755, &read(&assets.ebb_guest_agent)?);
    }
    add_modules(
        &mut archive,
        &assets.load_modules(GUEST_MODULES)?,
        "/etc/modules",
        &[],
    );
    add_modules(
        &mut archive,
        &assets.load_modules(ARENA_MODULES)?,
        "/etc/modules.arena",
        &[],
    );
    add_modules(
        &mut archive,
        &assets.load_modules(NET_MODULES)?,
        "/etc/modules.net",
        &[],
    );
    add_modules(
        &mut archive,
        &assets.load_modules(VSOCK_MODULES)?,
        "/etc/modules.vsock",
        &[],
    );
    add_modules(
        &mut archive,
        &assets.load_modules(NOTE_MODULES)?,
        "/etc/modules.note",
        &[],
    );
    add_modules(
        &mut archive,
        &assets.load_modules(MORE_MODULES)?,
        "/etc/modules.more",
        &[],
    );
    Ok(archive.finish())
}

/// The initramfs of a guest that runs the containers of a pod: the agent, and the modules that it loads.
///
/// # Errors
/// If a file cannot be read.
pub fn pod(assets: &Assets) -> Result<Vec<u8>> {
    let mut archive = skeleton();
    for folder in ["/etc", "/run"] {
        archive.dir(folder);
    }
    archive.file("/init", 0o755, &read(&assets.pod_agent)?);
    let modules = assets.load_modules(POD_MODULES)?;
    add_modules(&mut archive, &modules, "/etc/modules", &[]);
    Ok(archive.finish())
}

/// Writes the guests' initramfs, unless it exists with the same content.
///
/// # Errors
/// Those of [`guest`], and if the file cannot be written.
pub fn write_guest(assets: &Assets) -> Result<()> {
    write(&assets.guest_initramfs, &guest(assets)?)
}

/// Writes the initramfs of pods' guests, unless it exists with the same content.
///
/// # Errors
/// Those of [`pod`], and if the file cannot be written.
pub fn write_pod(assets: &Assets) -> Result<()> {
    write(&assets.pod_initramfs, &pod(assets)?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let what = || format!("write {}", path.display());
    let folder = path.parent().ok_or_else(|| Error::new(what()))?;
    fs::create_dir_all(folder).context(what)?;
    let part = path.with_extension("part");
    fs::write(&part, bytes).context(what)?;
    fs::rename(&part, path).context(what)
}

/// The basic folders, and the console that the kernel opens for init.
fn skeleton() -> Archive {
    let mut archive = Archive::new();
    for folder in ["/dev", "/proc", "/sys", "/modules"] {
        archive.dir(folder);
    }
    archive.char_device("/dev/console", 5, 1);
    archive
}

/// Adds the modules and a file that lists them in load order, each with its path and parameters.
fn add_modules(archive: &mut Archive, modules: &[Module], list: &str, parameters: &[(&str, &str)]) {
    let mut lines = String::new();
    for module in modules {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.image);
        let options = parameters.iter().find(|(name, _)| *name == module.name);
        let line = format!("{path} {}", options.map_or("", |(_, options)| options));
        let _ = writeln!(lines, "{}", line.trim_end());
    }
    archive.file(list, 0o644, lines.as_bytes());
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("read {}", path.display()))
}
