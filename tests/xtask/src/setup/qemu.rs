//! The emulator of the nested machine: a newer QEMU than Debian 12 has, unpacked with its libraries.
//!
//! Older versions crash guests and the nested machine's own kernel. Before 8.1 the multi-threaded translator could cache
//! an instruction that another processor was just patching (fixed by QEMU's commit deba78709ae8, "Always lock pages
//! before translation"). Before 10.2 pending interrupts were noted without atomic operations, and one could be lost at
//! an exit from SVM. The backports of the next Debian release have a version with neither fault.

use std::fs;
use std::path::Path;
use std::process::Command;

use ebb_nested_machine::assets::{emulator, emulator_folder};
use ebb_nested_machine::error::{Context, Error, Result};

use super::apt;
use crate::shell::{Seconds, command, progress, quietly};

/// The Debian release that it comes from.
const RELEASE: &str = "trixie";

/// The first version without the faults that are known.
const FIXED: (u32, u32) = (10, 2);

/// Makes sure that there is such an emulator, if the mirror has one; nothing outside the cache changes.
pub fn ensure(cache: &Path) -> Result<()> {
    let place = emulator_folder(cache);
    if place.exists() || installed_version()? >= FIXED {
        return Ok(());
    }
    if let Err(error) = fetch(cache, &place) {
        let (major, minor) = installed_version()?;
        progress(format_args!(
            "no newer QEMU from {RELEASE} ({error}): QEMU {major}.{minor} will do, \
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
    let index = cache.join(RELEASE);
    let release = apt::Release::index(RELEASE, &index).or_else(|_| {
        apt::renew_keys()?;
        apt::Release::index(RELEASE, &index)
    })?;
    let debs = release.download("qemu-system-x86")?;
    let part = place.with_extension("unpacking");
    if part.exists() {
        remove(&part)?;
    }
    fs::create_dir_all(&part).context(|| format!("create {}", part.display()))?;
    let entries = fs::read_dir(&debs).context(|| format!("list {}", debs.display()))?;
    for entry in entries.flatten() {
        if entry.path().extension().is_some_and(|it| it == "deb") {
            let mut unpack = command("dpkg", ["-x"]);
            unpack.arg(entry.path()).arg(&part);
            quietly(unpack)?;
        }
    }
    let words = emulator(&part);
    let mut ask = Command::new(&words[0]);
    ask.args(&words[1..]).arg("--version");
    let said = quietly(ask)?;
    if version(&said).is_none_or(|version| version < FIXED) {
        return Err(Error::new(format!("{} is no better", said.trim())));
    }
    fs::rename(&part, place).context(|| format!("rename to {}", place.display()))?;
    remove(&index)?;
    let said = said.lines().next().unwrap_or_default();
    progress(format_args!("{said} ready, {}", Seconds(start.elapsed())));
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).context(|| format!("remove {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_first_two_numbers() {
        let said = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(version(said), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 11.1.3"), Some((11, 1)));
        assert_eq!(version("no such program"), None);
        assert!((10, 0) < FIXED && (11, 1) > FIXED);
    }
}
