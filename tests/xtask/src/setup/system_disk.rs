//! A Debian that boots by itself, with `ebb-guest` installed: an image and its initramfs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Result};

use super::root_disk::{Recipe, format};
use super::stamp;
use crate::shell::{Seconds, command, progress, quietly};

/// What the Debian is made of.
const RECIPE: &str = "resources/systemdisk.txt";
/// The systemd unit that reports the state of the arena on the console.
const UNIT: &str = "resources/systemdisk.service";

/// Makes the image and the initramfs unless they are there, made by the same recipe, kernel and `ebb-guest`.
pub fn ensure(root: &Path, assets: &Assets) -> Result<()> {
    let cache = root.join(".cache");
    let read = |path: &Path| fs::read(path).context(|| format!("read {}", path.display()));
    let base = base(root, &cache, assets)?;
    let stamp = [
        &*read(&base.with_extension("stamp"))?,
        &read(&root.join(UNIT))?,
        &read(&assets.ebb_guest_agent)?,
    ]
    .concat();
    let start = std::time::Instant::now();
    let made = stamp::ensure(&assets.system_disk, &stamp, |tree| {
        progress("installing ebb-guest into a Debian with systemd");
        install(root, assets, &base, tree)
    })?;
    if made {
        progress(format_args!("done in {}", Seconds(start.elapsed())));
    }
    Ok(())
}

/// The Debian with the kernel's modules and an initramfs that knows nothing of Ebb, packed.
pub fn base(root: &Path, cache: &Path, assets: &Assets) -> Result<PathBuf> {
    let recipe = Recipe::read(root, RECIPE)?;
    let packed = cache.join("system-base.tar");
    let stamp = format!("{}\n{}", recipe.text(), assets.release);
    stamp::ensure(&packed, stamp.as_bytes(), |tree| {
        recipe.unpack(tree)?;
        let release = &assets.release;
        let modules = assets.modules.to_string_lossy().into_owned();
        let kernel = |path: &Path| path.to_string_lossy().into_owned();
        for (what, to) in [
            (modules, "lib/modules"),
            (kernel(&assets.config), "boot"),
            (kernel(&assets.vmlinuz), "boot"),
        ] {
            let to = tree.join(to);
            fs::create_dir_all(&to).context(|| format!("create {}", to.display()))?;
            quietly(command("cp", ["-a", &what, &to.to_string_lossy()]))?;
        }
        let mut initramfs = command("chroot", [tree]);
        initramfs.args(["update-initramfs", "-c", "-k", release]);
        quietly(initramfs)?;
        let mut tar = command("tar", ["-cf"]);
        tar.arg(&packed).arg("-C").arg(tree).arg(".");
        quietly(tar).map(drop)
    })?;
    Ok(packed)
}

fn install(root: &Path, assets: &Assets, base: &Path, tree: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(tree); // Left by an interrupted run.
    fs::create_dir_all(tree).context(|| format!("create {}", tree.display()))?;
    let mut tar = command("tar", ["-xf"]);
    tar.arg(base).arg("-C").arg(tree);
    quietly(tar)?;
    // Twice, as users do: the second must change nothing that the first has made.
    for _ in 0..2 {
        let agent = assets.ebb_guest_agent.to_string_lossy();
        let mut program = command(&agent, ["install", "--root"]);
        program.arg(tree);
        quietly(program)?;
    }
    let mut verify = command("chroot", [tree]);
    verify.args(["systemd-analyze", "verify", "ebb-arena.service"]);
    quietly(verify)?;
    let unit = tree.join("etc/systemd/system/system.service");
    let what = || format!("install {}", unit.display());
    fs::copy(root.join(UNIT), &unit).context(what)?;
    let wants = tree.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).context(what)?;
    symlink("../system.service", wants.join("system.service")).context(what)?;
    let initramfs = tree.join(format!("boot/initrd.img-{}", assets.release));
    fs::copy(&initramfs, &assets.system_initramfs)
        .context(|| format!("copy {}", initramfs.display()))?;
    format(
        tree,
        &assets.system_disk,
        Recipe::read(root, RECIPE)?.setting("size")?,
    )
}
