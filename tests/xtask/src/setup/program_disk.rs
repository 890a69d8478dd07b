//! A Debian with systemd, a compiler, databases and apt, for benchmarks: an image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use ebb_nested_machine::assets::Assets;
use ebb_nested_machine::error::{Context, Result};

use super::root_disk::{Recipe, format};
use super::stamp;
use crate::shell::{Seconds, command, progress, quietly};

/// What the Debian is made of.
const RECIPE: &str = "resources/programs.txt";
/// The systemd unit that the host drives the guest by.
const UNIT: &str = "resources/programs.service";
/// Units that would work by themselves at times that nobody chooses, or that are started when they are wanted.
const MASKED: [&str; 6] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "serial-getty@ttyS0.service",
];
/// Units that are started when they are wanted.
const STOPPED: [&str; 2] = ["postgresql.service", "redis-server.service"];

/// Makes the image unless it is there, made by the same recipe and unit, and with the kernel's modules.
pub fn ensure(root: &Path, assets: &Assets) -> Result<()> {
    let recipe = Recipe::read(root, RECIPE)?;
    let unit = root.join(UNIT);
    let unit = fs::read_to_string(&unit).context(|| format!("read {}", unit.display()))?;
    let stamp = format!("{}\n{unit}\n{}", recipe.text(), assets.release);
    let start = std::time::Instant::now();
    let image = &assets.program_disk;
    let made = stamp::ensure(image, stamp.as_bytes(), |tree| {
        recipe.unpack(tree)?;
        let modules = tree.join("lib/modules");
        fs::create_dir_all(&modules).context(|| format!("create {}", modules.display()))?;
        let mut copy = command("cp", ["-a"]);
        copy.arg(&assets.modules).arg(&modules);
        quietly(copy)?;
        units(tree, &unit)?;
        format(tree, image, recipe.setting("size")?)
    })?;
    if made {
        let time = Seconds(start.elapsed());
        progress(format_args!("the Debian with programs is ready in {time}"));
    }
    Ok(())
}

/// Installs the unit, and keeps others from starting.
fn units(tree: &Path, text: &str) -> Result<()> {
    let system = tree.join("etc/systemd/system");
    let unit = system.join("programs.service");
    let what = || format!("install {}", unit.display());
    fs::write(&unit, text).context(what)?;
    let wants = system.join("multi-user.target.wants");
    fs::create_dir_all(&wants).context(what)?;
    let link = wants.join("programs.service");
    let _ = fs::remove_file(&link);
    symlink("../programs.service", link).context(what)?;
    for (verb, units) in [("mask", &MASKED[..]), ("disable", &STOPPED[..])] {
        let mut systemctl = command("systemctl", ["--quiet", "--root"]);
        systemctl.arg(tree).arg(verb).args(units);
        quietly(systemctl)?;
    }
    Ok(())
}
