//! Initial RAM disks: what each has, and that of a pod's guest.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::cpio::Archive;
use crate::error::{Context, Error, Result};
use crate::modules::{self, Module};

/// Modules of a guest that runs the containers of a pod.
const POD_MODULES: &[&str] = &[
    "virtio_pci",
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

/// The initramfs of a guest that runs the containers of a pod: the agent in this file, and the modules that it loads, from a
/// kernel's folder of modules.
///
/// # Errors
/// If a file cannot be read, or the kernel lacks a module.
pub fn pod(agent: &Path, modules: &Path) -> Result<Vec<u8>> {
    let mut archive = skeleton();
    for folder in ["/etc", "/run"] {
        archive.dir(folder);
    }
    let agent = fs::read(agent).context(|| format!("read {}", agent.display()))?;
    archive.file("/init", 0o755, &agent);
    let modules = modules::load(modules, POD_MODULES)?;
    add_modules(&mut archive, &modules, "/etc/modules", &[]);
    Ok(archive.finish())
}

/// The basic folders, and the console that the kernel opens for init.
#[must_use]
pub fn skeleton() -> Archive {
    let mut archive = Archive::new();
    for folder in ["/dev", "/proc", "/sys", "/modules"] {
        archive.dir(folder);
    }
    archive.char_device("/dev/console", 5, 1);
    archive
}

/// Adds the modules and a file that lists them in load order, each with its path and parameters.
pub fn add_modules(
    archive: &mut Archive,
    modules: &[Module],
    list: &str,
    parameters: &[(&str, &str)],
) {
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

/// Writes a file at once, unless it exists with the same content.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
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
