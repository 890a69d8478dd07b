//! The guests' root disk: a small Debian in an ext4 image.

use std::fs;
use std::path::Path;

use ebb_nested_machine::error::{Context, Error, Result};

use super::stamp;
use crate::shell::{Seconds, Size, command, progress, quietly};

/// What the image is made of.
const RECIPE: &str = "resources/rootdisk.txt";
/// What it runs as init.
const INIT: &str = "resources/rootdisk-init.sh";

/// What a Debian is made of: lines of a name and a value.
pub struct Recipe {
    file: &'static str,
    text: String,
}

impl Recipe {
    /// Reads one of the repository's.
    pub fn read(root: &Path, file: &'static str) -> Result<Self> {
        let text = fs::read_to_string(root.join(file)).context(|| format!("read {file}"))?;
        Ok(Self { file, text })
    }

    /// The whole of it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// One value.
    pub fn setting(&self, name: &str) -> Result<&str> {
        let prefix = format!("{name} ");
        let line = self
            .text
            .lines()
            .find_map(|line| line.strip_prefix(&prefix));
        line.map(str::trim)
            .context(|| format!("{} has no line {name:?}", self.file))
    }

    /// Installs the Debian in the folder `tree`.
    pub fn unpack(&self, tree: &Path) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(
                "making a Debian needs root; run setup as root once",
            ));
        }
        if tree.exists() {
            fs::remove_dir_all(tree).context(|| format!("remove {}", tree.display()))?;
        }
        let (suite, packages) = (self.setting("suite")?, self.setting("packages")?);
        progress(format_args!(
            "making a Debian {suite} with {packages} (1 to 3 minutes)"
        ));
        let mut build = command(
            "mmdebstrap",
            ["--quiet", "--mode=root", "--format=directory"],
        );
        build
            .arg(format!("--variant={}", self.setting("variant")?))
            .arg(format!("--include={packages}"))
            .args([
                "--aptopt=Acquire::Languages \"none\"",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
            ])
            .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
            .arg(suite)
            .arg(tree);
        quietly(build).map(drop)
    }
}

/// Makes an ext4 image of the folder `tree`.
pub fn format(tree: &Path, image: &Path, size: &str) -> Result<()> {
    let part = image.with_extension("part");
    let _ = fs::remove_file(&part); // Left by an interrupted run.
    let mut format = command(
        "/sbin/mke2fs",
        ["-q", "-F", "-t", "ext4", "-L", "ebb-root", "-d"],
    );
    format.arg(tree).arg(&part).arg(size);
    quietly(format)?;
    let size = fs::metadata(&part).map_or(0, |meta| meta.len());
    progress(format_args!("ext4 image of {}", Size(size)));
    fs::rename(&part, image).context(|| format!("rename to {}", image.display()))
}

/// Makes the image unless it is there and made by the same recipe.
pub fn ensure(root: &Path, image: &Path) -> Result<()> {
    let recipe = Recipe::read(root, RECIPE)?;
    let init = fs::read_to_string(root.join(INIT)).context(|| format!("read {INIT}"))?;
    let stamp = format!("{}\n{init}", recipe.text());
    let start = std::time::Instant::now();
    let made = stamp::ensure(image, stamp.as_bytes(), |tree| {
        recipe.unpack(tree)?;
        install_init(&root.join(INIT), tree)?;
        format(tree, image, recipe.setting("size")?)
    })?;
    if made {
        progress(format_args!(
            "root disk ready in {}",
            Seconds(start.elapsed())
        ));
    }
    Ok(())
}

fn install_init(from: &Path, tree: &Path) -> Result<()> {
    let to = tree.join("sbin/ebb-init");
    let what = || format!("install {}", to.display());
    fs::copy(from, &to).context(what)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&to, mode).context(what)?;
    let init = tree.join("sbin/init");
    if init.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("ebb-init", &init)
            .context(|| format!("link {}", init.display()))?;
    }
    Ok(())
}
