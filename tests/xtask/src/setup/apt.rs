//! Debian packages: finds what is installed, and installs the rest.

use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_nested_machine::error::{Context, Error, Result};

use crate::shell::{Seconds, command, progress, quietly};

/// The keys of Debian's archive, from the package debian-archive-keyring, which every Debian has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Installs the newest archive keys: an image that is older than a release lacks the key that signed it.
pub fn renew_keys() -> Result<()> {
    let words = ["install", "-y", "--only-upgrade", "debian-archive-keyring"];
    let mut install = command("apt-get", words);
    install.env("DEBIAN_FRONTEND", "noninteractive");
    quietly(install).map(drop)
}

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

/// Downloads those of `packages`, and of all that they depend on, that a Debian lacks, into `folder`. `status` is that Debian's
/// list of what is installed.
pub fn download(packages: &[&str], status: &Path, folder: &Path) -> Result<()> {
    let partial = folder.join("partial");
    std::fs::create_dir_all(&partial).context(|| format!("create {}", partial.display()))?;
    update()?;
    progress(format_args!("downloading {}", packages.join(", ")));
    let words = [
        "install",
        "-y",
        "--no-install-recommends",
        "--download-only",
    ];
    let mut fetch = command("apt-get", words);
    fetch
        .args(["-o", "APT::Sandbox::User=root"])
        .args(["-o", &format!("Dir::State::status={}", status.display())])
        .args(["-o", &format!("Dir::Cache::archives={}", folder.display())])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    quietly(fetch).map(drop)
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
    // It fails if a package is unknown, but lists the others.
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

/// The packages of another release of Debian and its backports. Their index and state are kept apart from the
/// host's, which do not change.
pub struct Release {
    folder: PathBuf,
    codename: &'static str,
}

impl Release {
    /// Fetches their index into `folder`, from the mirror that the machine uses.
    pub fn index(codename: &'static str, folder: &Path) -> Result<Self> {
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
        let mirror = installed_codename(&os_release)
            .and_then(|installed| mirror(&listed, installed))
            .ok_or_else(|| Error::new("the package sources name no Debian release".to_owned()))?;
        for place in ["lists/partial", "cache/archives/partial"] {
            let place = folder.join(place);
            std::fs::create_dir_all(&place).context(|| format!("create {}", place.display()))?;
        }
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).context(|| format!("write {}", path.display()))
        };
        write("sources.list", &sources(mirror, codename))?;
        // No package counts as installed, so that every library is downloaded too.
        write("status", "")?;
        let release = Self {
            folder: folder.to_path_buf(),
            codename,
        };
        progress(format_args!("apt-get update ({codename})"));
        let mut update = release.apt_get();
        update.arg("update");
        quietly(update)?;
        Ok(release)
    }

    /// Downloads a package and all that it depends on. Returns the folder of the files.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        progress(format_args!("downloading {package} ({})", self.codename));
        let mut download = self.apt_get();
        download
            .args([
                "install",
                "-y",
                "--download-only",
                "--no-install-recommends",
            ])
            .arg("-t")
            .arg(format!("{}-backports", self.codename))
            .arg(package);
        quietly(download)?;
        Ok(self.folder.join("cache/archives"))
    }

    fn apt_get(&self) -> Command {
        let set = |name: &str, value: &str| {
            let path = self.folder.join(value);
            ["-o".into(), format!("{name}={}", path.display())]
        };
        let words = [
            "APT::Sandbox::User=root",
            "Debug::NoLocking=1",
            "Acquire::Retries=3",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
        ];
        let mut apt_get = command("apt-get", words.iter().flat_map(|word| ["-o", word]));
        apt_get
            .args(set("Dir::Etc::sourcelist", "sources.list"))
            .args(set("Dir::State", "."))
            .args(set("Dir::State::lists", "lists"))
            .args(set("Dir::State::status", "status"))
            .args(set("Dir::Cache", "cache"))
            .env("DEBIAN_FRONTEND", "noninteractive");
        apt_get
    }
}

/// The release's name in the text of os-release(5).
fn installed_codename(os_release: &str) -> Option<&str> {
    let mut lines = os_release.lines();
    lines.find_map(|line| line.strip_prefix("VERSION_CODENAME="))
}

/// The address that the installed release comes from, by `URI|release|component` of the sources in use.
fn mirror<'a>(targets: &'a str, installed: &str) -> Option<&'a str> {
    targets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split('|').collect();
        let &[uri, release, component] = fields.as_slice() else {
            return None;
        };
        (release == installed && component == "main").then_some(uri)
    })
}

/// sources.list(5) for a release and its backports.
fn sources(mirror: &str, codename: &str) -> String {
    ["", "-backports"]
        .map(|suffix| format!("deb [signed-by={KEYRING}] {mirror} {codename}{suffix} main\n"))
        .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_release_comes_from_the_mirror_in_use() {
        let targets = "http://m.test/deb/|bookworm-updates|main\n\
                       http://other.test/|sdk|main\n\
                       http://m.test/deb/|bookworm|main\n";
        let mirror_in_use = mirror(targets, "bookworm").unwrap();
        assert_eq!(mirror_in_use, "http://m.test/deb/");
        assert_eq!(mirror(targets, "trixie"), None);
        assert_eq!(
            sources(mirror_in_use, "trixie"),
            format!(
                "deb [signed-by={KEYRING}] http://m.test/deb/ trixie main\n\
                 deb [signed-by={KEYRING}] http://m.test/deb/ trixie-backports main\n"
            )
        );
    }

    #[test]
    fn the_release_has_a_name() {
        assert_eq!(
            installed_codename("ID=debian\nVERSION_CODENAME=bookworm\n"),
            Some("bookworm")
        );
        assert_eq!(installed_codename("ID=arch\n"), None);
    }
}
