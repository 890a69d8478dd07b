//! The emulator of the nested machine: one that patches running code without a race.
//!
//! Before 8.1 QEMU's multi-threaded translator could cache an instruction that another processor was just
//! patching (fixed by its commit deba78709ae8, "Always lock pages before translation"): a Linux kernel with several
//! processors dies of that, now and then, early in its boot. Debian 12 has 7.2, and a newer one among its backports.

use std::fs;
use std::path::Path;

use nested_machine::assets::qemu_folder;
use nested_machine::error::{Context, Error, Result};

use super::apt;
use crate::shell::{Seconds, command, progress, quietly};

/// What has to be unpacked; the libraries are those of the distribution's own QEMU.
const PACKAGES: &[&str] = &[
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
];

/// The first version without the race.
const FIXED: (u32, u32) = (8, 1);

/// Makes sure that there is an emulator without the race, if the distribution has one; nothing outside
/// the cache changes.
pub fn ensure(cache: &Path) -> Result<()> {
    let place = qemu_folder(cache);
    if place.exists() || installed_version()? >= FIXED {
        return Ok(());
    }
    if let Err(error) = fetch(cache, &place) {
        let (major, minor) = installed_version()?;
        progress(format_args!(
            "no newer QEMU from the distribution's backports ({error}): QEMU {major}.{minor} will do, \
             but its guests with several processors die now and then"
        ));
    }
    Ok(())
}

fn installed_version() -> Result<(u32, u32)> {
    let said = quietly(command("qemu-system-x86_64", ["--version"]))?;
    version(&said).context(|| format!("find QEMU's version in {said:?}"))
}

/// The first two numbers in `QEMU emulator version 7.2.22 (Debian …)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split_once("version ")?.1.split('.');
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

fn fetch(cache: &Path, place: &Path) -> Result<()> {
    let start = std::time::Instant::now();
    let backports = apt::Backports::of_this_release(&cache.join("apt"))?;
    let part = place.with_file_name("qemu-unpacking");
    if part.exists() {
        fs::remove_dir_all(&part).context(|| format!("remove {}", part.display()))?;
    }
    let debs = part.join("debs");
    fs::create_dir_all(&debs).context(|| format!("create {}", debs.display()))?;
    backports.download(PACKAGES, &debs)?;
    let entries = fs::read_dir(&debs).context(|| format!("list {}", debs.display()))?;
    for entry in entries.flatten() {
        let mut unpack = command("dpkg", ["-x"]);
        unpack.arg(entry.path()).arg(&part);
        quietly(unpack)?;
    }
    fs::remove_dir_all(&debs).context(|| format!("remove {}", debs.display()))?;
    // It may lack a library that the distribution's own did not need: then it is not taken.
    let program = part.join("usr/bin/qemu-system-x86_64");
    let said = quietly(command(&program.to_string_lossy(), ["--version"]))?;
    if version(&said).is_none_or(|version| version < FIXED) {
        return Err(Error::new(format!("{} is no better", said.trim())));
    }
    fs::rename(&part, place).context(|| format!("rename to {}", place.display()))?;
    let said = said.lines().next().unwrap_or_default();
    progress(format_args!("{said} ready, {}", Seconds(start.elapsed())));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_first_two_numbers() {
        let said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(version(said), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(version("no such program"), None);
        assert!((8, 0) < FIXED && (10, 0) > FIXED);
    }
}
