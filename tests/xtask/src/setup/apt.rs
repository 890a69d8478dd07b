//! Debian packages: what is installed, and installing the rest.

use nested_machine::error::{Context, Error, Result};

use crate::shell::{Seconds, command, progress, quietly};

/// Installs those of `packages` that are absent.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        let remedy = format!("apt-get install --no-install-recommends {list}");
        return Err(Error::new(format!(
            "packages are missing; run as root: {remedy}"
        )));
    }
    update()?;
    let start = std::time::Instant::now();
    progress(format_args!("installing {list}"));
    let mut install = command("apt-get", ["install", "-y", "--no-install-recommends"]);
    install
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive");
    quietly(install)?;
    progress(format_args!("installed in {}", Seconds(start.elapsed())));
    Ok(())
}

/// Fetches the package index.
pub fn update() -> Result<()> {
    progress("apt-get update");
    let mut update = command("apt-get", ["update"]);
    update.env("DEBIAN_FRONTEND", "noninteractive");
    quietly(update).map(drop)
}

fn missing(packages: &[&str]) -> Result<Vec<String>> {
    let mut query = command(
        "dpkg-query",
        ["-W", "-f", "${Package} ${db:Status-Status}\n"],
    );
    let output = query.args(packages).output().context(|| {
        "run dpkg-query: setup knows Debian 12 only; elsewhere install QEMU, busybox-static, \
         mmdebstrap and kmod by hand"
            .to_owned()
    })?;
    // It fails when a package is unknown, and still lists the others.
    let installed = String::from_utf8_lossy(&output.stdout).into_owned();
    let has = |name: &str| {
        installed
            .lines()
            .any(|line| line == format!("{name} installed"))
    };
    Ok(packages
        .iter()
        .filter(|name| !has(name))
        .map(|&name| name.to_owned())
        .collect())
}
