//! Debian packages: what is installed, and installing the rest.

use std::path::{Path, PathBuf};
use std::process::Command;

use nested_machine::error::{Context, Error, Result};

use crate::shell::{Seconds, command, progress, quietly};

/// The keys of Debian's archive, from the package debian-archive-keyring, which every Debian has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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

/// The backports of the release that is installed, with an index of their own: the machine's list of sources
/// stays as it is.
pub struct Backports {
    folder: PathBuf,
}

impl Backports {
    /// Fetches their index into `folder`, from the mirror that the machine uses.
    pub fn of_this_release(folder: &Path) -> Result<Self> {
        let listed = quietly(command(
            "apt-get",
            [
                "indextargets",
                "--format",
                "$(REPO_URI)|$(RELEASE)|$(COMPONENT)",
                "Created-By: Packages",
            ],
        ))?;
        let os_release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let line = codename(&os_release)
            .and_then(|codename| source_line(&listed, codename))
            .ok_or_else(|| Error::new("the package sources name no Debian release".to_owned()))?;
        for place in [folder.join("lists/partial"), folder.join("cache")] {
            std::fs::create_dir_all(&place).context(|| format!("create {}", place.display()))?;
        }
        let list = folder.join("sources.list");
        std::fs::write(&list, line).context(|| format!("write {}", list.display()))?;
        let backports = Self {
            folder: folder.to_path_buf(),
        };
        progress("apt-get update (backports)");
        let mut update = backports.apt_get();
        update.arg("update");
        quietly(update)?;
        Ok(backports)
    }

    /// Downloads packages, without what they depend on, into `folder`.
    pub fn download(&self, packages: &[&str], folder: &Path) -> Result<()> {
        progress(format_args!("downloading {}", packages.join(" ")));
        let mut download = self.apt_get();
        download.arg("download").args(packages).current_dir(folder);
        quietly(download).map(drop)
    }

    fn apt_get(&self) -> Command {
        let set = |name: &str, value: &Path| ["-o".into(), format!("{name}={}", value.display())];
        let mut apt_get = command("apt-get", ["-o", "APT::Sandbox::User=root"]);
        apt_get
            .args(set(
                "Dir::Etc::sourcelist",
                &self.folder.join("sources.list"),
            ))
            .args(set("Dir::Etc::sourceparts", Path::new("/dev/null")))
            .args(set("Dir::State::lists", &self.folder.join("lists")))
            .args(set("Dir::Cache", &self.folder.join("cache")));
        apt_get
    }
}

/// The release's name in the text of os-release(5).
fn codename(os_release: &str) -> Option<&str> {
    let mut lines = os_release.lines();
    lines.find_map(|line| line.strip_prefix("VERSION_CODENAME="))
}

/// The line of sources.list(5) for a release's backports, from `URI|release|component` of the sources in use.
fn source_line(targets: &str, codename: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split('|').collect();
        let &[uri, release, component] = fields.as_slice() else {
            return None;
        };
        (release == codename && component == "main")
            .then(|| format!("deb [signed-by={KEYRING}] {uri} {codename}-backports main\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_come_from_the_mirror_in_use() {
        let targets = "http://m.test/deb/|bookworm-updates|main\n\
                       http://other.test/|sdk|main\n\
                       http://m.test/deb/|bookworm|main\n";
        assert_eq!(
            source_line(targets, "bookworm").unwrap(),
            format!("deb [signed-by={KEYRING}] http://m.test/deb/ bookworm-backports main\n")
        );
        assert_eq!(source_line(targets, "trixie"), None);
    }

    #[test]
    fn the_release_has_a_name() {
        assert_eq!(
            codename("ID=debian\nVERSION_CODENAME=bookworm\n"),
            Some("bookworm")
        );
        assert_eq!(codename("ID=arch\n"), None);
    }
}
