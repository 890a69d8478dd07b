//! The program that makes Debian packages of ours, built once.

use std::fs;
use std::path::{Path, PathBuf};

use ebb_nested_machine::error::{Context, Error, Result};

use crate::cargo::cargo;
use crate::project::root;
use crate::shell::{command, progress, quietly, visibly};

const VERSION: &str = "3.8.0";

/// Makes sure that it is in the cache, and returns its path.
pub fn ensure(cache: &Path) -> Result<PathBuf> {
    let place = cache.join("cargo-deb");
    let tool = place.join("bin/cargo-deb");
    let version = || quietly(command(&tool.to_string_lossy(), ["--version"])).ok();
    if tool.is_file() && version().is_some_and(|it| it.trim().ends_with(VERSION)) {
        return Ok(tool);
    }
    progress(format_args!(
        "building cargo-deb {VERSION} (a minute, once)"
    ));
    let words = [
        "install",
        "--quiet",
        // Built sooner; what compresses is optimized in its profile for that, too.
        "--debug",
        "--locked",
        "--force",
        "--version",
        VERSION,
    ];
    let mut install = cargo(words);
    let built = root().join("target/cargo-deb");
    install.arg("--root").arg(&place).arg("cargo-deb");
    install.env("CARGO_TARGET_DIR", &built);
    if !visibly(install)? {
        return Err(Error::new("cargo-deb could not be built"));
    }
    fs::remove_dir_all(&built).context(|| format!("remove {}", built.display()))?;
    Ok(tool)
}
