//! Which of the installed kernels guests boot.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// A kernel as Debian's packages install it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What `uname -r` says, such as `6.1.0-41-cloud-amd64`.
    pub release: String,
    /// Its image, a bzImage.
    pub image: PathBuf,
    /// The folder with modules.dep.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel below `root` of this release; without one, the newest of those for clouds, or of all if there is none.
    ///
    /// # Errors
    /// If there is none, or it has no modules.
    pub fn find(root: &Path, release: Option<&str>) -> Result<Self> {
        let release = match release {
            Some(release) => release.to_owned(),
            None => newest(&releases(root)?)
                .context(|| {
                    "no kernel in /boot: apt-get install linux-image-cloud-amd64".to_owned()
                })?
                .to_owned(),
        };
        let found = Self {
            image: root.join(format!("boot/vmlinuz-{release}")),
            modules: root.join("lib/modules").join(&release),
            release,
        };
        for needed in [found.image.clone(), found.modules.join("modules.dep")] {
            if !needed.exists() {
                return Err(Error::new(format!(
                    "{} is missing: is the package linux-image-{} installed?",
                    needed.display(),
                    found.release
                )));
            }
        }
        Ok(found)
    }
}

/// The releases of all kernels in /boot.
fn releases(root: &Path) -> Result<Vec<String>> {
    let boot = root.join("boot");
    let entries = fs::read_dir(&boot).context(|| format!("list {}", boot.display()))?;
    let names = entries
        .flatten()
        .filter_map(|it| it.file_name().into_string().ok());
    Ok(names
        .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
        .collect())
}

/// The newest kernel for clouds, which lacks drivers that a guest does not need; the newest of all if there is none.
fn newest(releases: &[String]) -> Option<&str> {
    let is_for_clouds = |release: &&String| release.ends_with("-cloud-amd64");
    let by_version = |a: &&String, b: &&String| compare(a, b);
    let all = || releases.iter();
    let clouds = all().filter(is_for_clouds).max_by(by_version);
    clouds
        .or_else(|| all().max_by(by_version))
        .map(String::as_str)
}

/// Orders two versions: runs of digits by value, other runs as text (deb-version(7), in short).
#[must_use]
pub fn compare(a: &str, b: &str) -> Ordering {
    runs(a).cmp(runs(b))
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Run<'a> {
    Text(&'a str),
    Number(u64),
}

fn runs(mut text: &str) -> impl Iterator<Item = Run<'_>> {
    std::iter::from_fn(move || {
        let digit = text.chars().next()?.is_ascii_digit();
        let end = text
            .find(|c: char| c.is_ascii_digit() != digit)
            .unwrap_or(text.len());
        let (run, rest) = text.split_at(end);
        text = rest;
        Some(if digit {
            Run::Number(run.parse().unwrap_or(u64::MAX))
        } else {
            Run::Text(run)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path, release: &str) {
        let modules = root.join("lib/modules").join(release);
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::write(root.join(format!("boot/vmlinuz-{release}")), "").unwrap();
        fs::write(modules.join("modules.dep"), "").unwrap();
    }

    #[test]
    fn the_newest_kernel_for_clouds_comes_first() {
        let root = tempfile::tempdir().unwrap();
        let found = |wanted| Kernel::find(root.path(), wanted).map(|kernel| kernel.release);
        assert!(found(None).is_err());
        install(root.path(), "6.1.0-41-amd64");
        assert_eq!(found(None).unwrap(), "6.1.0-41-amd64");
        for release in [
            "6.1.0-9-cloud-amd64",
            "6.1.0-40-cloud-amd64",
            "6.12.9+deb12-amd64",
        ] {
            install(root.path(), release);
        }
        assert_eq!(found(None).unwrap(), "6.1.0-40-cloud-amd64");
        let wanted = "6.12.9+deb12-amd64";
        assert_eq!(found(Some(wanted)).unwrap(), wanted);
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let said = |wanted| {
            let error = Kernel::find(root.path(), wanted).unwrap_err();
            error.to_string()
        };
        fs::create_dir(root.path().join("boot")).unwrap();
        assert!(said(None).contains("apt-get install linux-image-cloud-amd64"));
        install(root.path(), "6.1.0-40-cloud-amd64");
        let dep = "lib/modules/6.1.0-40-cloud-amd64/modules.dep";
        fs::remove_file(root.path().join(dep)).unwrap();
        assert!(said(None).contains(dep), "{}", said(None));
        assert!(said(Some("7")).contains("package linux-image-7"));
    }
}
