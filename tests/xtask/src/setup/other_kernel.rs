//! A kernel of another version, with its modules: what a guest starts by kexec.

use std::fs;
use std::path::Path;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Result};
use ebb_nested_machine::initramfs;
use ebb_nested_machine::package::release;

use super::{apt, kernel};
use crate::shell::{command, progress, quietly};

/// Kernels whose structures differ from those of the one that guests boot.
const PATTERN: &str = r"^linux-image-6\.1\..*-cloud-amd64$";

/// Fetches it unless it lies in the cache, and makes its initramfs.
pub fn ensure(cache: &Path, assets: &Assets) -> Result<()> {
    let folder = cache.join("other-kernel");
    if !folder.exists() {
        fetch(&folder)?;
    }
    let modules = folder.join("lib/modules");
    let what = || format!("list {}", modules.display());
    let mut releases = fs::read_dir(&modules).context(what)?.flatten();
    let modules = releases.next().context(what)?.path();
    initramfs::write_guest(&Assets {
        modules,
        guest_initramfs: assets.other_initramfs.clone(),
        ..assets.clone()
    })
}

fn fetch(folder: &Path) -> Result<()> {
    apt::update()?;
    let kernel = kernel::choose(PATTERN)?;
    let release = release(&kernel).unwrap_or_default();
    let part = folder.with_extension("part");
    let _ = fs::remove_dir_all(&part); // Left by an interrupted run.
    fs::create_dir_all(&part).context(|| format!("create {}", part.display()))?;
    kernel::unpack(&kernel, &part)?;
    let mut depmod = command("/sbin/depmod", ["-b"]);
    depmod.arg(&part).arg(release);
    quietly(depmod)?;
    let image = part.join(format!("boot/vmlinuz-{release}"));
    let to = part.join("vmlinuz");
    fs::rename(&image, &to).context(|| format!("rename {}", image.display()))?;
    fs::rename(&part, folder).context(|| format!("rename to {}", folder.display()))?;
    progress(format_args!("kernel {release} ready"));
    Ok(())
}
