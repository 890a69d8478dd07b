//! Prometheus' programs, taken out of Debian's package: the package itself would start a server.

use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Result};

use super::apt;
use crate::shell::{Seconds, command, progress, quietly};

/// Makes sure that there is the package's program `name` in the cache; nothing outside changes.
pub fn ensure(cache: &Path, name: &str) -> Result<()> {
    let place = cache.join(name);
    if place.exists() {
        return Ok(());
    }
    let start = std::time::Instant::now();
    let part = cache.join("prometheus.unpacking");
    let _ = fs::remove_dir_all(&part); // Left by a setup that was interrupted.
    fs::create_dir_all(&part).context(|| format!("create {}", part.display()))?;
    progress(format_args!(
        "downloading {name} (Debian's prometheus, 19 MB)"
    ));
    let download = || {
        let mut download = command("apt-get", ["-o", "APT::Sandbox::User=root", "download"]);
        download.arg("prometheus").current_dir(&part);
        quietly(download)
    };
    // The index of a fresh image is empty or old.
    download().or_else(|_| apt::update().and_then(|()| download()))?;
    let entries = fs::read_dir(&part).context(|| format!("list {}", part.display()))?;
    for entry in entries.flatten() {
        let mut unpack = command("dpkg", ["-x"]);
        unpack.arg(entry.path()).arg(&part);
        quietly(unpack)?;
    }
    let program = part.join("usr/bin").join(name);
    fs::rename(&program, &place).context(|| format!("rename {}", program.display()))?;
    fs::remove_dir_all(&part).context(|| format!("remove {}", part.display()))?;
    progress(format_args!("{name} ready, {}", Seconds(start.elapsed())));
    Ok(())
}
