//! Builds the initramfs of the nested machine and that of the guests.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use ebb_pod_image::initramfs::{self, add_modules, skeleton, write};

use crate::assets::Assets;
use crate::error::{Context, Result};

/// Modules of a guest.
const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
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

/// Modules of the nested machine: KVM, taps, disks that fail or are thin, the vsock of its kernel, and the networks of pods.
const NESTED_MODULES: &[&str] = &[
    "irqbypass",
    "kvm",
    "kvm-amd",
    "tun",
    "loop",
    "dm-mod",
    "dm-thin-pool",
    "overlay",
    "vhost_vsock",
    "veth",
    "bridge",
    "sch_ingress",
    "cls_u32",
    "act_mirred",
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
/// If a file cannot be read or written.
pub fn write_pod(assets: &Assets) -> Result<()> {
    let pod = initramfs::pod(&assets.pod_agent, &assets.modules)?;
    write(&assets.pod_initramfs, &pod)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("read {}", path.display()))
}
