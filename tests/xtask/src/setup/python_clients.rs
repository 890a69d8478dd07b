//! Clients of Firecracker in Python that others wrote, in an environment of their own in the cache.

use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Result};

use super::stamp;
use crate::shell::{Seconds, command, progress, quietly};

/// What is installed.
const REQUIREMENTS: &str = "tests/clients/python/requirements.txt";

/// Makes the environment `CACHE/python-clients` unless it is there, made from the same requirements.
pub fn ensure(root: &Path, cache: &Path) -> Result<()> {
    let requirements = root.join(REQUIREMENTS);
    let what = || format!("read {}", requirements.display());
    let wanted = fs::read(&requirements).context(what)?;
    let place = cache.join("python-clients");
    let start = std::time::Instant::now();
    let made = stamp::ensure(&place, &wanted, |_| {
        progress("installing clients of Firecracker in Python (a minute)");
        // An environment knows its own path, so it is made where it stays. The stamp says when it is whole.
        let _ = fs::remove_dir_all(&place);
        let mut make = command("python3", ["-m", "venv"]);
        make.arg(&place);
        quietly(make)?;
        let pip = place.join("bin/pip");
        let words = ["install", "--disable-pip-version-check", "-r"];
        let mut install = command(&pip.to_string_lossy(), words);
        install.arg(&requirements);
        quietly(install).map(drop)
    })?;
    if made {
        let time = Seconds(start.elapsed());
        progress(format_args!(
            "the clients in Python are installed in {time}"
        ));
    }
    Ok(())
}
