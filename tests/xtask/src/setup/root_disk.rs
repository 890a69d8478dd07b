//! The guests' root disk: a small Debian in an ext4 image.

use std::fs;
use std::path::Path;

use nested_machine::error::{Context, Error, Result};

use crate::shell::{Seconds, Size, command, progress, quietly};

/// What the image is made of.
const RECIPE: &str = "resources/rootdisk.txt";
/// What it runs as init.
const INIT: &str = "resources/rootdisk-init.sh";

/// Makes the image unless it is there and made by the same recipe.
pub fn ensure(root: &Path, image: &Path) -> Result<()> {
    let read = |name: &str| fs::read_to_string(root.join(name)).context(|| format!("read {name}"));
    let (recipe, init) = (read(RECIPE)?, read(INIT)?);
    let stamp_file = image.with_extension("stamp");
    let stamp = format!("{recipe}\n{init}");
    if image.exists() && fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let start = std::time::Instant::now();
    let tree = image.with_extension("tree");
    let result = make(&recipe, &root.join(INIT), &tree, image);
    let _ = fs::remove_dir_all(&tree); // A failed build leaves half a tree.
    result?;
    fs::write(&stamp_file, stamp).context(|| format!("write {}", stamp_file.display()))?;
    progress(format_args!(
        "root disk ready in {}",
        Seconds(start.elapsed())
    ));
    Ok(())
}

fn make(recipe: &str, init: &Path, tree: &Path, image: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(
            "making the root disk needs root; run setup as root once",
        ));
    }
    let setting = |name: &str| {
        let prefix = format!("{name} ");
        let line = recipe.lines().find_map(|line| line.strip_prefix(&prefix));
        line.map(str::trim)
            .context(|| format!("{RECIPE} has no line {name:?}"))
    };
    if tree.exists() {
        fs::remove_dir_all(tree).context(|| format!("remove {}", tree.display()))?;
    }
    let (suite, packages) = (setting("suite")?, setting("packages")?);
    progress(format_args!(
        "making the root disk: Debian {suite} with {packages} (1 to 3 minutes)"
    ));
    let mut build = command(
        "mmdebstrap",
        ["--quiet", "--mode=root", "--format=directory"],
    );
    build
        .arg(format!("--variant={}", setting("variant")?))
        .arg(format!("--include={packages}"))
        .args([
            "--aptopt=Acquire::Languages \"none\"",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
        ])
        .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
        .arg(suite)
        .arg(tree);
    quietly(build)?;
    install_init(init, tree)?;
    let part = image.with_extension("part");
    let _ = fs::remove_file(&part); // Left by an interrupted run.
    let mut format = command(
        "/sbin/mke2fs",
        ["-q", "-F", "-t", "ext4", "-L", "ebb-root", "-d"],
    );
    format.arg(tree).arg(&part).arg(setting("size")?);
    quietly(format)?;
    let size = fs::metadata(&part).map_or(0, |meta| meta.len());
    progress(format_args!("ext4 image of {}", Size(size)));
    fs::rename(&part, image).context(|| format!("rename to {}", image.display()))
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
